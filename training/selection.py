"""S4: TaskSpec* -> base model: the one the recipe names, or the smallest candidate that a measured probe finds good enough.

`select.candidates` empty: `select.base` is a fixed, named choice and nothing is measured. Else every candidate is filtered
by the tasks' needs and the machine, opened (a hub id and a folder by the same code), and probed (training/probe.py);
the smallest whose score is within `select.tolerance` of the best is chosen. A candidate that does not fit or cannot be
fetched is recorded with its reason, never left out.

All specialists of a release are adapters on one base, because one engine serves them; so the choice and its record are
one per snapshot, tasks/selection-SNAPSHOT.json, with every score per task.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator

from cluster.engine import rendering_version
from cluster.errors import ConfigError, InputError
from cluster.records import Example, Record
from cluster.store import Store, content_hash
from training.bases import describe_base, open_base
from training.candidates import (
    BaseCandidate,
    Scope,
    estimated_p99,
    examine,
    measured_p99,
    missed_needs,
    tokenise_sample,
)
from training.catalog import Needs, ScratchModel, find_entry, load_catalog, num_parameters
from training.finetune import FinetuneConfig
from training.probe import Contender, ProbeConfig, ProbeResult, measure
from training.scratch import PretrainConfig

SCRATCH_ARM = "scratch base (has seen the tasks)"
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
) -> Selection:
    """Choose the base and write the choice to the store. Probes run on the connected Ray cluster.

    Raises:
        ConfigError: no base is named; a name is unknown; the fixed base misses a need of the whole base; no candidate is left.
        InputError: candidates are given and no task has examples to measure them on.
    """
    names = named_bases(config)
    needs = _needs_of(config, scope)
    path = f"tasks/selection-{snapshot}.json"
    if not config.candidates:
        selection = _fixed(names[0], needs, scope)
        store.write_json(path, selection.model_dump(mode="json"))
        return selection
    if not scope.tasks:
        raise InputError("select.candidates: no task has examples in every split, so none can be probed; capture more")
    entries = {name: find_entry(name) for name in names}
    examined = [examine(name, entry, needs, scope, config.probe_examples) for name, entry in entries.items()]
    contenders = [found for found in examined if isinstance(found, Contender)]
    out = [found for found in examined if isinstance(found, BaseCandidate)]
    if not contenders:
        raise ConfigError(_nothing_left(out))
    key = _key(config, scope, pretrain, finetune, contenders, out)
    if store.exists(path) and (stored := store.read_json(path))["key"] == key:
        return Selection.model_validate(stored)
    held_out = scope.by_split["validation"]
    num_scored = {task.task_id: min(len(held_out[task.task_id]), config.probe_examples) for task in scope.tasks}
    results = measure(contenders, config, pretrain, finetune, num_scored, work / f"probe-{key[:12]}")
    selection = decide(config, needs, [*out, *_record_results(contenders, results)], key)
    store.write_json(path, selection.model_dump(mode="json"))
    return selection


def decide(config: SelectConfig, needs: Needs, candidates: Sequence[BaseCandidate], key: str) -> Selection:
    """Choose among measured candidates and word the reasons of all, in the recipe's order.

    Raises:
        ConfigError: none could be measured, or none answered anything.
    """
    chosen = choose([one for one in candidates if one.status == "measured"], config.tolerance)
    if chosen is None:
        raise ConfigError(_nothing_left(candidates))
    best = max(one.rungs[-1].score for one in _finished(candidates))
    told = [_tell(one, chosen, best, config) for one in candidates]
    is_scratch = isinstance(find_entry(chosen.name), ScratchModel)
    return Selection(
        base=chosen.name,
        is_scratch=is_scratch,
        arm=SCRATCH_ARM if is_scratch else "untrained base",
        rule=f"the smallest whose score after {config.probe_steps} steps is within {config.tolerance:g} of the best",
        needs=needs,
        candidates=tuple(sorted(told, key=lambda one: config.candidates.index(one.name))),
        key=key,
    )


def choose(measured: Sequence[BaseCandidate], tolerance: float) -> BaseCandidate | None:
    """The smallest candidate within `tolerance` of the best, among those that halving let finish.

    Equal sizes: the better score, then the earlier one. None: no candidate, or no right answer from any of them, which
    tells nothing of which is better.
    """
    finished = _finished(measured)
    best = max((one.rungs[-1].score for one in finished), default=0.0)
    if best == 0.0:
        return None
    # Scores are fractions in binary: 0.9 - 0.02 must not exclude 0.88.
    reaching = [one for one in finished if one.rungs[-1].score >= best - tolerance - 1e-9]
    return min(reaching, key=lambda one: (one.parameters or 0, -one.rungs[-1].score))


def group_by_task(examples: list[Example], assignment: dict[str, str | None]) -> dict[str, list[Example]]:
    """Examples of each task; those of no task are left out."""
    grouped: dict[str, list[Example]] = {}
    for example in examples:
        task_id = assignment.get(example.example_id)
        if task_id is not None:
            grouped.setdefault(task_id, []).append(example)
    return grouped


def _needs_of(config: SelectConfig, scope: Scope) -> Needs:
    return Needs(
        p99_prompt_tokens=estimated_p99(scope, is_scratch=False),
        needs_tool_use=any(task.kind == "tool_call" for task in scope.tasks),
        allowed_licenses=config.allowed_licenses,
        memory_gib=min(config.memory_gib, scope.machine_gib * _MACHINE_SHARE),
        max_model_tokens=scope.max_model_tokens,
    )


def _fixed(name: str, needs: Needs, scope: Scope) -> Selection:
    """The recipe's base. Prompts it cannot take only cost their own tasks, so those are recorded and not refused."""
    entry = find_entry(name)
    is_scratch = isinstance(entry, ScratchModel)
    tokens, is_estimated = estimated_p99(scope, is_scratch=is_scratch), True
    if not is_scratch:
        opened = open_base(name)
        entry = entry or describe_base(opened)
        tokens, is_estimated = measured_p99(tokenise_sample(name, scope, opened.tokenizer, is_scratch=False)), False
    base_needs = needs.model_copy(update={"p99_prompt_tokens": 0, "needs_tool_use": False})
    if missed := missed_needs(entry, base_needs):
        raise ConfigError(
            f"select.base={name!r}: {missed}; allowed: a base that fits, or other select.allowed_licenses, "
            f"select.memory_gib, specialists.max_model_tokens"
        )
    missed = missed_needs(entry, needs.model_copy(update={"p99_prompt_tokens": tokens}))
    candidate = BaseCandidate(
        name=name,
        status="chosen",
        reason="named by the recipe; nothing was measured" + (f"; misses: {missed}" if missed else ""),
        parameters=num_parameters(entry),
        p99_prompt_tokens=tokens,
        is_p99_estimated=is_estimated,
    )
    return Selection(
        base=name,
        is_scratch=is_scratch,
        arm=SCRATCH_ARM if is_scratch else "untrained base",
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
    configs = [one.model_dump(mode="json") for one in (config, pretrain, finetune, *out, *scope.tasks)]
    rows = {one.name: [[data.train, data.validation] for data in one.data.values()] for one in contenders}
    return content_hash([configs, rows, rendering_version()])


def _record_results(contenders: Sequence[Contender], results: Mapping[str, ProbeResult]) -> list[BaseCandidate]:
    return [
        BaseCandidate(
            name=contender.name,
            status="measured" if results[contender.name].error is None else "unavailable",
            reason=results[contender.name].error or "",
            parameters=num_parameters(contender.entry),
            p99_prompt_tokens=contender.p99_prompt_tokens,
            rungs=results[contender.name].rungs,
        )
        for contender in contenders
    ]


def _finished(candidates: Sequence[BaseCandidate]) -> list[BaseCandidate]:
    """Those that were measured at the last rung that anyone reached."""
    measured = [one for one in candidates if one.status == "measured" and one.rungs]
    last = max((one.rungs[-1].num_steps for one in measured), default=0)
    return [one for one in measured if one.rungs[-1].num_steps == last]


def _tell(one: BaseCandidate, chosen: BaseCandidate, best: float, config: SelectConfig) -> BaseCandidate:
    """Word what a measured candidate's scores mean; the others have their reasons."""
    if one.status != "measured":
        return one
    last = one.rungs[-1]
    found = f"score {last.score:.3f} after {last.num_steps} steps"
    if one.name == chosen.name:
        reason = f"{found}; the smallest within {config.tolerance:g} of the best, {best:.3f}"
        return one.model_copy(update={"status": "chosen", "reason": reason})
    if last.num_steps < chosen.rungs[-1].num_steps:
        reason = f"{found}; stopped there, behind the others"
    elif last.score >= best - config.tolerance - 1e-9:
        reason = f"{found}; good enough, but not smaller than the chosen one"
    else:
        reason = f"{found}; more than {config.tolerance:g} below the best, {best:.3f}"
    return one.model_copy(update={"reason": reason})


def _nothing_left(candidates: Sequence[BaseCandidate]) -> str:
    silent = [one.name for one in candidates if one.status == "measured"]
    lines = [f"  {one.name}: {one.status}: {one.reason}" for one in candidates if one.status != "measured"]
    lines += [f"  {name}: measured: not one validation example answered as the reference" for name in silent]
    step = "raise select.probe_steps, or name" if silent else "give other select.candidates, or name"
    return "\n".join(["select.candidates: none can be chosen", *lines, f"next: {step} a fixed select.base"])
