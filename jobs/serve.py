"""A recipe -> the running endpoint: what `understudy serve` checks before Ray, and what it then runs.

The LLMs are the recipe's `upstream` (in TOML, or `upstream.0.base_url=URL` on the command line), else the one at
OPENAI_BASE_URL. Their keys stay in the environment; on a cluster that is the environment of its nodes, because the
gateway runs there.
"""

from __future__ import annotations

import functools
import os
import pathlib
import sys
from typing import Any
from urllib.parse import urlsplit

from cluster import registry
from cluster.access import KEYS_FILE, ApiKeys, keys_folder
from cluster.config import validate
from cluster.endpoint_key import authorization, is_loopback
from cluster.errors import ConfigError
from cluster.resources import Part
from cluster.session import joins_cluster, let_ingress_listen
from cluster.store import Store
from cluster.upstream import UpstreamConfig
from jobs.plan import connect_for
from jobs.recipe import Recipe
from serving.app import ServeArgs, build
from serving.cluster_llm import ClusterLLMConfig
from serving.endpoint import APP, HttpConfig, base_url, check_port, run_endpoint
from serving.working_set import WorkingSet, measure_working_set, size_specialists

BASE_URL_ENV = "OPENAI_BASE_URL"


def name_upstream(recipe: Recipe) -> Recipe:
    """The recipe with at least one LLM.

    Raises:
        ConfigError: it names none and the environment neither.
    """
    address = os.environ.get(BASE_URL_ENV)
    if not recipe.upstream and address:
        recipe = recipe.model_copy(update={"upstream": (validate(UpstreamConfig, {"base_url": address}),)})
    if not recipe.upstream:
        raise ConfigError(
            "upstream=(): an endpoint needs an LLM for the calls that no specialist answers; allowed: [[upstream]] "
            f"tables in the recipe, upstream.0.base_url=URL, or {BASE_URL_ENV} in the environment; "
            "next: understudy serve upstream.0.base_url=https://api.openai.com/v1"
        )
    return recipe


def resolve_upstream(recipe: Recipe) -> Recipe:
    """The recipe with at least one LLM, each of which this endpoint may ask.

    Raises:
        ConfigError: there is none, one is this endpoint itself, or a key is not set.
    """
    recipe = name_upstream(recipe)
    for number, upstream in enumerate(recipe.upstream):
        if not isinstance(upstream, UpstreamConfig):
            continue
        if _is_itself(upstream.base_url, recipe.serve.http):
            raise ConfigError(
                f"upstream.{number}.base_url={upstream.base_url!r}: is this endpoint itself "
                f"({base_url(recipe.serve.http)}); allowed: the address of an LLM"
            )
        if not joins_cluster():
            authorization(upstream)
    return recipe


def serve_args(recipe: Recipe, bases: tuple[str, ...] = ()) -> ServeArgs:
    """What the recipe says of the serving graph.

    Args:
        bases: base models to serve besides those of the current release.
    """
    return ServeArgs(
        store=recipe.store,
        upstream=list(recipe.upstream),
        bases=bases,
        gateway=recipe.gateway,
        capture=recipe.capture,
        audit=recipe.audit,
        faces=recipe.faces,
        specialists=recipe.specialists,
        steward=recipe.steward,
        prices=recipe.prices,
        rollout=recipe.rollout,
        telemetry=recipe.telemetry,
    )


def serve_config(recipe: Recipe) -> dict[str, Any]:
    """What `serve deploy FILE` takes and a RayService has in `serveConfigV2`, for the endpoint that `serve` would run.

    Fields that the recipe leaves at their defaults are left out; the secrets stay in the nodes' environment.
    """
    args = serve_args(recipe).model_dump(mode="json", exclude_defaults=True)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": recipe.serve.http.host, "port": recipe.serve.http.port},
        "applications": [
            {"name": APP, "route_prefix": "/", "import_path": f"{build.__module__}:{build.__name__}", "args": args}
        ],
    }


def count_bases(store_uri: str) -> int:
    """Models of the served release, bases and merged ones, each of which has its own engines; 0 where nothing is released.

    Creates no store.
    """
    if "://" not in store_uri and not pathlib.Path(store_uri).is_dir():
        return 0
    found = registry.current(Store(store_uri))
    return len(found[1].models()) if found else 0


def show_room(recipe: Recipe) -> dict[str, int]:
    """For how many adapters each engine will have room, and what that rests on. Creates no store."""
    is_there = "://" in recipe.store or pathlib.Path(recipe.store).is_dir()
    found = WorkingSet(0, 0, 0)
    if is_there:
        store = Store(recipe.store)
        current = registry.current(store)
        found = measure_working_set(store, current[1] if current else None)
    sized = size_specialists(recipe.specialists, found)
    return {
        "resident": sized.num_resident,
        "in_one_batch": sized.num_at_once,
        "of_release_on_one_base": found.num_adapters,
        "most_called_in_a_minute": found.num_called,
        "calls_looked_at": found.num_calls,
    }


def serve(recipe: Recipe, plan: list[Part]) -> None:
    """Run the endpoint until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: the port is taken, or the plan does not fit.
        ReleaseError: the graph did not start.
    """
    is_local = not joins_cluster()
    if is_local:
        check_port(recipe.serve.http)
        let_ingress_listen(recipe.serve.http.port)
    connect_for(plan, recipe)
    announce = functools.partial(_announce, recipe)
    run_endpoint(serve_args(recipe), recipe.serve.http, announce, has_proxy=not is_local)
    print("stopped; captured calls are in the store", file=sys.stderr)


def _announce(recipe: Recipe, url: str) -> None:
    found = registry.current(Store(recipe.store))
    served = f"release {found[0][:12]}: {len(found[1].specialists)} specialists" if found else "no release: LLM only"
    print(f"{served}; LLM: {', '.join(map(_place, recipe.upstream))}", file=sys.stderr)
    folder = keys_folder(recipe.store)
    if recipe.gateway.auth == "keys" and folder and not ApiKeys(folder / KEYS_FILE).holders():
        print(
            f"no API key exists; next: understudy keys create --role agent --client NAME store={recipe.store}",
            file=sys.stderr,
        )
    print(f"base_url: {url}", flush=True)


def _place(upstream: UpstreamConfig | ClusterLLMConfig) -> str:
    is_endpoint = isinstance(upstream, UpstreamConfig)
    return urlsplit(upstream.base_url).hostname or "" if is_endpoint else f"{upstream.model_name} on the cluster"


def _is_itself(url: str, http: HttpConfig) -> bool:
    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except ValueError as error:
        raise ConfigError(f"upstream base_url={url!r}: {error}; allowed: a port from 1 to 65535") from None
    return port == http.port and (is_loopback(url) or parts.hostname == http.host)
