"""Cells of an experiment's grid: each is measured once, written down at once, and never measured again.

A cell is known by its experiment, its parameters, the code and the data, so a killed run that is started again with the same
words goes on where it stopped, and one of other code or other data begins anew. Cells run on Ray Tune, side by side as the
cluster has room; each writes OUT/cells/HASH.json itself, whole or not at all, on a folder that all nodes see.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cluster.errors import InputError, TrainingError
from cluster.records import Record
from cluster.store import content_hash
from jobs import provenance

_NUM_KEY_CHARS = 16
_UNTOLD = ("batch_size", "start")


class Cell(Record):
    """One point of a grid."""

    experiment: str
    parameters: dict[str, Any]
    code: str
    """Hash of the source files."""
    data: str
    """Hash of the examples, or of whatever else it is measured on."""
    recipe: str = ""
    """Hash of the recipe."""

    @property
    def key(self) -> str:
        return content_hash(self.model_dump(mode="json"))[:_NUM_KEY_CHARS]


class Measured(NamedTuple):
    """A finished cell."""

    cell: Cell
    result: dict[str, Any]


class CellBook:
    """The finished cells of OUT."""

    def __init__(self, out: pathlib.Path) -> None:
        self.folder = out.resolve() / "cells"

    def write(self, cell: Cell, result: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write a cell down, whole or not at all.

        Args:
            facts: where it comes from, such as `provenance_of` gives.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"cell": cell.model_dump(mode="json"), "result": dict(result), "provenance": dict(facts)}, indent=1
        )
        draft = self.folder / f".{cell.key}.{os.getpid()}"
        draft.write_text(text + "\n")
        draft.replace(self.folder / f"{cell.key}.json")

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell, or None where it is not finished.

        Raises:
            InputError: its file is no cell.
        """
        path = self.folder / f"{cell.key}.json"
        try:
            return dict(json.loads(path.read_text())["result"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: is no finished cell ({type(error).__name__}); next: delete it, and it is measured again"
            ) from None


def provenance_of(cell: Cell, seconds: float) -> dict[str, Any]:
    """Code, packages, machine and data of a measurement that this process made."""
    code, machine = provenance.code(), provenance.machine()
    hardware = {name: machine[name] for name in ("processor", "cores", "memory_gib")}
    return {**code, "hardware": hardware, "date": machine["date"], "data": cell.data, "seconds": round(seconds, 2)}


def measure_here(
    cells: Sequence[Cell],
    measure: Callable[[dict[str, Any]], dict[str, Any]],
    book: CellBook,
    say: Callable[[str], object],
) -> list[Measured]:
    """Measure in this process, one after the other; for cells that bring their own Ray runs or need none."""
    found = []
    for number, cell in enumerate(cells, 1):
        result = book.read(cell)
        if result is None:
            began = time.monotonic()
            result = measure(cell.parameters)
            book.write(cell, result, provenance_of(cell, time.monotonic() - began))
            say(f"cell {number} of {len(cells)}: {describe(cell.parameters)}: {result.get('told', 'done')}")
        found.append(Measured(cell, result))
    return found


def measure_on_tune(
    cells: Sequence[Cell],
    measure: Callable[[dict[str, Any]], dict[str, Any]],
    book: CellBook,
    resources: Mapping[str, float],
    say: Callable[[str], object],
) -> list[Measured]:
    """Measure on the connected Ray cluster, a Tune trial a cell; processes are used again by the next one.

    Args:
        measure: the parameters of a cell -> its result, whose `told` is shown to whoever waits. Runs in the trial.
        resources: of a trial, as Tune names them.

    Raises:
        TrainingError: a cell failed; the others are measured and stay.
    """
    waiting = [cell for cell in cells if book.read(cell) is None]
    say(f"{len(cells)} cells, {len(cells) - len(waiting)} of them measured before")
    errors = _run_trials(waiting, measure, book, resources, say) if waiting else []
    found = [(cell, book.read(cell)) for cell in cells]
    missing = [cell for cell, result in found if result is None]
    if missing:
        reason = errors[0] if errors else "no result"
        raise TrainingError(
            f"{len(missing)} of {len(cells)} cells failed, first {describe(missing[0].parameters)}: {reason}; "
            "finished ones are kept; next: the same command again"
        )
    return [Measured(cell, result) for cell, result in found if result is not None]


def describe(parameters: Mapping[str, Any]) -> str:
    """A cell's plain parameters in one line."""
    joined = {k: "+".join(map(str, v)) if k == "steps" and isinstance(v, list) else v for k, v in parameters.items()}
    told = {k: v for k, v in joined.items() if isinstance(v, str | int | float) and k not in _UNTOLD}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in told.items()
    )


def _run_trials(
    cells: Sequence[Cell],
    measure: Callable[[dict[str, Any]], dict[str, Any]],
    book: CellBook,
    resources: Mapping[str, float],
    say: Callable[[str], object],
) -> list[str]:
    """Returns the errors of trials that failed."""
    # As in training/probe.py: no console tables, no log formats that cannot hold what is reported.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    by_key = {cell.key: cell for cell in cells}

    def trial(config: dict[str, Any]) -> None:
        cell = Cell.model_validate_json(config["cell"])
        began = time.monotonic()
        result = measure(cell.parameters)
        book.write(cell, result, provenance_of(cell, time.monotonic() - began))
        tune.report({"key": cell.key, "told": str(result.get("told", "done"))})

    class Teller(tune.Callback):
        """Says what each finished cell found."""

        num_done = 0

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.num_done += 1
            last = trial.last_result or {}
            if "key" in last:
                told = describe(by_key[last["key"]].parameters)
                say(f"cell {self.num_done} of {len(cells)}: {told}: {last['told']}")

    storage = book.folder.parent / "tune"
    tuner = tune.Tuner(
        tune.with_resources(trial, dict(resources)),
        param_space={"cell": tune.grid_search([cell.model_dump_json() for cell in cells])},
        tune_config=tune.TuneConfig(reuse_actors=True, trial_dirname_creator=lambda one: one.trial_id),
        run_config=tune.RunConfig(
            name="cells", storage_path=str(storage), callbacks=[JsonLoggerCallback(), Teller()], verbose=0
        ),
    )
    failed = [str(result.error) for result in tuner.fit() if result.error]
    shutil.rmtree(storage, ignore_errors=True)
    lines = [[line for line in text.splitlines() if line.strip()] for text in failed]
    return [own[-1].strip()[:300] if own else "failed" for own in lines]
