"""S4: TaskSpec* -> base model: the one the recipe names, or the smallest candidate that a measured probe finds good enough.

`select.candidates` empty: `select.base` is a fixed, named choice and nothing is measured. Else every candidate is filtered
by the tasks' needs and the machine, opened (a hub id and a folder by the same code), and probed (training/probe.py);
the smallest that reaches `select.target` is chosen, or that is within `select.tolerance` of the best where none does or no
target is given. A candidate that does not fit or cannot be fetched is recorded with its reason, never left out. What the
measurement will spend is said before it, and what the full training will reach before that (training/forecast.py).

All specialists of a release are adapters on one base, because one engine serves them; so the choice and its record are
one per snapshot, tasks/selection-SNAPSHOT.json, with every score per task.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pydantic import Field, model_validator

from cluster.engine import rendering_version
from cluster.errors import ConfigError, InputError
from cluster.records import Example, Record
from cluster.store import Store, content_hash
from training.bases import describe_base, open_base
from training.candidates import (
    BaseCandidate,
    FewShot,
    ProbeRun,
    Scope,
    estimated_p99,
    examine,
    measured_p99,
    missed_needs,
    tokenise_sample,
)
from training.catalog import Needs, ScratchModel, find_entry, load_catalog, num_parameters
from training.finetune import FinetuneConfig
from training.forecast import Forecast, describe, forecast
from training.probe import (
    Contender,
    Measuring,
    ProbeConfig,
    ProbePlan,
    ProbeResult,
    describe_budget,
    measure,
    plan_curve,
    plan_probes,
)
from training.scratch import PretrainConfig

_ROUNDING = 1e-9
"""Scores are fractions in binary: 0.9 - 0.02 must not exclude 0.88."""
SCRATCH_ARM, UNTRAINED_ARM = "scratch base (has seen the tasks)", "untrained base"
_MACHINE_SHARE = 1 / 3
"""Of the machine's memory, for bf16 weights: a fine-tune holds them in float32, twice that, beside its activations."""


class SelectConfig(ProbeConfig):
    """Which base model the specialists grow on."""

    base: str | None = Field(default=None, min_length=1)
    """Catalog name, hub id or local folder; a fixed choice. `scratch-*` is trained from scratch on the train split.
    A conversion needs it or `candidates`; nothing is taken by default."""
    candidates: tuple[str, ...] = ()
    """Catalog names, hub ids and local folders to choose from by a measured probe; empty takes `base` as it is."""
    allowed_licenses: tuple[str, ...] | None = None
    """Licences a hub model may have; None allows all."""
    memory_gib: float = Field(default=20.0, gt=0)
    """Memory for the base's weights in bf16; less where the machine has less."""

    @model_validator(mode="after")
    def _check_candidates(self) -> SelectConfig:
        if repeated := sorted({name for name in self.candidates if self.candidates.count(name) > 1}):
            raise ValueError(f"candidates must differ; repeated: {', '.join(repeated)}")
        return self


class Selection(Record):
    """The base of a conversion, how it was chosen, and what became of every other candidate."""

    base: str
    is_scratch: bool
    arm: str
    """How reports call the base's own answers."""
    rule: str
    needs: Needs
    """With the prompt length estimated; each candidate has its own."""
    candidates: tuple[BaseCandidate, ...]
    key: str
    """Hash of all that was measured: the same selection is not measured twice."""
    lora_rank: int | None = None
    """Of the chosen probe; None keeps finetune.lora_rank."""
    num_examples: int | None = None
    """Fewest train examples per task that were probed and found good enough."""
    budget: str = ""
    """What the measurement was to spend."""
    forecast: Forecast | None = None
    """None: nothing was measured, or at one size alone."""


def named_bases(config: SelectConfig) -> tuple[str, ...]:
    """The bases that the recipe lets a conversion grow on: the candidates, or the fixed one.

    Raises:
        ConfigError: it names none.
    """
    if names := config.candidates or ((config.base,) if config.base else ()):
        return names
    known = ", ".join(entry.name for entry in load_catalog().entries)
    raise ConfigError(
        f"select.base: not given, and select.candidates neither; allowed: a catalog name ({known}), a hub id ORG/NAME "
        "or a local folder with config.json; next: select.base=NAME, or recipe=local for scratch-small, which is "
        "trained from scratch on the captured traffic"
    )


def select_base(
    store: Store,
    snapshot: str,
    config: SelectConfig,
    scope: Scope,
    pretrain: PretrainConfig,
    finetune: FinetuneConfig,
    work: pathlib.Path,
    say: Callable[[str], object] = lambda line: None,
) -> Selection:
    """Choose the base and write the choice to the store. Probes run on the connected Ray cluster.

    Args:
        say: told the budget before it is spent and the forecast after.

    Raises:
        ConfigError: no base is named; a name is unknown; the fixed base misses a need of the whole base; no candidate is left.
        InputError: candidates are given and no task has examples to measure them on.
    """
    names = named_bases(config)
    needs = needs_of(config, scope)
    path = f"tasks/selection-{snapshot}.json"
    if not config.candidates:
        selection = _fixed(names[0], needs, scope)
        store.write_json(path, selection.model_dump(mode="json"))
        return selection
    if not scope.tasks:
        raise InputError("select.candidates: no task has examples in every split, so none can be probed; capture more")
    entries = {name: find_entry(name) for name in names}
    examined = [
        examine(name, entry, needs, scope, config.probe_examples, config.shots) for name, entry in entries.items()
    ]
    contenders = [found for found in examined if isinstance(found, Contender)]
    out = [found for found in examined if isinstance(found, BaseCandidate)]
    if not contenders:
        raise ConfigError(_nothing_left(out))
    key = _key(config, scope, pretrain, finetune, contenders, out)
    if store.exists(path) and (stored := store.read_json(path))["key"] == key:
        return Selection.model_validate(stored)
    held_out = scope.by_split["validation"]
    num_scored = {task.task_id: min(len(held_out[task.task_id]), config.probe_examples) for task in scope.tasks}
    folder = work / f"probe-{key[:12]}"
    measuring = Measuring(config, pretrain, finetune, num_scored, scope.epsilon, folder)
    selection = _measure_and_decide(measuring, needs, scope, contenders, out, key, say)
    store.write_json(path, selection.model_dump(mode="json"))
    return selection


def _measure_and_decide(
    measuring: Measuring,
    needs: Needs,
    scope: Scope,
    contenders: Sequence[Contender],
    out: Sequence[BaseCandidate],
    key: str,
    say: Callable[[str], object],
) -> Selection:
    plans = plan_probes(contenders, measuring)
    budget = describe_budget(plans, measuring)
    say(f"select: {budget}")
    results = measure(plans, measuring)
    selection = decide(measuring.config, needs, [*out, *record_results(plans, results)], key)
    chosen = next(p for p in plans if _is_of(p, selection) and p.num_examples == selection.num_examples)
    missing = plan_curve(plans, results, chosen)
    again = measure(missing, measuring, halving=False) if missing else []
    finished = {plan.num_examples: result for plan, result in zip(missing, again, strict=True)}
    probes = [
        _probe_run(plan, finished.get(plan.num_examples, result))
        for plan, result in zip(plans, results, strict=True)
        if _is_of(plan, selection)
    ]
    training = measuring.training_of(chosen.contender)
    found = forecast(probes, scope, measuring.num_scored, training.num_steps)
    if found:
        say(f"select {selection.base}: {describe(found)}")
    return selection.model_copy(update={"budget": budget, "forecast": found})


class Choice(NamedTuple):
    """The chosen candidate and what made it good enough."""

    candidate: BaseCandidate
    threshold: float
    """Lowest score that was good enough."""
    rule: str


def decide(config: SelectConfig, needs: Needs, candidates: Sequence[BaseCandidate], key: str) -> Selection:
    """Choose among measured candidates and word the reasons of all, in the recipe's order.

    Raises:
        ConfigError: none could be measured, or none answered anything.
    """
    choice = choose([one for one in candidates if one.status == "measured"], config.tolerance, config.target)
    if choice is None:
        raise ConfigError(_nothing_left(candidates))
    chosen = choice.candidate
    told = [_tell(one, choice) for one in candidates]
    is_scratch = isinstance(find_entry(chosen.name), ScratchModel)
    probe = _least_probe(chosen, choice.threshold)
    return Selection(
        base=chosen.name,
        is_scratch=is_scratch,
        arm=SCRATCH_ARM if is_scratch else UNTRAINED_ARM,
        rule=f"after {config.probe_steps} steps: {choice.rule}",
        needs=needs,
        candidates=tuple(sorted(told, key=lambda one: config.candidates.index(one.name))),
        key=key,
        lora_rank=probe and probe.lora_rank,
        num_examples=probe and probe.num_examples,
    )


def choose(measured: Sequence[BaseCandidate], tolerance: float, target: float | None = None) -> Choice | None:
    """The smallest candidate that reaches `target`, else that is within `tolerance` of the best.

    Only those that halving let finish take part. Equal sizes: the better score, then the earlier one. None: no
    candidate, or no right answer from any of them, which tells nothing of which is better.
    """
    finished = _finished(measured)
    best = max((one.rungs[-1].score for one in finished), default=0.0)
    if best == 0.0:
        return None
    is_reached = target is not None and best >= target - _ROUNDING
    threshold = target if target is not None and is_reached else best - tolerance
    reaching = [one for one in finished if one.rungs[-1].score >= threshold - _ROUNDING]
    chosen = min(reaching, key=lambda one: (one.parameters or 0, -one.rungs[-1].score))
    rule = f"the smallest within {tolerance:g} of the best, {best:.3f}"
    if is_reached:
        rule = f"the smallest that reaches the target {target:g}"
    elif target is not None:
        rule = f"{rule}, because none reaches the target {target:g}"
    return Choice(chosen, threshold, rule)


def group_by_task(examples: list[Example], assignment: dict[str, str | None]) -> dict[str, list[Example]]:
    """Examples of each task; those of no task are left out."""
    grouped: dict[str, list[Example]] = {}
    for example in examples:
        task_id = assignment.get(example.example_id)
        if task_id is not None:
            grouped.setdefault(task_id, []).append(example)
    return grouped


def needs_of(config: SelectConfig, scope: Scope) -> Needs:
    """What the tasks need of a base, with the prompt length estimated."""
    return Needs(
        **estimated_p99(scope, is_scratch=False),
        needs_tool_use=any(task.kind == "tool_call" for task in scope.tasks),
        allowed_licenses=config.allowed_licenses,
        memory_gib=min(config.memory_gib, scope.machine_gib * _MACHINE_SHARE),
        max_model_tokens=scope.max_model_tokens,
    )


def _fixed(name: str, needs: Needs, scope: Scope) -> Selection:
    """The recipe's base. Prompts it cannot take only cost their own tasks, so those are recorded and not refused."""
    entry = find_entry(name)
    is_scratch = isinstance(entry, ScratchModel)
    lengths, is_estimated = estimated_p99(scope, is_scratch=is_scratch), True
    if not is_scratch:
        opened = open_base(name)
        entry = entry or describe_base(opened)
        lengths, is_estimated = measured_p99(tokenise_sample(name, scope, opened.tokenizer, is_scratch=False)), False
    base_needs = needs.model_copy(update={**dict.fromkeys(lengths, 0), "needs_tool_use": False})
    if missed := missed_needs(entry, base_needs):
        raise ConfigError(
            f"select.base={name!r}: {missed}; allowed: a base that fits, or other select.allowed_licenses, "
            f"select.memory_gib, specialists.max_model_tokens"
        )
    missed = missed_needs(entry, needs.model_copy(update=lengths))
    candidate = BaseCandidate(
        name=name,
        status="chosen",
        reason="named by the recipe; nothing was measured" + (f"; misses: {missed}" if missed else ""),
        parameters=num_parameters(entry),
        **lengths,
        is_p99_estimated=is_estimated,
    )
    return Selection(
        base=name,
        is_scratch=is_scratch,
        arm=SCRATCH_ARM if is_scratch else UNTRAINED_ARM,
        rule="select.base, because select.candidates is empty",
        needs=needs,
        candidates=(candidate,),
        key=content_hash([name, needs.model_dump(mode="json")]),
    )


def _key(
    config: SelectConfig,
    scope: Scope,
    pretrain: PretrainConfig,
    finetune: FinetuneConfig,
    contenders: Sequence[Contender],
    out: Sequence[BaseCandidate],
) -> str:
    """Names a measurement by all that shapes it, the candidates that could not take part among it."""
    configs = [one.model_dump(mode="json") for one in (config, pretrain, finetune, *out)]
    rows = {
        one.name: [*([data.train, data.validation] for data in one.data.values()), dict(one.few_shot)]
        for one in contenders
    }
    return content_hash([configs, [task.facts() for task in scope.tasks], rows, rendering_version(), scope.epsilon])


def record_results(plans: Sequence[ProbePlan], results: Sequence[ProbeResult]) -> list[BaseCandidate]:
    """One candidate for each base: measured where any of its probes was."""
    records = []
    for contender in {plan.contender.name: plan.contender for plan in plans}.values():
        own = [(p, r) for p, r in zip(plans, results, strict=True) if p.contender.name == contender.name]
        probes = tuple(_probe_run(plan, result) for plan, result in own)
        good = [probe for probe in probes if probe.error is None and probe.rungs]
        best = max(good, key=lambda probe: (probe.rungs[-1].num_steps, probe.rungs[-1].score), default=None)
        scores = next((result.few_shot for _, result in own if result.few_shot), None)
        few_shot = scores and FewShot(
            score=sum(scores.values()) / len(scores), task_scores=scores, num_shots=dict(contender.num_shots)
        )
        records.append(
            BaseCandidate(
                name=contender.name,
                status="measured" if best else "unavailable",
                reason="" if best else next((probe.error for probe in probes if probe.error), "probe measured nothing"),
                parameters=num_parameters(contender.entry),
                p99_prompt_tokens=contender.p99_prompt_tokens,
                p99_call_tokens=contender.p99_call_tokens,
                rungs=best.rungs if best else (),
                probes=probes,
                few_shot=few_shot or None,
            )
        )
    return records


def _probe_run(plan: ProbePlan, result: ProbeResult) -> ProbeRun:
    return ProbeRun(lora_rank=plan.lora_rank, num_examples=plan.num_examples, rungs=result.rungs, error=result.error)


def _is_of(plan: ProbePlan, selection: Selection) -> bool:
    return plan.contender.name == selection.base and plan.lora_rank == selection.lora_rank


def _least_probe(chosen: BaseCandidate, threshold: float) -> ProbeRun | None:
    """The chosen candidate's cheapest good probe: lowest rank, then fewest examples. None: its probes are not told apart."""
    last = chosen.rungs[-1].num_steps
    finished = [probe for probe in chosen.probes if probe.rungs and probe.rungs[-1].num_steps == last]
    good = [probe for probe in finished if probe.rungs[-1].score >= threshold - _ROUNDING]
    return min(good, key=lambda probe: (probe.lora_rank or 0, probe.num_examples), default=None)


def _finished(candidates: Sequence[BaseCandidate]) -> list[BaseCandidate]:
    """Those that were measured at the last rung that anyone reached."""
    measured = [one for one in candidates if one.status == "measured" and one.rungs]
    last = max((one.rungs[-1].num_steps for one in measured), default=0)
    return [one for one in measured if one.rungs[-1].num_steps == last]


def _tell(one: BaseCandidate, choice: Choice) -> BaseCandidate:
    """Word what a measured candidate's scores mean; the others have their reasons."""
    if one.status != "measured":
        return one
    last = one.rungs[-1]
    found = f"score {last.score:.3f} after {last.num_steps} steps"
    if one.name == choice.candidate.name:
        return one.model_copy(update={"status": "chosen", "reason": f"{found}; {choice.rule}"})
    if last.num_steps < choice.candidate.rungs[-1].num_steps:
        reason = f"{found}; stopped there, behind the others"
    elif last.score >= choice.threshold - _ROUNDING:
        reason = f"{found}; good enough, but not smaller than the chosen one"
    else:
        reason = f"{found}; below {choice.threshold:.3f}, which is needed"
    return one.model_copy(update={"reason": reason})


def _nothing_left(candidates: Sequence[BaseCandidate]) -> str:
    silent = [one.name for one in candidates if one.status == "measured"]
    lines = [f"  {one.name}: {one.status}: {one.reason}" for one in candidates if one.status != "measured"]
    lines += [f"  {name}: measured: not one validation example answered as the reference" for name in silent]
    step = "raise select.probe_steps, or name" if silent else "give other select.candidates, or name"
    return "\n".join(["select.candidates: none can be chosen", *lines, f"next: {step} a fixed select.base"])
