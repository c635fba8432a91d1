"""Everything a conversion and its endpoint are configured by: one TOML recipe, one schema."""

from __future__ import annotations

import pathlib

from pydantic import Field

from cluster.config import Config, load_config
from cluster.prices import PriceConfig
from serving.audit import AuditConfig
from serving.capture import CaptureConfig
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


class Recipe(Config):
    """The whole product's configuration. The three dials that matter: `select.base`, `gate.epsilon`, `fleet.max_parallel`."""

    store: str = "store"
    """Folder, s3:// or gs:// address of the artifact store."""
    upstream: tuple[AnyLLMConfig, ...] = Field(default=())
    """LLMs in order of preference, each an endpoint or a model on the cluster; needed to serve, not to convert."""
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
    prices: PriceConfig = PriceConfig()


def load_recipe(words: list[str]) -> Recipe:
    """Resolve command-line words.

    Raises:
        ConfigError: unknown recipe or key, wrong type, value out of bounds.
    """
    recipe = load_config(Recipe, words, RECIPES)
    if "://" in recipe.store:
        return recipe
    # Workers run in other folders than the driver, so a local store is named by its whole path.
    return recipe.model_copy(update={"store": str(pathlib.Path(recipe.store).expanduser().resolve())})
