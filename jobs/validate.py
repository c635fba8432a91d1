"""Candidates + held-out calls -> evaluations: the engine that serves is asked, and each report is kept by its content."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from tqdm import tqdm

from cluster.engine import Engine
from cluster.errors import EngineError
from cluster.records import Example, Split
from cluster.session import serve_without_http
from cluster.store import Store, content_hash
from jobs.judge import open_judge
from jobs.recipe import Recipe
from training.arms import Answered
from training.evaluation import MAX_IN_FLIGHT, Candidate, Evaluation, evaluate_all, validation_agreement
from training.gate import Outcome, minimum_calls, release_delta
from training.ledger import CalibrationLedger, share_of_round
from training.text_graders import SelfAgreement
from training.worth import Rates

EngineOf = Callable[[str], contextlib.AbstractContextManager[Engine]]
"""Store path of a model folder, a base or a merged one -> the engine that serves it, for as long as the block runs."""
ASKED: tuple[Split, ...] = ("train", "validation", "calibration", "test")
"""Splits that validation asks; of train, the few examples that the few-shot arm shows."""


AGREEMENT_FILE = "tasks/agreement.json"


def calls_to_certify(recipe: Recipe, num_candidates: int) -> int:
    """Fewest calibration calls, one per session, that could open a gate; refused candidates count too."""
    delta = release_delta(recipe.gate.delta, max(1, num_candidates)) * share_of_round(0)
    return minimum_calls(recipe.gate.epsilon, delta)


class AnswerRate:
    """Tokens a second that the validation engine takes, from its first question to its last answer. Used by one loop."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began: float | None = None
        self._before_s = self._seconds = 0.0
        self._num_tokens = 0

    def begin(self) -> None:
        """Start the clock; it stands still from the last answer of one engine to the next `begin`."""
        self._before_s, self._began = self._seconds, self._clock()

    def add(self, answered: Answered) -> None:
        """Count an answer, kept or not."""
        assert self._began is not None, "begin first"
        self._num_tokens += answered.prompt_tokens + answered.completion_tokens
        self._seconds = self._before_s + self._clock() - self._began

    @property
    def tokens_per_s(self) -> float | None:
        """None before there was an answer."""
        return self._num_tokens / self._seconds if self._num_tokens and self._seconds else None


def rates_of(recipe: Recipe, rate: AnswerRate) -> Rates:
    """The recipe's prices with what validation measured."""
    llm = recipe.upstream[0] if recipe.upstream else None
    return Rates(
        replica_usd_per_hour=recipe.prices.replica_usd_per_hour,
        num_replicas=max(1, recipe.specialists.min_replicas),
        tokens_per_s=rate.tokens_per_s,
        prompt_usd_per_million=llm.prompt_usd_per_million if llm else 0.0,
        completion_usd_per_million=llm.completion_usd_per_million if llm else 0.0,
    )


def save_agreements(
    recipe: Recipe,
    store: Store,
    snapshot: str,
    evaluations: Sequence[Evaluation],
    rates: Rates,
    teacher: Mapping[str, SelfAgreement] = MappingProxyType({}),
) -> None:
    """Write how often each specialist agreed on validation, and where its report is, beside those of earlier runs:
    task_id -> facts."""
    found = store.read_json(AGREEMENT_FILE) if store.exists(AGREEMENT_FILE) else {}
    for one in evaluations:
        found[one.task_id] = {
            "snapshot": snapshot,
            "agreement": validation_agreement(one),
            "report": save_evaluation(store, one),
            "rates": rates.model_dump(mode="json"),
            "margin": recipe.evaluation.noninferiority_margin,
            "teacher": teacher[one.task_id].model_dump(mode="json") if one.task_id in teacher else None,
        }
    store.write_json(AGREEMENT_FILE, found)


def save_evaluation(store: Store, evaluation: Evaluation) -> str:
    """Write reports/SHA256.json, named by its content, which no later conversion changes. Returns its store path."""
    value = evaluation.model_dump(mode="json")
    path = f"reports/{content_hash(value)}.json"
    if not store.exists(path):
        store.write_json(path, value)
    return path


@contextlib.contextmanager
def validation_engine(recipe: Recipe, model: str) -> Iterator[Engine]:
    """Start the engine that serves a base or a merged model, without HTTP, and take it down again.

    Raises:
        EngineError: it did not start.
    """
    from ray import serve

    from serving.specialist import ServeEngine, build_specialists

    # One name for one store: conversions side by side do not meet, and one that was killed is taken over.
    app = f"validation-{content_hash(recipe.store)[:8]}"
    # Nothing is chosen among one engine's replicas, and under HAProxy Serve lets no application's only deployment choose.
    config = recipe.specialists.model_copy(update={"request_router": "default"})
    with serve_without_http():
        try:
            handle = serve.run(build_specialists(model, config, recipe.store), name=app, route_prefix=None)
        except RuntimeError as error:
            raise EngineError(
                f"the engine of {model} did not start: {error}; the reason stands in its replica's log below "
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


def group_by_model(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Candidates by the model folder that is asked, those of a base before merged ones; as they came within each."""
    groups: dict[str, list[Candidate]] = {}
    for one in sorted(candidates, key=lambda one: one.merged or ""):
        groups.setdefault(one.model, []).append(one)
    return groups


def validate_candidates(
    recipe: Recipe,
    store: Store,
    candidates: Sequence[Candidate],
    by_split: dict[Split, dict[str, list[Example]]],
    engine: Engine,
    num_candidates: int,
    rate: AnswerRate,
    say: Callable[[str], None],
) -> list[Evaluation]:
    """Ask the engine that serves the held-out calls; `num_candidates` counts the refused ones too."""
    return asyncio.run(ask_held_out(recipe, store, candidates, by_split, engine, num_candidates, rate, say))


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
    rate: AnswerRate,
    say: Callable[[str], None],
    on_calibrated: Callable[[str, list[Outcome]], None] = lambda task_id, outcomes: None,
) -> list[Evaluation]:
    """`validate_candidates` for whoever asks the same engine more: it belongs to one event loop.

    Args:
        rate: begins here, and counts every answer, unless a judge is waited for.
        on_calibrated: called with a task and what its calibration calls were answered, where they were asked.
    """
    splits = {c.task.task_id: {s: by_split[s][c.task.task_id] for s in ASKED if s in by_split} for c in candidates}

    def save(candidate: Candidate, found: Evaluation) -> None:
        save_evaluation(store, found)
        gate = found.gate
        certified = f"open at {gate.threshold}, coverage {gate.coverage:.2f}, bound {gate.upper_bound}"
        say(f"validate {candidate.task.task_id}: {gate.refused or certified}")

    ledger = CalibrationLedger(store)
    delta = release_delta(recipe.gate.delta, num_candidates)
    with tqdm(desc="validate", unit="answer", disable=None) as bar:
        limit = recipe.gateway.max_temperature

        # An engine that waits for a judge's verdicts does not show its own speed.
        is_judged = any(one.text_grader and one.text_grader.name == "judge" for one in candidates)

        def count(answered: Answered) -> None:
            bar.update()
            if not is_judged:
                rate.add(answered)

        options = {"max_temperature": limit, "faces": recipe.faces, "on_answer": count, "on_done": save}
        rate.begin()
        options["on_calibrated"] = on_calibrated
        options["max_in_flight"] = most_in_flight(recipe)
        async with open_judge(recipe, store, candidates, say) as judge:
            return await evaluate_all(candidates, engine, splits, recipe.gate, delta, ledger, judge=judge, **options)
