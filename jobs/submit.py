"""`--address http://HOST:PORT`: a verb submits itself to a Ray cluster as a job, follows its log and ends with its code.

The job is `python -m jobs VERB` with the same words. It runs with what the cluster's image has installed, or with a
folder that `--working-dir` uploads. What only this machine knows is settled here: a recipe file is spelt out as
key=value words, a store's folder is named by its whole path. Secrets stay where they are: a job's entrypoint, runtime
environment and metadata are shown in Ray's dashboard, so keys must be in the environment of the cluster's nodes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import secrets
import shlex
import sys
import tomllib
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from cluster.config import has_credentials, mask_credentials
from cluster.endpoint_key import is_loopback
from cluster.errors import ConfigError, UnderstudyError

_API_ADDRESS_ENV = "RAY_API_SERVER_ADDRESS"
_INTERRUPTED = 130
"""What a shell says of a process that Ctrl-C ended."""
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_POLL_S = 2.0


class JobFacts(Protocol):
    """What is asked of ray.job_submission.JobDetails."""

    status: Any
    message: str | None
    driver_exit_code: int | None


class JobClient(Protocol):
    """What is asked of ray.job_submission.JobSubmissionClient."""

    def submit_job(
        self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> str: ...

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...

    def get_job_info(self, job_id: str) -> JobFacts: ...


class Submission(NamedTuple):
    """A job as it is handed to Ray."""

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]


def add_flags(verb: Any) -> None:
    """Add --address and what belongs to it to a verb that may run for long."""
    group = verb.add_argument_group("on a Ray cluster")
    group.add_argument(
        "--address",
        metavar="URL",
        help="submit this to the cluster whose dashboard is at http://HOST:PORT, and follow it",
    )
    group.add_argument(
        "--no-wait", action="store_true", help="with --address: print the job's name and do not follow it"
    )
    group.add_argument(
        "--working-dir",
        type=pathlib.Path,
        metavar="FOLDER",
        help="with --address: run the code of this folder, such as a checkout, instead of what the cluster has installed",
    )


def check_flags(options: argparse.Namespace) -> None:
    """Raises ConfigError where a flag is given that means something with --address alone."""
    for flag, value in (("--no-wait", options.no_wait), ("--working-dir", options.working_dir)):
        if value:
            raise ConfigError(f"{flag}: needs --address; next: {flag} with --address http://HOST:8265, or leave it out")


def plan_submission(
    verb: str, words: list[str], flags: list[str], options: argparse.Namespace, *, has_store: bool = True
) -> Submission:
    """What `--address` would submit.

    Args:
        words: key=value words of the command line.
        flags: others that the job gets, such as --promote.
        has_store: whether the verb works on the recipe's store; else the job is told of none.

    Raises:
        ConfigError: the words are wrong, or name what the cluster cannot see.
    """
    from jobs.provenance import GIT_SHA_ENV, git_sha
    from jobs.recipe import load_recipe

    recipe = load_recipe(words)
    if has_store and "://" not in recipe.store and not is_loopback(options.address) and not _names_whole_path(words):
        raise ConfigError(
            f"store={recipe.store!r}: a folder of this machine, and the job runs at {options.address}; allowed: the whole "
            "path of a folder that all nodes share, s3://... or gs://...; next: store=/shared/store"
        )
    runtime_env: dict[str, Any] = {}
    if options.working_dir is not None:
        if not (options.working_dir / "jobs" / "__main__.py").is_file():
            raise ConfigError(
                f"--working-dir {options.working_dir}: has no jobs/__main__.py; allowed: a checkout of this project, or "
                "left out for what the cluster has installed"
            )
        runtime_env["working_dir"] = str(options.working_dir.resolve())
        # The upload has no .git.
        if sha := git_sha(options.working_dir):
            runtime_env["env_vars"] = {GIT_SHA_ENV: sha}
    others = [word for word in spell_out(words) if not word.startswith("store=")]
    whole = [*others, f"store={recipe.store}"] if has_store else others
    entrypoint = shlex.join(["python", "-m", "jobs", verb, *flags, *whole])
    return Submission(entrypoint, runtime_env, _metadata(verb, recipe.store) if has_store else {"understudy": verb})


def submit(
    verb: str,
    words: list[str],
    flags: list[str],
    options: argparse.Namespace,
    connect: Callable[[str], JobClient] | None = None,
    *,
    has_store: bool = True,
) -> int:
    """Submit, follow the job's log on stdout, and return its exit code. Ctrl-C leaves the job running.

    Args:
        connect: opens the client; None takes Ray's.
        has_store: as plan_submission takes it.

    Raises:
        ConfigError: as plan_submission, or nobody answers at the address.
        UnderstudyError: the cluster refuses the job.
    """
    plan = plan_submission(verb, words, flags, options, has_store=has_store)
    if getattr(options, "dry_run", False):
        print(json.dumps({"address": options.address, **plan._asdict()}, indent=1))
        return 0
    client = (connect or connect_jobs)(options.address)
    name = f"understudy-{verb}-{secrets.token_hex(4)}"
    try:
        job = client.submit_job(submission_id=name, **plan._asdict())
    except (RuntimeError, OSError, ValueError) as error:
        raise UnderstudyError(
            f"--address {options.address}: the job was refused: {mask_credentials(str(error))}"
        ) from None
    _tell_how(job, options.address)
    if options.no_wait:
        print(job)
        return 0
    try:
        return asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"\n{job} goes on", file=sys.stderr)
        _tell_how(job, options.address)
        return _INTERRUPTED


def connect_jobs(address: str) -> JobClient:
    """Ray's client of the jobs at a dashboard's address.

    Raises:
        ConfigError: the address is none, nobody answers there, or the token is refused.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or has_credentials(address):
        raise ConfigError(
            f"--address {mask_credentials(repr(address))}: allowed: http://HOST:PORT of the cluster's dashboard, without "
            "credentials; next: --address http://127.0.0.1:8265"
        )
    # Ray's client takes RAY_ADDRESS before what it is told, and this variable before both.
    os.environ[_API_ADDRESS_ENV] = address
    import ray.exceptions
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except ray.exceptions.AuthenticationError:
        raise ConfigError(
            f"--address {address}: the cluster refuses the token, or there is none; next: export RAY_AUTH_MODE=token "
            "RAY_AUTH_TOKEN_PATH=~/.ray/token, with the cluster's token in that file"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--address {address}: no dashboard answers ({reason}); next: ray status, or an ssh or kubectl port-forward to "
            "port 8265 of the head"
        ) from None


def spell_out(words: list[str]) -> list[str]:
    """The words with a recipe's file as key=value words: the cluster does not have the file, or another one of its name.

    Example:
        >>> spell_out(["recipe=local", "gate.epsilon=0.1"])
        ['recipe=local', 'gate.epsilon=0.1']

    Raises:
        ConfigError: a recipe's file beside another recipe.
    """
    recipes = [word for word in words if word.startswith("recipe=")]
    files = [word for word in recipes if word.endswith(".toml")]
    if not files:
        return list(words)
    if len(recipes) > 1:
        raise ConfigError(f"{files[0]}: beside another recipe; allowed with --address: one recipe, and key=value words")
    values = tomllib.loads(pathlib.Path(files[0].removeprefix("recipe=")).read_text())
    return [*_flat(values, ""), *(word for word in words if word not in files)]


def _flat(value: Any, key: str) -> list[str]:
    """`a.b=VALUE` for every leaf; items of a list of tables go by number. JSON's scalars and lists are TOML's too."""
    if isinstance(value, dict):
        return [word for name, inner in value.items() for word in _flat(inner, f"{key}.{name}" if key else name)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [word for number, item in enumerate(value) for word in _flat(item, f"{key}.{number}")]
    # TOML takes neither surrogate pairs, which JSON writes in ASCII, nor a bare DEL.
    text = json.dumps(value, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")
    return [f"{key}={text}"]


def _names_whole_path(words: list[str]) -> bool:
    """Whether the store's folder was named as all nodes may know it."""
    stores = [word.partition("=")[2] for word in spell_out(words) if word.startswith("store=")]
    return bool(stores) and stores[-1].strip('"').startswith(("/", "file:///"))


def _metadata(verb: str, uri: str) -> dict[str, str]:
    """What a list of jobs tells apart by; snapshot and release are those of now, where the store can be read here."""
    from cluster import registry
    from cluster.store import Store

    known = {"understudy": verb, "store": uri}
    if "://" in uri or not pathlib.Path(uri).is_dir():
        return known
    store = Store(uri, is_made=False)
    try:
        found = {"release": registry.current_sha(store)}
        if store.exists("tasks/identity.json"):
            found["snapshot"] = store.read_json("tasks/identity.json").get("snapshot")
    except (UnderstudyError, OSError, ValueError):
        # What is wrong with the store is told by the job, which needs it.
        return known
    return known | {name: str(value) for name, value in found.items() if value}


def _tell_how(job: str, address: str) -> None:
    steps = {"follow": "logs --follow", "state": "status", "stop": "stop"}
    lines = [f"  {what}: ray job {verb} --address {address} {job}" for what, verb in steps.items()]
    print("\n".join([f"job {job}", *lines]), file=sys.stderr, flush=True)


async def _follow(client: JobClient, job: str) -> int:
    """Copy the job's log until it has ended; its exit code, 1 where it ended without one."""
    try:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)
    except (RuntimeError, OSError) as error:
        print(f"the log's connection broke off ({error}); waiting for the job's end", file=sys.stderr)
    while (facts := client.get_job_info(job)) and str(_value(facts.status)) not in _ENDED:
        await asyncio.sleep(_POLL_S)
    if _value(facts.status) == "SUCCEEDED":
        return 0
    print(f"job {job} {_value(facts.status)}: {facts.message or 'without a message'}", file=sys.stderr)
    # The driver's own code says whether a run failed or its configuration; one that was killed has none above 0.
    return facts.driver_exit_code if facts.driver_exit_code and facts.driver_exit_code > 0 else 1


def _value(status: Any) -> str:
    """Ray's status, an enum of strings, as its string."""
    return str(getattr(status, "value", status))
