"""Ask a specialist the held-out calls through the engine that serves it, grade the answers, certify the gate.

Validation fixes the thresholds; calibration is asked only if some threshold could hold; test is only reported. All
candidates are asked at once, because an engine answers many prompts of mixed adapters in one batch.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

from cluster.engine import Engine
from cluster.errors import EngineError, InputError
from cluster.faces import FacesConfig, facing_of
from cluster.judging import Judge
from cluster.prompts import PromptFormat
from cluster.records import Example, Gate, Record, Reference, Split, TaskSpec, TextGrader, Weights
from cluster.servable import ask_engine, unservable_reason
from cluster.store import content_hash
from training.arms import (
    GATED_ARM,
    SPECIALIST_ARM,
    Answered,
    Arm,
    Routed,
    count_routed,
    is_gold,
    make_arm,
    show_shots,
)
from training.canaries import Canary, Extraction, measure_extraction, refusal_of
from training.gate import (
    GateConfig,
    Outcome,
    certify,
    coverage_curve,
    one_call_per_session,
    plan_grid,
    refused_gate,
)
from training.ledger import CalibrationLedger, share_of_round
from training.probe import spread
from training.regression import Regression
from training.reliability import Bin, reliability
from training.text_graders import GraderErrors, agrees, measure_grader
from training.text_graders import refusal_of as refusal_of_grader

POPULATION = "calls of this task as served, one per session"
_MAX_HOPELESS_TEST = 30
MAX_SHOTS = 3
"""Most train examples that the few-shot arm shows."""
MAX_IN_FLIGHT = 256
"""Questions to an engine at a time."""


AskAll = Callable[[list[Example], str | None], Awaitable[list[Answered]]]


class Candidate(Weights):
    """A trained specialist before its gate. A merged one is not compared with its base, which its engine has not."""

    task: TaskSpec
    base_arm: str
    """How reports call the base model's own arm."""
    prompt_format: PromptFormat
    max_answer_tokens: int
    canaries: tuple[Canary, ...] = ()
    """Secrets that stood in its train split."""
    max_extraction: float | None = None
    """Largest share of them that it may say; None bars nothing."""
    text_grader: TextGrader | None = None
    """By what its answers agree; None compares by value."""
    max_false_agreement: float | None = None
    """Largest share of unrelated pairs that `text_grader` may find alike; None bars nothing."""


class Evaluation(Record):
    """Everything validation says about one candidate."""

    task_id: str
    gate: Gate
    arms: tuple[Arm, ...]
    routed: tuple[Routed, ...] = ()
    """The specialist's test calls by how they came out; empty in reports that were written without them."""
    truth: Reference = "llm"
    """What says in `routed` that an answer is right."""
    curve: tuple[dict[str, float], ...]
    """Coverage against disagreement on validation, by threshold."""
    reliability: tuple[Bin, ...] = ()
    """Agreement on validation by confidence."""
    grader_errors: GraderErrors | None = None
    """None where answers are compared by value."""
    extraction: Extraction | None = None
    """None where no secret was planted."""
    regression: Regression | None = None
    """Against the specialist it would replace; None where there was none, or where the gate refused it first."""


class Gain(NamedTuple):
    """How much more a specialist agrees on test than its base does."""

    base_arm: str
    gain: float
    """Difference of the shares that agree, in [-1, 1]."""
    interval: tuple[float, float]
    """95%, Newcombe's, with the arms treated as independent."""


def gain_over_base(evaluation: Evaluation) -> Gain | None:
    """None where one of the two arms has no answer."""
    measured = {arm.name: arm for arm in evaluation.arms if arm.num_kept}
    specialist = measured.get(SPECIALIST_ARM)
    base = next((arm for name, arm in measured.items() if name not in (SPECIALIST_ARM, GATED_ARM)), None)
    if specialist is None or base is None:
        return None
    gain = base.num_disagreements / base.num_kept - specialist.num_disagreements / specialist.num_kept
    counts = (base.num_disagreements, base.num_kept, specialist.num_disagreements, specialist.num_kept)
    return Gain(base.name, gain, newcombe_interval(*counts))


def validation_agreement(evaluation: Evaluation) -> float:
    """Share of the validation calls that the specialist answers as the reference does; what it cannot answer counts."""
    # The last point of the curve keeps every answer there is.
    return evaluation.curve[-1]["coverage"] * (1 - evaluation.curve[-1]["disagreement"]) if evaluation.curve else 0.0


def newcombe_interval(errors_a: int, calls_a: int, errors_b: int, calls_b: int) -> tuple[float, float]:
    """95% interval for rate a minus rate b of independent samples; both must have calls.

    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions", Statistics in
    Medicine 17, method 10.
    """
    rate_a, (low_a, high_a) = errors_a / calls_a, _wilson(errors_a, calls_a)
    rate_b, (low_b, high_b) = errors_b / calls_b, _wilson(errors_b, calls_b)
    difference = rate_a - rate_b
    return (
        difference - math.hypot(rate_a - low_a, high_b - rate_b),
        difference + math.hypot(high_a - rate_a, rate_b - low_b),
    )


def _wilson(errors: int, calls: int) -> tuple[float, float]:
    z = NormalDist().inv_cdf(0.975)
    centre = errors + z * z / 2
    spread = z * math.sqrt(errors * (calls - errors) / calls + z * z / 4)
    return (centre - spread) / (calls + z * z), (centre + spread) / (calls + z * z)


async def evaluate_all(
    candidates: Sequence[Candidate],
    engine: Engine,
    splits: Mapping[str, dict[Split, list[Example]]],
    config: GateConfig,
    delta: float,
    ledger: CalibrationLedger,
    *,
    max_temperature: float,
    faces: FacesConfig,
    judge: Judge | None = None,
    max_in_flight: int = MAX_IN_FLIGHT,
    on_answer: Callable[[Answered], None] = lambda answered: None,
    on_done: Callable[[Candidate, Evaluation], None] = lambda candidate, evaluation: None,
    on_calibrated: Callable[[str, list[Outcome]], None] = lambda task_id, outcomes: None,
) -> list[Evaluation]:
    """Grade, certify and report the candidates of one model folder, in their order.

    Args:
        splits: by task, its validation, calibration and test examples as served; and redacted train examples, where the
            base is to be shown some.
        delta: already divided by the number of candidates of the release.
        ledger: what calibration calls were spent on before; what is asked here is written into it.
        max_temperature: the gateway's; a call above it is escalated there, and counts as that here.
        faces: the gateway's rule for answers to a person; what it bars there counts as escalated here.
        judge: of candidates whose text an LLM judges.
        max_in_flight: questions at a time over all candidates.
        on_answer: called with each answer, on_done after each candidate, on_calibrated with a task and what its
            calibration calls were answered, where they were asked.
    """
    slots = asyncio.Semaphore(max_in_flight)

    async def one(candidate: Candidate) -> Evaluation:
        found = await evaluate(
            candidate,
            engine,
            splits[candidate.task.task_id],
            config,
            delta,
            ledger,
            max_temperature,
            faces,
            slots,
            on_answer,
            on_calibrated,
            judge,
        )
        on_done(candidate, found)
        return found

    # One after the other: concurrent first requests for adapters are what engines are worst at.
    for candidate in candidates:
        await _make_resident(candidate, engine)
    return list(await asyncio.gather(*map(one, candidates)))


async def evaluate(
    candidate: Candidate,
    engine: Engine,
    splits: dict[Split, list[Example]],
    config: GateConfig,
    delta: float,
    ledger: CalibrationLedger,
    max_temperature: float,
    faces: FacesConfig,
    slots: asyncio.Semaphore,
    on_answer: Callable[[Answered], None] = lambda answered: None,
    on_calibrated: Callable[[str, list[Outcome]], None] = lambda task_id, outcomes: None,
    judge: Judge | None = None,
) -> Evaluation:
    """Grade, certify and report one candidate, whose adapter is loaded; see `evaluate_all`."""
    fingerprint = await engine.fingerprint()

    async def ask_all(examples: list[Example], adapter: str | None) -> list[Answered]:
        async def one(example: Example) -> Answered:
            async with slots:
                answered = await _ask(candidate, engine, adapter, example, max_temperature, faces, judge)
            on_answer(answered)
            return answered

        return list(await asyncio.gather(*map(one, examples)))

    asked = await ask_all(one_call_per_session(splits["validation"], seed=0), candidate.lora)
    validation = [one.outcome for one in asked]
    calibration = one_call_per_session(splits["calibration"], seed=0)
    test_facts = [candidate.model_dump(mode="json"), fingerprint, config.model_dump(mode="json"), max_temperature]
    test_facts += [faces.model_dump(mode="json")]
    if judge is not None and candidate.text_grader and candidate.text_grader.name == "judge":
        # Another judge is another look at the same calls.
        test_facts += [judge.name]
    test_key = content_hash(test_facts)
    spent_ids = [example.example_id for example in calibration]
    number = ledger.round_of(test_key, spent_ids)
    delta *= share_of_round(number)
    facts = {"reference": candidate.task.reference, "population": POPULATION, "fingerprint": fingerprint}
    facts |= {"epsilon": config.epsilon, "delta": delta, "round": number, "text_grader": candidate.text_grader}
    extraction = await _extraction_of(candidate, engine)
    leak = refusal_of(extraction, candidate.max_extraction) if extraction else None
    grader, most = candidate.text_grader, candidate.max_false_agreement
    errors = grader and await measure_grader(candidate.task, splits["validation"], grader, judge)
    bar = leak or (refusal_of_grader(errors, most) if errors and most is not None else None)
    grid = bar or plan_grid(validation, len(calibration), config, delta)
    if isinstance(grid, str):
        gate = refused_gate(grid, num_calibration=len(calibration), **facts)
    else:
        ledger.spend(test_key, spent_ids)
        outcomes = [one.outcome for one in await ask_all(calibration, candidate.lora)]
        on_calibrated(candidate.task.task_id, outcomes)
        gate = certify(grid, outcomes, **facts)
    # Refused by validation alone: a sample of test tells how far off it is.
    test = splits["test"][:_MAX_HOPELESS_TEST] if isinstance(grid, str) else splits["test"]
    tested = await _test_arms(candidate, gate, splits, test, ask_all)
    curve = tuple(coverage_curve(validation))
    facts = {"extraction": extraction, "grader_errors": errors, "reliability": reliability(validation), **tested}
    return Evaluation(task_id=candidate.task.task_id, gate=gate, curve=curve, **facts)


async def ask_calibration(
    candidate: Candidate,
    engine: Engine,
    examples: list[Example],
    max_temperature: float,
    faces: FacesConfig,
    judge: Judge | None = None,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> list[Outcome]:
    """What a candidate says to the calls that a gate is certified on, in their order; spends none of them, as nothing is
    certified by it."""
    await _make_resident(candidate, engine)
    calls = one_call_per_session(examples, seed=0)
    slots = asyncio.Semaphore(max_in_flight)

    async def one(call: Example) -> Outcome:
        async with slots:
            return (await _ask(candidate, engine, candidate.lora, call, max_temperature, faces, judge)).outcome

    return list(await asyncio.gather(*map(one, calls)))


async def _make_resident(candidate: Candidate, engine: Engine) -> None:
    if candidate.lora:
        await engine.load(candidate.lora)


async def _extraction_of(candidate: Candidate, engine: Engine) -> Extraction | None:
    if not candidate.canaries:
        return None
    facts = (candidate.lora, candidate.prompt_format, candidate.canaries, candidate.max_answer_tokens)
    return await measure_extraction(engine, *facts)


async def _few_shot(
    candidate: Candidate, train: list[Example], test: list[Example], bare: list[Answered], ask_all: AskAll
) -> Arm | None:
    """The base with train examples in its prompt: as many as leave room for the first call that it answers without; None
    where none does."""
    first = next((example for example, answered in zip(test, bare, strict=True) if answered.prompt_tokens), None)
    if first is None:
        return None
    for count in range(min(MAX_SHOTS, len(train)), 0, -1):
        shots = spread(train, count)
        (tried,) = await ask_all([show_shots(first, shots)], None)
        if tried.prompt_tokens:
            answers = await ask_all([show_shots(example, shots) for example in test], None)
            shown = f"{count} example{'s' if count > 1 else ''} shown"
            return make_arm(f"{candidate.base_arm}, {shown}", answers, test, candidate.task, 0.0, candidate.text_grader)
    return None


async def _base_arms(candidate: Candidate, train: list[Example], test: list[Example], ask_all: AskAll) -> list[Arm]:
    """The base as it is, and with examples shown where they have room; the engine must serve the base."""
    bare = await ask_all(test, None)
    few_shot = await _few_shot(candidate, train, test, bare, ask_all)
    own = make_arm(candidate.base_arm, bare, test, candidate.task, 0.0, candidate.text_grader)
    return [own, *([few_shot] if few_shot else [])]


async def _test_arms(
    candidate: Candidate, gate: Gate, splits: Mapping[Split, list[Example]], test: list[Example], ask_all: AskAll
) -> dict[str, Any]:
    """The fields of an Evaluation that the test split gives."""
    specialist = await ask_all(test, candidate.lora)
    threshold = (gate.threshold or 1.0) if gate.is_open else math.inf
    facts = (test, candidate.task)
    grader = candidate.text_grader
    arms = [
        *(await _base_arms(candidate, splits.get("train", []), test, ask_all) if candidate.lora else []),
        make_arm(SPECIALIST_ARM, specialist, *facts, 0.0, grader),
        make_arm(GATED_ARM, specialist, *facts, threshold, grader),
    ]
    routed, truth = count_routed(specialist, *facts, threshold, grader)
    return {"arms": tuple(arms), "routed": routed, "truth": truth}


async def ask(
    candidate: Candidate,
    engine: Engine,
    adapter: str | None,
    example: Example,
    max_temperature: float,
    faces: FacesConfig,
) -> Outcome:
    """Ask one call and grade the answer; what serving would leave to the LLM counts as confidence 0 and no agreement."""
    return (await _ask(candidate, engine, adapter, example, max_temperature, faces)).outcome


async def _ask(
    candidate: Candidate,
    engine: Engine,
    adapter: str | None,
    example: Example,
    max_temperature: float,
    faces: FacesConfig,
    judge: Judge | None = None,
) -> Answered:
    """As `ask`, with what gold says of the answer and with the tokens that it took."""
    unkept = Answered(Outcome(confidence=0.0, agrees=False, session_id=example.session_id))
    facing = facing_of(example.request, example.target, is_facing=example.faces_person, config=faces)
    if unservable_reason(example.request, max_temperature, facing) is not None:
        return unkept
    limit = candidate.max_answer_tokens
    try:
        answer, invalid = await ask_engine(engine, adapter, candidate.prompt_format, example.request, limit, facing)
    except (InputError, EngineError):
        return unkept
    tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    if invalid is not None:
        return unkept._replace(**tokens)
    agreed = await agrees(answer.message, example, candidate.task, candidate.text_grader, judge)
    # What no judge speaks of counts against the specialist.
    outcome = Outcome(confidence=answer.confidence, agrees=bool(agreed), session_id=example.session_id)
    return Answered(outcome, is_gold(answer.message, example, candidate.task, candidate.text_grader), **tokens)
