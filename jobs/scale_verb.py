"""`understudy scale EXPERIMENT`: which experiments there are, and their flags. Each is a file of jobs/scale/."""

from __future__ import annotations

import argparse
import functools
import importlib
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError
from jobs import submit

if TYPE_CHECKING:
    from jobs.recipe import Recipe
    from jobs.scale.economy import GivenConfig
    from jobs.scale.laboratory import Laboratory
    from jobs.scale.material import Material

EXPERIMENTS = {
    "data": "examples of a task -> agreement and certified coverage",
    "model": "parameters x examples at equal compute -> agreement",
    "tasks": "a specialist for each task, for each group, for all, at equal total compute",
    "fleet": "tasks x workers -> makespan, efficiency, lower bound; simulated up to 1,000 GPUs, checked by real fleets",
    "rank": "LoRA rank, targets, DoRA, full fine-tune at equal compute",
    "serve": "replicas x adapters x concurrency -> throughput, latency, adapter loads; real engines, and many simulated "
    "ones; with store=PATH what that store serves, asked its own calls",
    "economy": "share of calls moved and utilisation -> cost; break-even volume of a task",
}
"""Name, also of the module in jobs/scale/ -> what it measures."""
_TRAINING = ("data", "model", "tasks", "rank")
"""Need Ray, and examples."""


def add_verb(verbs: Any, words: dict[str, Any], sections: tuple[str, ...]) -> None:
    """Add `scale` to the verbs of the command line."""
    scale = verbs.add_parser(
        "scale",
        help="scaling experiments: a grid that resumes, a picture, a fitted law with intervals",
        sections=sections,
        examples=[
            "understudy scale data --quick",
            "understudy scale data --out out/data recipe=local store=store",
            "understudy scale serve --quick store=store",
            "understudy scale data --address http://127.0.0.1:8265 --out /shared/data recipe=local store=/shared/store",
            "understudy scale economy recipe=my.toml --given calls_per_s=12 --given kept=0.6",
        ],
    )
    listed = "; ".join(f"{name}: {meaning}" for name, meaning in EXPERIMENTS.items())
    scale.add_argument("experiment", choices=tuple(EXPERIMENTS), metavar="EXPERIMENT", help=listed)
    scale.add_argument("words", **words)
    scale.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FOLDER",
        help="cells, laws.json, report.html; on a cluster a folder that all nodes see; default out/scale/EXPERIMENT. The "
        "same command again goes on where it stopped",
    )
    scale.add_argument(
        "--quick",
        action="store_true",
        help="minutes on two cores: few calls, and the ten most frequent answers of tasks that have more",
    )
    scale.add_argument("--full", action="store_true", help="more seeds, sizes and steps than two cores do in minutes")
    scale.add_argument(
        "--calls",
        type=pathlib.Path,
        action="append",
        default=[],
        metavar="PATH",
        help="call logs to take tasks from, may be given again; default the shared sets (UNDERSTUDY_DATA), or the calls of store=PATH",
    )
    scale.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="economy: a number measured elsewhere, such as kept=0.6; may be given again; the report names all",
    )
    submit.add_flags(scale)
    scale.set_defaults(run=_scale)


def _scale(options: argparse.Namespace) -> int | None:
    _check_flags(options)
    if options.address:
        return _submit(options)
    submit.check_flags(options)
    _run(options)
    return None


def _check_flags(options: argparse.Namespace) -> None:
    if options.quick and options.full:
        raise ConfigError("--quick and --full: one is less and the other more; next: leave one out")
    if options.given and options.experiment != "economy":
        raise ConfigError(f"--given: {options.experiment} measures its numbers itself; next: leave it out")
    if options.calls and options.experiment == "serve":
        raise ConfigError("--calls: serve asks what a store serves the calls that are there; next: store=PATH instead")
    if options.calls and names_store(options.words):
        raise ConfigError("--calls and store=: both say where calls are; next: leave one out")


def _submit(options: argparse.Namespace) -> int:
    """The experiment as a job of the cluster: its files are those of the nodes."""
    for flag, paths in (("--out", [options.out] if options.out else []), ("--calls", options.calls)):
        if wrong := [path for path in paths if not path.is_absolute()]:
            raise ConfigError(
                f"{flag} {wrong[0]}: with --address the job runs elsewhere; allowed: the whole path of what all nodes see; "
                f"next: {flag} /shared/{wrong[0].name}"
            )
    if options.out is None:
        raise ConfigError(
            "--address: the report stays on the cluster, in --out, which is not said; next: --out /shared/FOLDER that all "
            "nodes see"
        )
    flags = [options.experiment, *_flags(options), "--out", str(options.out)]
    return submit.submit("scale", options.words, flags, options, has_store=names_store(options.words))


def _flags(options: argparse.Namespace) -> list[str]:
    size = ["--quick"] * options.quick + ["--full"] * options.full
    calls = [word for path in options.calls for word in ("--calls", str(path))]
    return [*size, *calls, *(word for one in options.given for word in ("--given", one))]


def _run(options: argparse.Namespace) -> None:
    out = options.out or pathlib.Path("out/scale") / options.experiment
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is no folder; allowed: a folder, or a path where none is yet")
    from cluster.access import require_role
    from jobs.recipe import load_recipe

    recipe = load_recipe(options.words)
    takes_store = names_store(options.words)
    if takes_store:
        require_role(recipe.store, "curator")
    from jobs.scale.report import write_findings

    module = importlib.import_module(f"jobs.scale.{options.experiment}")
    lab = _laboratory(options, recipe, out.resolve(), takes_store)
    if options.experiment in _TRAINING:
        # What is missing is told before Ray starts.
        if options.experiment != "model":
            lab.check_base()
        lab.load()
        _connect()
    elif options.experiment == "fleet":
        _connect()
    try:
        findings = module.run(lab, _given(options.given)) if options.experiment == "economy" else module.run(lab)
    finally:
        # Examples are content: they stay on no disk, whatever became of the experiment.
        shutil.rmtree(_material_folder(out), ignore_errors=True)
    words = ["understudy", "scale", options.experiment, *_flags(options), *options.words]
    write_findings(out, options.experiment, findings, words)


def names_store(words: Sequence[str]) -> bool:
    """Whether the words, or the recipe they name, say which store: it has a default that says nothing."""
    from cluster.config import load_config
    from jobs.recipe import RECIPES, Recipe

    shipped = {f"recipe={path.stem}" for path in RECIPES.glob("*.toml")}
    return "store" in load_config(Recipe, [word for word in words if word not in shipped], RECIPES).model_fields_set


def _laboratory(options: argparse.Namespace, recipe: Recipe, out: pathlib.Path, takes_store: bool) -> Laboratory:
    from jobs.scale.laboratory import Laboratory
    from jobs.scale.material import load_logs, load_shared, load_store, save_material

    @functools.cache
    def load() -> Sequence[Material]:
        if takes_store:
            return load_store(recipe, is_quick=options.quick)
        if options.calls:
            return load_logs(options.calls, recipe, is_quick=options.quick)
        return load_shared(recipe, is_quick=options.quick)

    def save(material: Sequence[Material]) -> tuple[pathlib.Path, str]:
        return _material_folder(out), save_material(material, _material_folder(out))

    return Laboratory(
        recipe=recipe,
        out=out,
        size="quick" if options.quick else "full" if options.full else "small",
        load=load,
        save=save,
        say=_say,
        names_store=takes_store,
    )


def _say(line: str) -> None:
    """Progress. A function of this module: Tune pickles what tells it, and a stream has no pickle."""
    print(line, file=sys.stderr, flush=True)


def _given(words: list[str]) -> GivenConfig:
    from cluster.config import load_config
    from jobs.recipe import RECIPES
    from jobs.scale.economy import GivenConfig

    return load_config(GivenConfig, words, RECIPES)


def _material_folder(out: pathlib.Path) -> pathlib.Path:
    """Examples that trials read; there only while an experiment runs."""
    return out / "material"


def _connect() -> None:
    from cluster.session import connect

    connect()
