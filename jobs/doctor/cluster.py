"""Ray: whether it can be imported, whether its token is in place, and whether the cluster that is named answers.

Joins no cluster and starts none. A cluster has two addresses: HOST:PORT of its head (RAY_ADDRESS), which a process joins,
and http://HOST:PORT of its dashboard (--address), to which jobs are submitted. Source: Ray's token loader looks at
RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token, in this order.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator

from cluster.errors import ConfigError
from cluster.session import check_reachable
from jobs.doctor.check import Check, Reporter
from jobs.doctor.packages import installed_version
from jobs.submit import connect_jobs

_DEFAULT_TOKEN = pathlib.Path(".ray") / "auth_token"
_MAKE_TOKEN = (
    "(umask 077; mkdir -p ~/.ray; openssl rand -hex 32 > ~/.ray/token); export RAY_AUTH_MODE=token "
    "RAY_AUTH_TOKEN_PATH=~/.ray/token"
)
_say = Reporter("Ray")


def check_cluster(
    address: str | None,
    *,
    reach_head: Callable[[str], None] = check_reachable,
    reach_jobs: Callable[[str], object] = connect_jobs,
) -> Iterator[Check]:
    """Look for the cluster at `address`, or at RAY_ADDRESS.

    Args:
        address: http://HOST:PORT, where jobs are submitted, or HOST:PORT, which a process joins.
        reach_head: raises ConfigError where nobody listens at HOST:PORT.
        reach_jobs: raises ConfigError where no dashboard answers, or it refuses the token.
    """
    try:
        import ray
    except ImportError as error:
        yield _say.failed("import", str(error), "make setup, or on a GPU machine: pip install '.[gpu]'")
        return
    yield _say.ok("import", f"{ray.__version__} (installed as {installed_version('ray')})")
    named = address or os.environ.get("RAY_ADDRESS")
    yield _token(has_cluster=bool(named))
    if not named:
        yield _say.ok("cluster", "none is named: verbs start Ray on this machine, and end it")
        return
    origin = "--address" if address else "RAY_ADDRESS"
    try:
        (reach_jobs if "://" in named else reach_head)(named)
    except ConfigError as error:
        yield _say.told("cluster", error, "ray status, or leave the address out to run on this machine")
        return
    yield _say.ok("cluster", f"{origin}={named} answers")


def _token(*, has_cluster: bool) -> Check:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode != "token":
        if has_cluster:
            return _say.warning(
                "token", f"RAY_AUTH_MODE={mode}: whoever reaches the cluster runs code on it", _MAKE_TOKEN
            )
        return _say.ok("token", f"RAY_AUTH_MODE={mode}; Ray on this machine listens on loopback alone")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return _say.ok("token", "from RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = pathlib.Path(named) if named else pathlib.Path.home() / _DEFAULT_TOKEN
    if not path.is_file():
        if mode is None and not has_cluster:
            return _say.ok("token", "none yet; Ray makes one for a cluster of its own")
        make = _say.failed if mode or named else _say.warning
        return make(
            "token", f"{path} is not there", f"copy the cluster's token there, or for a new cluster: {_MAKE_TOKEN}"
        )
    mode_bits = path.stat().st_mode & 0o777
    if mode_bits & 0o077:
        # Ray itself makes ~/.ray/auth_token so.
        return _say.warning("token", f"{path} has mode {mode_bits:o}: others here can read it", f"chmod 600 {path}")
    return _say.ok("token", f"{path}, mode {mode_bits:o}")
