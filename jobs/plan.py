"""A recipe -> what its job will ask the cluster for, phase by phase, before anything is started.

The numbers are those that the stages themselves give to Ray: training/finetune.py (workers), serving/specialist.py
(one CPU or GPU for each engine replica), serving/cluster_llm.py (the CPUs or GPUs of a cluster LLM), serving/app.py
(one CPU for each gateway replica).
"""

from __future__ import annotations

from typing import Any

from cluster.resources import THIS_MACHINE, LimitsConfig, Part, check_fits, local_nodes
from cluster.session import cluster_nodes, connect, joins_cluster
from cluster.store import Store
from jobs.judge import check_llm
from jobs.recipe import Recipe, work_folder
from jobs.teacher import plan_teacher
from serving.cluster_llm import ClusterLLMConfig
from training.catalog import ScratchModel, find_entry
from training.finetune import FinetuneConfig
from training.selection import named_bases


def plan_conversion(recipe: Recipe) -> list[Part]:
    """Base training, then the fine-tunes, then the engine that answers the held-out calls.

    Raises:
        ConfigError: no base is named, it is unknown, a remote store stands without a work folder, or an LLM is to judge or to
            be asked again and none is named or its key is not set.
    """
    work_folder(recipe)
    check_llm(recipe)
    base = _least(_training(recipe.pretrain, "base training", "pretrain"), recipe.pretrain)
    names = named_bases(recipe.select)
    parts = [base] if any(isinstance(find_entry(name), ScratchModel) for name in names) else []
    fleet = plan_run(recipe.finetune)
    fields = {**fleet.fields, "groups": "fleet.max_parallel"}
    # Without a number, as many run at a time as fit; one must.
    some = fleet.model_copy(update={"groups": recipe.fleet.max_parallel or 1, "fields": fields})
    parts.append(_least(some, recipe.finetune))
    return [*parts, _engines(recipe, "validation engine", "validate", num_bases=1)]


def plan_run(config: FinetuneConfig) -> Part:
    """One fine-tune of a fleet."""
    return _training(config, "fine-tunes", "finetune")


def _least(part: Part, config: FinetuneConfig) -> Part:
    """What must be there for a training that may go on with fewer workers."""
    if config.min_workers is None:
        return part
    section = part.fields["workers"].split(".")[0]
    return part.model_copy(
        update={"workers": config.min_workers, "fields": {**part.fields, "workers": f"{section}.min_workers"}}
    )


def plan_serving(recipe: Recipe, num_bases: int) -> list[Part]:
    """The gateway and the fewest replicas that answer, for every base model of the release."""
    groups = recipe.gateway.min_replicas
    gateway = Part(name="gateway", phase="serve", groups=groups, cpus=1, fields={"groups": "gateway.min_replicas"})
    engines = [_engines(recipe, "specialists", "serve", num_bases)] if num_bases else []
    llms = [(n, one) for n, one in enumerate(recipe.upstream) if isinstance(one, ClusterLLMConfig)]
    return [gateway, *engines, *(_cluster_llm(config, f"upstream.{number}") for number, config in llms)]


def check_here(parts: list[Part], recipe: Recipe) -> None:
    """Check a plan against this machine where it is what Ray will be started on.

    Raises:
        ConfigError: a part could never start.
    """
    if not joins_cluster():
        check_fits(parts, local_nodes(), LimitsConfig(), THIS_MACHINE)


def connect_for(parts: list[Part], recipe: Recipe) -> None:
    """Connect to Ray, once the plan fits.

    Raises:
        ConfigError: a part could never start here or on the cluster, or no cluster answers.
    """
    check_here(parts, recipe)
    connect()
    # Looked at again on this machine too: Ray counts a container's share, which may be less than the machine.
    where, limits = ("the cluster", recipe.limits) if joins_cluster() else (THIS_MACHINE, LimitsConfig())
    check_fits(parts, cluster_nodes(), limits, where)


def show_plan(recipe: Recipe, parts: list[Part]) -> dict[str, Any]:
    """What --dry-run prints: the resolved recipe and the plan, as JSON values."""
    rows = [
        {**part.model_dump(exclude={"fields"}), "total_cpus": part.total_cpus, "total_gpus": part.total_gpus}
        for part in parts
    ]
    found = {"config": recipe.model_dump(mode="json"), "resources": rows}
    return found | (
        {"teacher": plan_teacher(recipe, Store(recipe.store, is_made=False))}
        if recipe.evaluation.teacher_repeats
        else {}
    )


def _training(config: FinetuneConfig, name: str, section: str) -> Part:
    fields = {kind: f"{section}.{kind}_per_worker" for kind in ("cpus", "gpus")}
    return Part(
        name=name,
        phase=section,
        workers=config.num_workers,
        cpus=config.cpus_per_worker,
        gpus=config.gpus_per_worker,
        fields={**fields, "workers": f"{section}.num_workers"},
    )


def _cluster_llm(config: ClusterLLMConfig, section: str) -> Part:
    is_gpu = config.device == "gpu"
    return Part(
        name=f"LLM {config.model_name}",
        phase="serve",
        groups=max(1, config.min_replicas),
        workers=config.num_gpus if is_gpu else 1,
        cpus=0 if is_gpu else config.num_threads,
        gpus=1 if is_gpu else 0,
        fields={
            "groups": f"{section}.min_replicas",
            "workers": f"{section}.num_gpus",
            "cpus": f"{section}.num_threads",
            "gpus": f"{section}.device",
        },
    )


def _engines(recipe: Recipe, name: str, phase: str, num_bases: int) -> Part:
    is_gpu = recipe.specialists.device == "gpu"
    return Part(
        name=name,
        phase=phase,
        groups=max(1, recipe.specialists.min_replicas),
        workers=num_bases,
        cpus=0 if is_gpu else 1,
        gpus=1 if is_gpu else 0,
        fields={"groups": "specialists.min_replicas", "gpus": "specialists.device"},
    )
