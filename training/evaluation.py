"""Ask a specialist the held-out calls through the engine that serves it, grade the answers, certify the gate.

Validation fixes the thresholds; calibration is asked only if some threshold could hold; test is only reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from cluster import answers
from cluster.engine import Engine
from cluster.errors import EngineError, InputError
from cluster.prompts import PromptFormat
from cluster.records import Example, Gate, Record, Split, TaskSpec
from training.gate import (
    GateConfig,
    Outcome,
    certify,
    clopper_pearson_interval,
    coverage_curve,
    one_call_per_session,
    plan_grid,
    refused_gate,
)

POPULATION = "calls of this task as served, one per session"


class Candidate(Record):
    """A trained specialist before its gate."""

    task: TaskSpec
    base: str
    base_arm: str
    """How reports call the base model's own arm."""
    adapter: str
    prompt_format: PromptFormat
    max_answer_tokens: int


class Arm(Record):
    """How one way of answering did on the test split."""

    name: str
    num_calls: int
    coverage: float
    num_kept: int
    num_disagreements: int
    disagreement: float | None
    interval: tuple[float, float]
    """Two-sided 95% Clopper-Pearson interval of `disagreement`."""


class Evaluation(Record):
    """Everything validation says about one candidate."""

    task_id: str
    gate: Gate
    arms: tuple[Arm, ...]
    curve: tuple[dict[str, float], ...]
    """Coverage against disagreement on validation, by threshold."""


async def evaluate(
    candidate: Candidate,
    engine: Engine,
    splits: dict[Split, list[Example]],
    config: GateConfig,
    delta: float,
    *,
    max_in_flight: int = 64,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Grade, certify and report one candidate.

    Args:
        splits: validation, calibration and test examples of the task, as served.
        delta: already divided by the number of candidates of the release.
    """
    await engine.load(candidate.adapter)
    fingerprint = await engine.fingerprint()

    async def ask(examples: list[Example], adapter: str | None) -> list[Outcome]:
        return await _ask_all(candidate, engine, adapter, examples, max_in_flight, on_progress)

    validation = await ask(one_call_per_session(splits["validation"], seed=0), candidate.adapter)
    calibration = one_call_per_session(splits["calibration"], seed=0)
    facts = {"reference": candidate.task.reference, "population": POPULATION, "fingerprint": fingerprint}
    grid = plan_grid(validation, len(calibration), config, delta)
    if isinstance(grid, str):
        gate = refused_gate(grid, num_calibration=len(calibration), epsilon=config.epsilon, delta=delta, **facts)
    else:
        gate = certify(grid, await ask(calibration, candidate.adapter), epsilon=config.epsilon, delta=delta, **facts)
    arms = await _test_arms(candidate, gate, splits["test"], ask)
    return Evaluation(task_id=candidate.task.task_id, gate=gate, arms=arms, curve=tuple(coverage_curve(validation)))


async def _test_arms(candidate: Candidate, gate: Gate, test: list[Example], ask: Any) -> tuple[Arm, ...]:
    specialist = await ask(test, candidate.adapter)
    kept = [o for o in specialist if gate.is_open and o.confidence >= (gate.threshold or 1.0)]
    arms = [_arm("specialist", specialist, len(test)), _arm("specialist + gate", kept, len(test))]
    return (_arm(candidate.base_arm, await ask(test, None), len(test)), *arms)


def _arm(name: str, kept: list[Outcome], num_calls: int) -> Arm:
    wrong = sum(not outcome.agrees for outcome in kept)
    return Arm(
        name=name,
        num_calls=num_calls,
        coverage=len(kept) / num_calls if num_calls else 0.0,
        num_kept=len(kept),
        num_disagreements=wrong,
        disagreement=wrong / len(kept) if kept else None,
        interval=clopper_pearson_interval(wrong, len(kept)) if kept else (0.0, 1.0),
    )


async def _ask_all(
    candidate: Candidate,
    engine: Engine,
    adapter: str | None,
    examples: list[Example],
    max_in_flight: int,
    on_progress: Callable[[int], None],
) -> list[Outcome]:
    slots = asyncio.Semaphore(max_in_flight)
    done = 0

    async def one(example: Example) -> Outcome:
        nonlocal done
        async with slots:
            outcome = await _ask(candidate, engine, adapter, example)
        done += 1
        on_progress(done)
        return outcome

    return list(await asyncio.gather(*map(one, examples)))


async def _ask(candidate: Candidate, engine: Engine, adapter: str | None, example: Example) -> Outcome:
    """An answer that serving would not keep counts as confidence 0: it is escalated there."""
    try:
        answer = await engine.answer(adapter, candidate.prompt_format, example.request, candidate.max_answer_tokens)
    except (InputError, EngineError):
        return Outcome(confidence=0.0, agrees=False, session_id=example.session_id)
    kind = candidate.task.kind
    is_valid = answer.message is not None and answers.check(answer.message, kind, example.request) is None
    agrees = is_valid and answers.grade(answer.message, example.target, kind, example.request).agrees
    return Outcome(confidence=answer.confidence if is_valid else 0.0, agrees=agrees, session_id=example.session_id)
