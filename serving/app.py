"""The whole serving graph on one page: gateway -> specialists of every base model of the release -> LLMs.

    client -> Gateway (ingress) -> SpecialistServer, one deployment per base model
                                -> upstream[0], upstream[1], ...: an endpoint (not ours), or a ClusterLLMServer
    what gateways captured -> Steward, one replica -> CURRENT -> gateways
                              its engine keeper: CURRENT -> engines beside the graph (serving/late_engines.py)

The graph's own engines are those of the release that CURRENT names at build time, and of `bases`; models that a later release
brings have theirs beside it. Imports no engine until a base is served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cluster import registry
from cluster.access import KEYS_FILE, ApiKeys, Pseudonyms, keys_folder, load_pseudonym_key
from cluster.config import Config, validate
from cluster.errors import ConfigError
from cluster.faces import FacesConfig
from cluster.prices import PriceConfig
from cluster.raw_upstream import RawUpstream
from cluster.records import Release
from cluster.session import let_ingress_listen_again, listen_on_node_alone, on_replica_stop
from cluster.store import Store
from cluster.telemetry import Meter, configure_logging
from cluster.tracing import TelemetryConfig, start_tracing
from cluster.upstream import Upstream, UpstreamConfig
from serving.api import build_api
from serving.audit import AuditConfig, Auditor
from serving.capture import Capture, CaptureConfig, journal_folder
from serving.cluster_llm import ClusterLLM, build_cluster_llm
from serving.engine_search import EngineSearch
from serving.fallback import AnyLLMConfig, FallbackLLM
from serving.feedback import FeedbackBox
from serving.gateway import GatewayCore
from serving.gateway_config import GatewayConfig
from serving.late_engines import engine_app
from serving.passthrough import PassThrough
from serving.rollout import RolloutConfig
from serving.scaling import STOP_MARGIN_S, autoscaling_of
from serving.specialist import ServeEngine, build_specialists, find_engine, idle_s_of
from serving.specialist_config import SpecialistConfig
from serving.steward import StewardConfig
from serving.steward_replica import build_steward
from serving.table import ServingTable, crowded_base
from serving.traces import traced_engine, traced_llm
from serving.working_set import measure_working_set, size_specialists

if TYPE_CHECKING:
    from ray import serve

_SHARE_TO_TURN_AWAY = 0.25
"""Of max_ongoing: what Serve gives a replica beyond it, for the replica to turn away in OpenAI's words."""


class ServeArgs(Config):
    """What is served, from where, and to whom."""

    store: str
    """Folder or object store with the releases; calls are captured into it."""
    upstream: list[AnyLLMConfig] = Field(min_length=1)
    """The LLMs that answer what no specialist does, in the order in which they are asked."""
    bases: tuple[str, ...] = ()
    """Store paths of base models to serve besides those of the current release, so that their engines are up before a
    release names them."""
    gateway: GatewayConfig = GatewayConfig()
    capture: CaptureConfig = CaptureConfig()
    audit: AuditConfig = AuditConfig()
    faces: FacesConfig = FacesConfig()
    specialists: SpecialistConfig = SpecialistConfig()
    steward: StewardConfig = StewardConfig()
    prices: PriceConfig = PriceConfig()
    rollout: RolloutConfig = RolloutConfig()
    """The shares of a stage that a person promotes to on the page."""
    telemetry: TelemetryConfig = TelemetryConfig()


def build(args: ServeArgs | dict[str, Any]) -> serve.Application:
    """Bind the graph; `serve run serving.app:build store=...` and `serve.run(build(args))` deploy it.

    Raises:
        ConfigError: wrong arguments, a store that cannot be opened, keys that cannot be found, no place for a journal, or
            a release with more adapters on one base model than an engine has room for.
        ReleaseError: CURRENT names a release that cannot be read.
    """
    args = args if isinstance(args, ServeArgs) else validate(ServeArgs, args)
    store = Store(args.store)
    load_pseudonym_key(args.store)
    # Told now, not by the first call that cannot be stored.
    store.content_keys.new_data_key()
    _api_keys(args)
    journal_folder(args.capture, args.store)
    found = registry.current(store)
    release = found[1] if found else None
    bases = sorted({*args.bases, *(release.models() if release else ())})
    specialists = size_specialists(args.specialists, measure_working_set(store, release))
    if release:
        _check_room(release, specialists.num_resident)
    args = args.model_copy(update={"specialists": specialists})

    served = (args.specialists, args.store, args.telemetry)
    handles = {base: build_specialists(base, *served, serves_release=True) for base in bases}
    llms = {
        number: build_cluster_llm(config)
        for number, config in enumerate(args.upstream)
        if not isinstance(config, UpstreamConfig)
    }
    return bind_gateway(args, handles, llms)


def bind_gateway(args: ServeArgs, handles: Mapping[str, Any], llms: Mapping[int, Any]) -> serve.Application:
    """Bind the gateway to its engines, by base model, and to the cluster's LLMs, by their number in `upstream`."""
    from ray import serve

    gateway = serve.deployment(
        # An ingress without an app: each replica builds its own from `__serve_build_asgi_app__`.
        serve.ingress()(Gateway),
        name="gateway",
        autoscaling_config=autoscaling_of(args.gateway, args.gateway.max_ongoing),
        max_ongoing_requests=math.ceil(args.gateway.max_ongoing * (1 + _SHARE_TO_TURN_AWAY)),
        max_queued_requests=args.gateway.max_ongoing,
        backpressure_config={"status_code": 503, "retry_after_s": 1.0},
        graceful_shutdown_timeout_s=args.gateway.drain_timeout_s + STOP_MARGIN_S,
        # An update starts the new replica before it stops the old one; it costs a CPU for that long, and no GPU.
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 1},
        # Every call is captured; a second line about it would cost more than its routing.
        logging_config={"enable_access_log": False},
    )
    steward = build_steward(args.store, args.steward, args.specialists, args.telemetry, handles)
    return gateway.bind(args.model_dump(mode="json"), dict(handles), dict(llms), steward)


class Gateway:
    """One gateway replica: its parts, and the HTTP application around them."""

    def __init__(
        self, args: dict[str, Any], handles: dict[str, Any], llm_handles: dict[int, Any], steward_handle: Any
    ) -> None:
        """Take handles of the specialists by base model, and of the cluster's LLMs by their number in `upstream`. The
        steward's is never called: Serve deploys what an ingress holds a handle of."""
        configure_logging()
        let_ingress_listen_again()
        listen_on_node_alone()
        config = validate(ServeArgs, args)
        start_tracing(config.telemetry, "understudy-gateway")
        store, meter = Store(config.store), Meter(export=True)
        idle_s = idle_s_of(config.specialists)
        engines = {base: traced_engine(ServeEngine(handle, idle_s)) for base, handle in handles.items()}
        search = EngineSearch(
            engines, lambda model: traced_engine(find_engine(engine_app(config.store, model), model, idle_s))
        )
        llms = [
            traced_llm(Upstream(one) if isinstance(one, UpstreamConfig) else ClusterLLM(one, llm_handles[number]))
            for number, one in enumerate(config.upstream)
        ]
        capture = Capture(store, config.capture, meter, store.content_keys)
        fallback = FallbackLLM(llms, meter)
        pseudonyms = Pseudonyms(load_pseudonym_key(config.store))
        endpoint = next((one for one in config.upstream if isinstance(one, UpstreamConfig)), None)
        raw = RawUpstream(endpoint) if endpoint else None
        self._core = GatewayCore(
            config.gateway,
            capture=capture,
            fallback=fallback,
            auditor=Auditor(config.audit, fallback, capture, pseudonyms, meter),
            table=ServingTable(store, engines, config.specialists.num_resident, search),
            engines=engines,
            pseudonyms=pseudonyms,
            api_keys=_api_keys(config),
            prices=config.prices,
            passthrough=PassThrough(raw, config.gateway.passthrough, meter, fallback.spending),
            feedback=FeedbackBox(store, pseudonyms, meter),
            faces=config.faces,
            rollout=config.rollout,
            meter=meter,
        )
        on_replica_stop(self._core.drain.begin)

    def __serve_build_asgi_app__(self) -> Any:
        return build_api(self._core)


def _check_room(release: Release, max_adapters: int) -> None:
    crowded = crowded_base(release.specialists.values(), max_adapters)
    if crowded:
        raise ConfigError(
            f"specialists.max_adapters={max_adapters}: the release has {crowded[1]} adapters on base {crowded[0]}, and all "
            f"are kept resident; allowed: at least {crowded[1]}, and {2 * crowded[1]} to swap in another release like it; "
            f"next: specialists.max_adapters={2 * crowded[1]}"
        )


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
