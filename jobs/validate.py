"""Candidates + held-out calls -> evaluations: the engine that serves is asked, and each report is kept by its content."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from cluster.engine import Engine
from cluster.errors import EngineError
from cluster.records import Example, Split
from cluster.session import serve_without_http
from cluster.store import Store, content_hash
from jobs.recipe import Recipe
from training.evaluation import MAX_IN_FLIGHT, Candidate, Evaluation, evaluate_all, validation_agreement
from training.gate import Outcome, minimum_calls, release_delta
from training.ledger import CalibrationLedger, share_of_round

EngineOf = Callable[[str], contextlib.AbstractContextManager[Engine]]
"""Store path of a base -> the engine that serves it, for as long as the block runs."""
HELD_OUT: tuple[Split, ...] = ("validation", "calibration", "test")


AGREEMENT_FILE = "tasks/agreement.json"


def calls_to_certify(recipe: Recipe, num_candidates: int) -> int:
    """Fewest calibration calls, one per session, that could open a gate; refused candidates count too."""
    delta = release_delta(recipe.gate.delta, max(1, num_candidates)) * share_of_round(0)
    return minimum_calls(recipe.gate.epsilon, delta)


def save_agreements(store: Store, snapshot: str, evaluations: Sequence[Evaluation]) -> None:
    """Write how often each specialist agreed on validation, beside those of earlier runs: task_id -> facts."""
    found = store.read_json(AGREEMENT_FILE) if store.exists(AGREEMENT_FILE) else {}
    for one in evaluations:
        found[one.task_id] = {"snapshot": snapshot, "agreement": validation_agreement(one)}
    store.write_json(AGREEMENT_FILE, found)


def save_evaluation(store: Store, evaluation: Evaluation) -> str:
    """Write reports/SHA256.json, named by its content, which no later conversion changes. Returns its store path."""
    value = evaluation.model_dump(mode="json")
    path = f"reports/{content_hash(value)}.json"
    if not store.exists(path):
        store.write_json(path, value)
    return path


@contextlib.contextmanager
def validation_engine(recipe: Recipe, base: str) -> Iterator[Engine]:
    """Start the engine that serves the base, without HTTP, and take it down again.

    Raises:
        EngineError: it did not start.
    """
    from ray import serve

    from serving.specialist import ServeEngine, build_specialists

    # One name for one store: conversions side by side do not meet, and one that was killed is taken over.
    app = f"validation-{content_hash(recipe.store)[:8]}"
    with serve_without_http():
        try:
            handle = serve.run(build_specialists(base, recipe.specialists, recipe.store), name=app, route_prefix=None)
        except RuntimeError as error:
            raise EngineError(
                f"the engine of {base} did not start: {error}; the reason stands in its replica's log below "
                "/tmp/ray/session_latest/logs/serve; next: run the same command again, what is trained stays"
            ) from None
        # In a loop of its own, also where RAY_SERVE_THROUGHPUT_OPTIMIZED asks for the caller's: that of `asyncio.run` is closed
        # once the calls are answered, and Serve could then not take the handle down.
        if not handle.is_initialized:
            handle._init(_run_router_in_separate_loop=True)
        try:
            yield ServeEngine(handle)
        finally:
            serve.delete(app)


def validate_candidates(
    recipe: Recipe,
    store: Store,
    candidates: Sequence[Candidate],
    by_split: dict[Split, dict[str, list[Example]]],
    engine: Engine,
    num_candidates: int,
    say: Callable[[str], None],
) -> list[Evaluation]:
    """Ask the engine that serves the held-out calls; `num_candidates` counts the refused ones too."""
    return asyncio.run(ask_held_out(recipe, store, candidates, by_split, engine, num_candidates, say))


def most_in_flight(recipe: Recipe) -> int:
    """Questions at once that keep the engine's batches full; a small engine refuses more than its queue takes, and a
    conversion has no LLM to send them to."""
    return min(MAX_IN_FLIGHT, 2 * recipe.specialists.max_num_seqs)


async def ask_held_out(
    recipe: Recipe,
    store: Store,
    candidates: Sequence[Candidate],
    by_split: dict[Split, dict[str, list[Example]]],
    engine: Engine,
    num_candidates: int,
    say: Callable[[str], None],
    on_calibrated: Callable[[str, list[Outcome]], None] = lambda task_id, outcomes: None,
) -> list[Evaluation]:
    """`validate_candidates` for whoever asks the same engine more: it belongs to one event loop.

    Args:
        on_calibrated: called with a task and what its calibration calls were answered, where they were asked.
    """
    splits = {c.task.task_id: {s: by_split[s][c.task.task_id] for s in HELD_OUT} for c in candidates}

    def save(candidate: Candidate, found: Evaluation) -> None:
        save_evaluation(store, found)
        gate = found.gate
        certified = f"open at {gate.threshold}, coverage {gate.coverage:.2f}, bound {gate.upper_bound}"
        say(f"validate {candidate.task.task_id}: {gate.refused or certified}")

    ledger = CalibrationLedger(store)
    delta = release_delta(recipe.gate.delta, num_candidates)
    with tqdm(desc="validate", unit="answer", disable=None) as bar:
        limit = recipe.gateway.max_temperature
        options = {"max_temperature": limit, "faces": recipe.faces, "on_answer": bar.update, "on_done": save}
        options["on_calibrated"] = on_calibrated
        options["max_in_flight"] = most_in_flight(recipe)
        return await evaluate_all(candidates, engine, splits, recipe.gate, delta, ledger, **options)
