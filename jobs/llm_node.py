"""The LLM node asked outside the request path: a system text and a user's -> its answer, for curation and for naming.

One question at a time, with the endpoint's own retries, timeouts and key. A question that is not answered comes back
empty; what was asked and answered is logged nowhere. Knows nothing of what answers are for.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from cluster.errors import ConfigError, UpstreamError
from cluster.judging import answer_text
from cluster.telemetry import log_event
from cluster.upstream import Upstream, UpstreamConfig
from jobs.recipe import Recipe


class LLMNode:
    """Asks one endpoint. Pickles by its config; every process connects by itself."""

    def __init__(self, config: UpstreamConfig, setting: str, purpose: str) -> None:
        """
        Args:
            setting: what asked for it, such as `discover.llm_naming`, with its value where that is not true; errors and logs
                say so.
            purpose: a verb for errors, such as "name tasks".

        Raises:
            ConfigError: the endpoint's entry names no model, or its key is not set.
        """
        if config.model is None:
            raise ConfigError(
                f"{as_word(setting)}: upstream.0 names no model to {purpose} with; next: upstream.0.model=NAME"
            )
        Upstream(config)
        self.config, self._setting = config, setting

    def ask(self, system: str, user: str, **options: Any) -> str:
        """The answer's text; empty where there was none.

        Args:
            options: of the chat.completions body, such as max_tokens.
        """
        return asyncio.run(self._ask([("system", system), ("user", user)], options))

    async def _ask(self, said: list[tuple[str, str]], options: dict[str, Any]) -> str:
        messages = [{"role": role, "content": text} for role, text in said]
        upstream = Upstream(self.config)
        try:
            reply = await upstream.chat({"model": self.config.model, "messages": messages, **options})
        except UpstreamError as error:
            log_event("llm_node_failed", logging.WARNING, setting=self._setting, status=error.status)
            return ""
        finally:
            await upstream.close()
        return answer_text(reply.body) if reply.status == 200 else ""


def as_word(setting: str) -> str:
    """A setting as it is given on a command line."""
    return setting if "=" in setting else f"{setting}=true"


def llm_node_of(recipe: Recipe, setting: str, purpose: str) -> LLMNode:
    """The recipe's first endpoint.

    Raises:
        ConfigError: there is none, it names no model, or its key is not set.
    """
    endpoint = next((one for one in recipe.upstream if isinstance(one, UpstreamConfig)), None)
    if endpoint is None:
        raise ConfigError(
            f"{as_word(setting)}: no LLM is named to {purpose} with; allowed: an endpoint in [[upstream]]; "
            f"next: upstream.0.base_url=URL upstream.0.model=NAME, or leave {setting.split('=')[0]} out"
        )
    return LLMNode(endpoint, setting, purpose)
