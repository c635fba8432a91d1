"""Everything a conversion and its endpoint are configured by: one TOML recipe, one schema."""

from __future__ import annotations

import pathlib
import textwrap

from pydantic import Field

from cluster.config import Config, describe_fields, load_config
from cluster.errors import ConfigError
from cluster.prices import PriceConfig
from cluster.resources import LimitsConfig
from serving.audit import AuditConfig
from serving.capture import CaptureConfig
from serving.endpoint import ServeConfig
from serving.fallback import AnyLLMConfig
from serving.gateway import GatewayConfig
from serving.specialist import SpecialistConfig
from training.curate import CurateConfig
from training.discover import DiscoverConfig
from training.finetune import FinetuneConfig
from training.fleet import FleetConfig
from training.gate import GateConfig
from training.scratch import PretrainConfig
from training.selection import SelectConfig

RECIPES = pathlib.Path(__file__).parent / "recipes"
_JOB_FOLDERS = "/runtime_resources/working_dir_files/"
"""Where Ray unpacks what `ray job submit --working-dir` uploads."""


class Recipe(Config):
    """The whole product's configuration. The three dials that matter: `select.base`, `gate.epsilon`, `fleet.max_parallel`."""

    store: str = "store"
    """Folder, s3:// or gs:// address of the artifact store."""
    upstream: tuple[AnyLLMConfig, ...] = Field(default=())
    """LLMs in order of preference, each an endpoint (base_url) or a model on the cluster (cluster_model); needed to
    serve, not to convert. Without any, `serve` takes OPENAI_BASE_URL."""
    capture: CaptureConfig = CaptureConfig()
    audit: AuditConfig = AuditConfig()
    curate: CurateConfig = CurateConfig()
    discover: DiscoverConfig = DiscoverConfig()
    select: SelectConfig = SelectConfig()
    pretrain: PretrainConfig = PretrainConfig()
    """Training of a scratch base; unused with bases from a hub or a local path."""
    finetune: FinetuneConfig = FinetuneConfig()
    fleet: FleetConfig = FleetConfig()
    gate: GateConfig = GateConfig()
    specialists: SpecialistConfig = SpecialistConfig()
    gateway: GatewayConfig = GatewayConfig()
    serve: ServeConfig = ServeConfig()
    limits: LimitsConfig = LimitsConfig()
    prices: PriceConfig = PriceConfig()


def load_recipe(words: list[str]) -> Recipe:
    """Resolve command-line words.

    Raises:
        ConfigError: unknown recipe or key, wrong type, value out of bounds, or a store that would not outlive the job.
    """
    recipe = load_config(Recipe, words, RECIPES)
    if "://" in recipe.store:
        return recipe
    # Workers run in other folders than the driver, so a local store is named by its whole path.
    store = str(pathlib.Path(recipe.store).expanduser().resolve())
    if _JOB_FOLDERS in store:
        raise ConfigError(
            f"store={recipe.store!r}: lies in the submitted job's own folder, which Ray removes; allowed: the whole "
            "path of a folder that all nodes share, s3://... or gs://...; next: store=/shared/store"
        )
    return recipe.model_copy(update={"store": store})


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
