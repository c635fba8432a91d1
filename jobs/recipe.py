"""Everything a conversion and its endpoint are configured by: one TOML recipe, one schema."""

from __future__ import annotations

import pathlib
import textwrap
from urllib.parse import unquote, urlsplit

from pydantic import Field, model_validator

from cluster.config import Config, describe_fields, load_config
from cluster.errors import ConfigError
from cluster.faces import FacesConfig
from cluster.prices import PriceConfig
from cluster.resources import LimitsConfig
from cluster.store import StoreAddress
from cluster.tracing import TelemetryConfig
from serving.audit import AuditConfig
from serving.capture import CaptureConfig
from serving.endpoint import ServeConfig
from serving.fallback import AnyLLMConfig
from serving.gateway_config import GatewayConfig
from serving.rollout import RolloutConfig
from serving.specialist_config import LORA_RANKS, SpecialistConfig
from serving.steward import StewardConfig
from training.canaries import CanaryConfig
from training.catalog import context_window, find_entry
from training.curate import CurateConfig
from training.discover import DiscoverConfig
from training.evaluation_config import EvaluationConfig
from training.finetune import FinetuneConfig
from training.fleet import FleetConfig
from training.gate import GateConfig
from training.methods import SERVABLE
from training.multi_finetune import reason_against
from training.refine import RefineConfig
from training.scratch import PretrainConfig
from training.selection import SelectConfig

RECIPES = pathlib.Path(__file__).parent / "recipes"
_JOB_FOLDERS = "/runtime_resources/working_dir_files/"
"""Where Ray unpacks what `ray job submit --working-dir` uploads."""


class Recipe(Config):
    """The whole product's configuration. The three dials that matter: `select.base`, `gate.epsilon`, `fleet.max_parallel`."""

    store: StoreAddress = "store"
    """Folder, s3:// or gs:// address of the artifact store."""
    work: str | None = None
    """Folder for datasets and checkpoints, which all nodes see; None takes STORE/work. A remote store has no such
    folder, so a conversion into one must name it."""
    upstream: tuple[AnyLLMConfig, ...] = Field(default=())
    """LLMs in order of preference, each an endpoint (base_url) or a model on the cluster (cluster_model); needed to
    serve, not to convert. Without any, `serve` takes OPENAI_BASE_URL."""
    capture: CaptureConfig = CaptureConfig()
    audit: AuditConfig = AuditConfig()
    faces: FacesConfig = FacesConfig()
    curate: CurateConfig = CurateConfig()
    discover: DiscoverConfig = DiscoverConfig()
    select: SelectConfig = SelectConfig()
    pretrain: PretrainConfig = PretrainConfig()
    """Training of a scratch base; unused with bases from a hub or a local path."""
    finetune: FinetuneConfig = FinetuneConfig()
    fleet: FleetConfig = FleetConfig()
    canaries: CanaryConfig = CanaryConfig()
    gate: GateConfig = GateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    specialists: SpecialistConfig = SpecialistConfig()
    gateway: GatewayConfig = GatewayConfig()
    rollout: RolloutConfig = RolloutConfig()
    steward: StewardConfig = StewardConfig()
    refine: RefineConfig = RefineConfig()
    serve: ServeConfig = ServeConfig()
    limits: LimitsConfig = LimitsConfig()
    prices: PriceConfig = PriceConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _check_plan(self) -> Recipe:
        if problems := [
            *_idle_bounds(self),
            *_endless_warmups(self),
            *_misfits_of_engine(self),
            *_uncertified_moves(self),
            *_mixed_adapters(self),
        ]:
            raise ValueError("\n".join(problems))
        return self


def load_recipe(words: list[str]) -> Recipe:
    """Resolve command-line words.

    Raises:
        ConfigError: unknown recipe or key, wrong type, value out of bounds, sections that contradict each other, or a
            store or work folder that would not outlive the job.
    """
    recipe = load_config(Recipe, words, RECIPES)
    store = _whole_path("store", recipe.store)
    work = recipe.work and _whole_path("work", recipe.work)
    if work and "://" in work:
        raise ConfigError(f"work={work!r}: allowed: a folder that all nodes see; next: work=/shared/work")
    if not work and "://" not in store:
        work = str(pathlib.Path(store) / "work")
    return recipe.model_copy(update={"store": store, "work": work})


def work_folder(recipe: Recipe) -> pathlib.Path:
    """Where a conversion keeps its datasets and checkpoints.

    Raises:
        ConfigError: the store is remote and the recipe names no folder.
    """
    if recipe.work is None and "://" in recipe.store:
        raise ConfigError(
            f"work: not given, and store={recipe.store!r} is remote, where workers cannot keep datasets and "
            "checkpoints; allowed: the whole path of a folder that all nodes see; next: work=/shared/work"
        )
    return pathlib.Path(recipe.store) / "work" if recipe.work is None else pathlib.Path(recipe.work)


def describe_recipe(sections: tuple[str, ...]) -> str:
    """The recipe's fields in these sections (`gate`) and of these keys (`gate.epsilon`) as text: key, type, bounds, default,
    and what it means."""
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    lines = [f"recipes: {recipes}, or a path ending in .toml", "fields (key=value):"]
    for key, kind, default, meaning in describe_fields(Recipe):
        if key.split(".")[0] in sections or key in sections:
            lines += [
                f"  {key}: {kind} = {default}",
                textwrap.fill(meaning, 110, initial_indent="      ", subsequent_indent="      "),
            ]
    return "\n".join(lines)


def _whole_path(field: str, place: str) -> str:
    """A folder or file:// address by its whole path, because workers run in other folders; other addresses as given.

    Raises:
        ConfigError: a file:// address of no path, or a folder that Ray removes with the job.
    """
    path = place
    if place.startswith("file://"):
        parts = urlsplit(place)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError(f"{field}={place!r}: allowed: file:///PATH, with the whole path; next: {field}=/PATH")
        path = unquote(parts.path)
    if "://" in path:
        return path
    path = str(pathlib.Path(path).expanduser().resolve())
    if _JOB_FOLDERS in path:
        others = ", s3://... or gs://..." if field == "store" else ""
        raise ConfigError(
            f"{field}={place!r}: lies in the submitted job's own folder, which Ray removes; allowed: the whole "
            f"path of a folder that all nodes share{others}; next: {field}=/shared/{field}"
        )
    return path


def _idle_bounds(recipe: Recipe) -> list[str]:
    """A bound on something that is not measured."""
    return [*_idle_extraction(recipe), *_idle_audit_budget(recipe)]


def _idle_audit_budget(recipe: Recipe) -> list[str]:
    priced = any(one.prompt_usd_per_million or one.completion_usd_per_million for one in recipe.upstream)
    if recipe.audit.max_usd_per_day is None or not recipe.upstream or priced:
        return []
    return [
        f"audit.max_usd_per_day={recipe.audit.max_usd_per_day:g}: nothing is spent at prices of 0; allowed: with the price of an "
        "LLM; next: upstream.0.prompt_usd_per_million=USD and upstream.0.completion_usd_per_million=USD"
    ]


def _idle_extraction(recipe: Recipe) -> list[str]:
    if recipe.canaries.max_extraction is None or recipe.canaries.num_per_task:
        return []
    return [
        f"canaries.max_extraction={recipe.canaries.max_extraction:g}: with canaries.num_per_task=0 no secret is planted to "
        "measure it by; allowed: 1 to 200 secrets; next: canaries.num_per_task=20"
    ]


def _endless_warmups(recipe: Recipe) -> list[str]:
    """Trainings that end before their learning rate is up."""
    return [
        f"{name}.warmup_steps={config.warmup_steps}: not below {name}.num_steps={config.num_steps}; allowed: fewer "
        f"steps of warm-up than steps; next: {name}.warmup_steps={config.num_steps // 10}"
        for name, config in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune))
        if config.warmup_steps >= config.num_steps
    ]


def _misfits_of_engine(recipe: Recipe) -> list[str]:
    """Adapters that the engine has no room for, and an engine for longer texts than its base takes."""
    problems = []
    method = recipe.finetune.method
    if method not in SERVABLE:
        problems.append(
            f"finetune.method={method!r}: the engine serves one base with many adapters, and takes no {method} ones; "
            f"allowed: {', '.join(SERVABLE)}; next: finetune.method=lora"
        )
    most = recipe.specialists.max_lora_rank
    ranks = [("finetune.lora_rank", recipe.finetune.lora_rank), *(("select.ranks", one) for one in recipe.select.ranks)]
    for name, rank in ranks:
        if rank > most:
            least = min((one for one in LORA_RANKS if one >= rank), default=max(LORA_RANKS))
            problems.append(
                f"{name}={rank}: above specialists.max_lora_rank={most}; allowed: at most that; "
                f"next: {name}={most}, or specialists.max_lora_rank={least}"
            )
    tokens, window = recipe.specialists.max_model_tokens, _window_of_base(recipe.select)
    if window is not None and tokens > window:
        problems.append(
            f"specialists.max_model_tokens={tokens}: select.base={recipe.select.base!r} has a window of {window} tokens; "
            f"allowed: at most that; next: specialists.max_model_tokens={window}, or another select.base"
        )
    return problems


def _uncertified_moves(recipe: Recipe) -> list[str]:
    """Calls that may move though no gate was measured on any like them. Keeping them and not moving them is sound: their
    answers may be learned from, and serving, like the gate, keeps none."""
    if not recipe.faces.move or recipe.curate.keep_faces_person:
        return []
    return [
        "faces.move=true: with curate.keep_faces_person=false no specialist is trained or certified on answers to a person; "
        "allowed: both true, or faces.move=false; next: curate.keep_faces_person=true"
    ]


def _mixed_adapters(recipe: Recipe) -> list[str]:
    """Fine-tunes that cannot share a run where they are to."""
    reason = reason_against(recipe.finetune)
    return [reason] if reason and recipe.fleet.mode == "multi_lora" else []


def _window_of_base(select: SelectConfig) -> int | None:
    """Of a fixed base of the catalog; of others it is known once they are opened."""
    if select.candidates or not select.base:
        return None
    try:
        entry = find_entry(select.base)
    except ConfigError:  # told when the base is needed: other verbs may run where its folder is not
        return None
    return entry and context_window(entry)
