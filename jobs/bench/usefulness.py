"""How often one specialist of each discovered task agrees with the reference on validation, and whether parts do better.

Tasks are found without labels in snips, clinc150, banking77 and nlupp, each file alone. For each task one specialist is
trained from scratch at a small budget ("scratch base (has seen the tasks)": scratch-tiny, so many steps), and one for
each of two parts of its topics, alike; all answer the same validation calls, token for token as the gold. The numbers
compare one with two specialists at this budget; what a pretrained base would reach they do not tell.

    python -m jobs.bench.usefulness [--quick]
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from cluster.access import Pseudonyms
from cluster.errors import InputError, TrainingError
from cluster.records import AgentCall, Example
from training.candidates import Scope, examine
from training.catalog import Needs, find_entry
from training.discover import DiscoverConfig, discover
from training.finetune import FinetuneConfig
from training.formats import LogReader
from training.partition import propose_partitions
from training.probe import Contender, Measuring, ProbeConfig, spread
from training.scratch import PretrainConfig
from training.selection import group_by_task
from training.split_probe import SplitMeasurement, SplitTrial, measure_splits
from training.splits import SplitConfig, split_of
from training.usefulness import describe_comparison

SETS = ("snips", "clinc150", "banking77", "nlupp")
BASE = "scratch-tiny"
_STEPS, _QUICK_STEPS = 160, 8
_MAX_TRAIN, _MAX_VALIDATION = 1500, 200
_MIN_PART = 50
"""Train examples of a part, below which a specialist of its own is not tried."""
_MAX_CLUSTERED = 1500
_WINDOW = 1024
_PRETRAIN = PretrainConfig(num_steps=_STEPS, batch_size=16, learning_rate=3e-3)
_PUBLIC_KEY = b"usefulness benchmark: public data"


def measure_usefulness(
    say: Callable[[str], object], paths: Sequence[pathlib.Path] = (), quick: bool = False
) -> dict[str, Any]:
    """Measure on the connected Ray cluster.

    Args:
        paths: call logs; empty takes the four sets of the shared data.
        quick: the first file alone, few steps: shows that it runs, and measures nothing.

    Returns:
        {tasks_validation_agreement: {SET: {task: share of validation calls}}, tasks_in_parts: {SET: {task: comparison in
        words}}, tasks_agreement_base: what they were measured on}; a task is its name and the start of its id.

    Raises:
        InputError: the shared data is not there.
        TrainingError: a probe failed.
    """
    steps = _QUICK_STEPS if quick else _STEPS
    files = list(paths or shared_sets())[: 1 if quick else None]
    found = [(path.name.split(".")[0], trial) for path in files for trial in load_trials(path)]
    with tempfile.TemporaryDirectory() as folder:
        config = ProbeConfig(probe_steps=steps)
        finetune = FinetuneConfig(cpus_per_worker=1.0)
        measuring = Measuring(config, _PRETRAIN, finetune, {}, 0.05, pathlib.Path(folder))
        results = measure_splits([trial for _, trial in found], measuring, _WINDOW * 3 // 4)
    agreement: dict[str, dict[str, float]] = {}
    in_parts: dict[str, dict[str, str]] = {}
    for (source, trial), result in zip(found, results, strict=True):
        if result.joint is None:
            raise TrainingError(f"usefulness benchmark: {source}: {result.error}")
        name = f"{trial.task.name} ({trial.task.task_id[:10]})"
        agreement.setdefault(source, {})[name] = result.joint
        in_parts.setdefault(source, {})[name] = _tell(result)
        say(f"usefulness {source}: {name}: agreement {result.joint:.3f}; {_tell(result)}")
    base = f"{BASE}, scratch base (has seen the tasks), {steps} steps"
    return {"tasks_validation_agreement": agreement, "tasks_in_parts": in_parts, "tasks_agreement_base": base}


def shared_sets() -> list[pathlib.Path]:
    """Raises InputError where one of the four sets is missing."""
    default = pathlib.Path(__file__).parents[2] / "../shared/data"
    folder = pathlib.Path(os.environ.get("UNDERSTUDY_DATA", default)) / "nlu"
    paths = [folder / f"{name}.calls.jsonl.gz" for name in SETS]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise InputError(f"{missing[0]}: no such file; next: set UNDERSTUDY_DATA to the folder that holds nlu/")
    return paths


def load_trials(path: pathlib.Path) -> list[SplitTrial]:
    """The tasks of one file that have examples to learn from and to be asked, each with its cut into two parts."""
    examples = [
        _example(call) for call in LogReader(Pseudonyms(_PUBLIC_KEY), 0.0).read(path) if isinstance(call, AgentCall)
    ]
    by_split = {split: [e for e in examples if e.split == split] for split in ("train", "validation")}
    config = DiscoverConfig(max_parts=2, max_clustered=_MAX_CLUSTERED)
    discovery = discover(by_split, config)
    train, validation = (group_by_task(by_split[split], discovery.assignment) for split in ("train", "validation"))
    trials = []
    for task in discovery.tasks:
        task_id = task.task_id
        if not (train.get(task_id) and validation.get(task_id)):
            continue
        own = {"train": {task_id: spread(train[task_id], _MAX_TRAIN)}, "validation": validation}
        scope = Scope([task], own, _WINDOW, _WINDOW * 3 // 4, machine_gib=4.0)
        needs = Needs(
            p99_prompt_tokens=0, needs_tool_use=False, allowed_licenses=None, memory_gib=1.0, max_model_tokens=_WINDOW
        )
        base = examine(BASE, find_entry(BASE), needs, scope, num_validation=1)
        assert isinstance(base, Contender), base
        group = next(g for g in discovery.grouping.groups if discovery.ids[g.key] == task_id)
        found = [] if group.topics else propose_partitions(group, config, _can_be_tried)
        cuts = [{e.example_id: n for n, part in enumerate(parts) for e in part.examples} for _, parts in found]
        asked = spread(validation[task_id], _MAX_VALIDATION)
        trials.append(SplitTrial(task, own["train"][task_id], asked, cuts, base))
    return trials


def _can_be_tried(examples: list[Example]) -> bool:
    return sum(e.split == "train" for e in examples) >= _MIN_PART and any(e.split == "validation" for e in examples)


def _example(call: AgentCall) -> Example:
    return Example(
        example_id=call.call_id,
        split=split_of(call.session_id, SplitConfig()),
        session_id=call.session_id,
        ts=call.ts,
        request=call.request,
        target=call.message or {},
        reference="gold",
        source_call_ids=(call.call_id,),
    )


def _tell(result: SplitMeasurement) -> str:
    if not result.compared:
        return "no topics to split by"
    verb = "better apart" if result.chosen is not None else "kept together"
    return f"{verb}: {'; '.join(map(describe_comparison, result.compared))}"


def main() -> int:
    """Run by hand; prints one line a task and the numbers as JSON."""
    from cluster.session import connect

    connect()
    try:
        found = measure_usefulness(lambda line: print(line, file=sys.stderr), quick="--quick" in sys.argv)
    except (InputError, TrainingError) as error:
        print(f"usefulness: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
