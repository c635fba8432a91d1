"""The first LLM of the recipe asked in the middle of a run: a judge of free text, with its price on show and a bound on it.

Asks many questions at a time over one connection, unlike jobs/llm_node.py. What is asked is content and is logged nowhere.
Costs are those of the tokens that the LLM reports, or by estimate where it reports none; once they reach the bound nothing is
asked any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from cluster.access import load_pseudonym_key
from cluster.errors import UpstreamError
from cluster.judgements import Judgements
from cluster.judging import MAX_ANSWER_TOKENS, Judge
from cluster.prices import tokens_cost_usd
from cluster.records import Usage
from cluster.store import Store
from cluster.telemetry import log_event
from cluster.upstream import Upstream, UpstreamConfig
from jobs.llm_node import llm_node_of
from jobs.recipe import Recipe
from serving.billing import num_answer_tokens, num_prompt_tokens
from serving.openai_wire import usage_of
from training.evaluation import Candidate

_MAX_IN_FLIGHT = 16


JUDGE_SETTING, TEACHER_SETTING = "evaluation.text_grader=judge", "evaluation.teacher_repeats"


def check_llm(recipe: Recipe) -> None:
    """Tell before a run what would stop it at its end.

    Raises:
        ConfigError: an LLM is to judge or to be asked again, and the first one is no endpoint that names a model, or its key
            is not set.
    """
    if recipe.evaluation.text_grader == "judge":
        llm_node_of(recipe, JUDGE_SETTING, "judge answers")
    if recipe.evaluation.teacher_repeats:
        llm_node_of(recipe, f"{TEACHER_SETTING}={recipe.evaluation.teacher_repeats}", "ask again")


class PricedLLM:
    """One endpoint and what it has cost. Belongs to one event loop."""

    def __init__(self, config: UpstreamConfig, max_usd: float, setting: str) -> None:
        """
        Args:
            setting: what asked for it; logs say so.
        """
        self.config, self._max_usd, self._setting = config, max_usd, setting
        self._upstream = Upstream(config)
        self._slots = asyncio.Semaphore(_MAX_IN_FLIGHT)
        self.usd = 0.0
        self.num_asked = 0
        self.num_refused = 0
        """Questions that came after the money was spent."""

    async def complete(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """The assistant message; None where there is none, or the money is spent."""
        async with self._slots:
            if self.usd >= self._max_usd:
                self.num_refused += 1
                return None
            self.num_asked += 1
            try:
                reply = await self._upstream.chat({**body, "model": self.config.model})
            except UpstreamError as error:
                log_event("llm_node_failed", logging.WARNING, setting=self._setting, status=error.status)
                return None
        if reply.status != 200:
            return None
        self._charge(body, reply.body)
        choices = reply.body.get("choices")
        first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        message = first.get("message")
        return message if isinstance(message, dict) else None

    async def say(self, system: str, user: str) -> str | None:
        """The text that it answers."""
        messages = [{"role": role, "content": text} for role, text in (("system", system), ("user", user))]
        message = await self.complete({"messages": messages, "max_tokens": MAX_ANSWER_TOKENS, "temperature": 0})
        content = (message or {}).get("content")
        return content if isinstance(content, str) else None

    async def close(self) -> None:
        await self._upstream.close()

    def _charge(self, body: dict[str, Any], reply: dict[str, Any]) -> None:
        said = usage_of(reply)
        prompt, completion = said.prompt_tokens, said.completion_tokens
        # What an endpoint does not report is not free, else no bound would ever be reached.
        found = Usage(
            prompt_tokens=num_prompt_tokens(body) if prompt is None else prompt,
            completion_tokens=num_answer_tokens(reply) if completion is None else completion,
        )
        prices = {name: getattr(self.config, name) for name in ("prompt_usd_per_million", "completion_usd_per_million")}
        self.usd += tokens_cost_usd(found, **prices) or 0.0


@contextlib.asynccontextmanager
async def open_judge(
    recipe: Recipe, store: Store, candidates: Sequence[Candidate], say: Callable[[str], None]
) -> AsyncIterator[Judge | None]:
    """The judge of these candidates' free text, or None where none needs one; what it says is kept in the store.

    Raises:
        ConfigError: one is needed, and the first LLM is no endpoint that names a model, or its key is not set.
    """
    if not any(one.text_grader and one.text_grader.name == "judge" for one in candidates):
        yield None
        return
    config = llm_node_of(recipe, JUDGE_SETTING, "judge answers").config
    llm = PricedLLM(config, recipe.evaluation.judge_max_usd, JUDGE_SETTING)
    remembered = Judgements(store)
    judge = Judge(llm.say, remembered, load_pseudonym_key(store.uri), f"{config.model} at {config.base_url}")
    try:
        yield judge
    finally:
        await llm.close()
        remembered.save()
        say(
            f"judge: {llm.num_asked} questions, {llm.usd:.4f} USD; {judge.num_remembered} remembered, "
            f"{judge.num_contradictions} pairs contradicted by the other order, {judge.num_unjudged} without a verdict, "
            f"{llm.num_refused} not asked for evaluation.judge_max_usd={recipe.evaluation.judge_max_usd:g}"
        )
