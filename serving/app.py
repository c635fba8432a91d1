"""The whole serving graph on one page: gateway -> specialists of every base model of the release -> LLMs.

    client -> Gateway (ingress) -> SpecialistServer, one deployment per base model
                                -> upstream[0], upstream[1], ... (not ours)

The bases are those of the release that CURRENT names at build time, and those that a release to come is certified on;
a release with another base needs another build. Everything else of a release is followed by the gateway itself.
Imports no engine until a base is served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from cluster import registry
from cluster.access import ApiKeys, Pseudonyms, keys_folder, load_pseudonym_key
from cluster.config import Config, validate
from cluster.errors import ConfigError
from cluster.store import Store
from cluster.telemetry import Meter, configure_logging
from cluster.upstream import UpstreamConfig
from serving.capture import Capture, CaptureConfig
from serving.fallback import FallbackLLM
from serving.gateway import GatewayConfig, GatewayCore, build_api
from serving.specialist import ServeEngine, SpecialistConfig, build_specialists
from serving.table import ServingTable

if TYPE_CHECKING:
    from ray import serve

KEYS_FILE = "api_keys.json"
"""Below `cluster.access.keys_folder`."""
_MAX_ONGOING_CALLS = 1_000


class ServeArgs(Config):
    """What is served, from where, and to whom."""

    store: str
    """Folder or object store with the releases; calls are captured into it."""
    upstream: list[UpstreamConfig] = Field(min_length=1)
    """The LLMs that answer what no specialist does, in the order in which they are asked."""
    bases: tuple[str, ...] = ()
    """Store paths of base models to serve besides those of the current release."""
    gateway: GatewayConfig = GatewayConfig()
    capture: CaptureConfig = CaptureConfig()
    specialists: SpecialistConfig = SpecialistConfig()


def build(args: ServeArgs | dict[str, Any]) -> serve.Application:
    """Bind the graph; `serve run serving.app:build store=...` and `serve.run(build(args))` deploy it.

    Raises:
        ConfigError: wrong arguments, a store that cannot be opened, or keys that cannot be found.
        ReleaseError: CURRENT names a release that cannot be read.
    """
    from ray import serve

    args = args if isinstance(args, ServeArgs) else validate(ServeArgs, args)
    store = Store(args.store)
    load_pseudonym_key(args.store)
    _api_keys(args)
    found = registry.current(store)
    bases = sorted({*args.bases, *(one.base for one in (found[1].specialists.values() if found else ()))})
    handles = {base: build_specialists(base, args.specialists, args.store) for base in bases}
    gateway = serve.deployment(
        # An ingress without an app: each replica builds its own from `__serve_build_asgi_app__`.
        serve.ingress()(Gateway),
        name="gateway",
        max_ongoing_requests=_MAX_ONGOING_CALLS,
        ray_actor_options={"num_cpus": 1},
        # Every call is captured; a second line about it would cost more than its routing.
        logging_config={"enable_access_log": False},
    )
    return gateway.bind(args.model_dump(mode="json"), handles)


class Gateway:
    """One gateway replica: its parts, and the HTTP application around them."""

    def __init__(self, args: dict[str, Any], handles: dict[str, Any]) -> None:
        configure_logging()
        config = validate(ServeArgs, args)
        store, meter = Store(config.store), Meter(export=True)
        engines = {base: ServeEngine(handle) for base, handle in handles.items()}
        self._core = GatewayCore(
            config.gateway,
            capture=Capture(store, config.capture, meter),
            fallback=FallbackLLM(config.upstream, meter),
            table=ServingTable(store, engines),
            engines=engines,
            pseudonyms=Pseudonyms(load_pseudonym_key(config.store)),
            api_keys=_api_keys(config),
            meter=meter,
        )

    def __serve_build_asgi_app__(self) -> Any:
        return build_api(self._core)


def _api_keys(args: ServeArgs) -> ApiKeys | None:
    if args.gateway.auth == "open":
        return None
    folder = keys_folder(args.store)
    if folder is None:
        raise ConfigError(
            f"gateway.auth='keys': store={args.store!r} is remote and has no key file beside it; "
            "allowed with it: gateway.auth=open, behind a proxy that authenticates"
        )
    return ApiKeys(folder / KEYS_FILE)
