"""The LLM node: whether each endpoint answers its model list and takes the key. Asks no model, so it spends nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from cluster.endpoint_key import authorization, without_query
from cluster.errors import ConfigError, UpstreamError
from cluster.upstream import Upstream, UpstreamConfig
from jobs.doctor.check import Check, Reporter
from jobs.recipe import Recipe
from jobs.serve import name_upstream
from serving.cluster_llm import ClusterLLMConfig

_TIMEOUT_S = 10.0
_MAX_NAMED = 3
_say = Reporter("LLM")


def check_llm(recipe: Recipe) -> Iterator[Check]:
    """Ask every endpoint of the recipe, or that of OPENAI_BASE_URL."""
    try:
        upstreams = name_upstream(recipe).upstream
    except ConfigError:
        advice = "upstream.0.base_url=URL, or OPENAI_BASE_URL; only `serve` needs one"
        yield _say.warning("upstream", "none is named", advice)
        return
    for number, upstream in enumerate(upstreams):
        name = f"upstream.{number}"
        if isinstance(upstream, ClusterLLMConfig):
            yield _cluster_llm(name, upstream)
        else:
            yield _endpoint(name, upstream)


def _cluster_llm(name: str, config: ClusterLLMConfig) -> Check:
    place = config.cluster_model
    if place.startswith(("/", "./", "~")) and not os.path.isdir(os.path.expanduser(place)):
        return _say.warning(name, f"{place} is no folder here", f"{name}.cluster_model=/PATH that every node can read")
    return _say.ok(name, f"{config.model_name} is started by `serve`, on the cluster")


def _endpoint(name: str, config: UpstreamConfig) -> Check:
    shown = without_query(config.base_url)
    try:
        has_key = bool(authorization(config))
        models = asyncio.run(_list_models(config))
    except ConfigError:
        return _say.failed(name, f"{shown}: {config.api_key_env} is not set", f"export {config.api_key_env}=...")
    except UpstreamError as error:
        found, sign, advice = error.message.partition("; ")
        # Some servers speak chat completions and list no models.
        is_there = "answered 404" in found or "answered 405" in found
        make = _say.warning if is_there else _say.failed
        return make(name, found, advice if sign else "see that the LLM is up and that base_url ends with the version")
    key = "with the key" if has_key else "without a key"
    found = f"{urlsplit(shown).netloc} lists {len(models)} models {key}"
    if config.model and models and config.model not in models:
        some = ", ".join(sorted(models)[:_MAX_NAMED])
        return _say.warning(name, f"{found}, and not {config.model}", f"{name}.model= one of them, such as {some}")
    return _say.ok(name, found)


async def _list_models(config: UpstreamConfig) -> set[str]:
    upstream = Upstream(config.model_copy(update={"timeout_s": min(config.timeout_s, _TIMEOUT_S)}))
    try:
        return {str(entry.get("id")) for entry in await upstream.list_models()}
    finally:
        await upstream.close()
