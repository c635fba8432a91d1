"""Share of calls moved against total cost, and the volume from which a task pays (`understudy scale economy`).

Pure arithmetic on prices of the recipe and on numbers that were measured elsewhere and are given by `--given NAME=VALUE`:
nothing is trained or asked. A call that is moved costs replica time whether its answer is kept or not; one that is not kept,
or is audited, is paid to the LLM too. Replica time is paid by the hour: at utilisation u an answer costs 1/u of what it
costs at full load. Training costs the same at any volume, and some replicas are paid though nobody calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.prices import tokens_cost_usd
from cluster.records import Record, Usage
from jobs.recipe import Recipe
from jobs.scale.charts import Axes, Dot, draw_groups, draw_lines
from jobs.scale.laboratory import Laboratory
from jobs.scale.report import Findings

_HOURS_A_MONTH = 730.0
_UTILISATIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SHARES = tuple(k / 10 for k in range(11))
_FACTOR = 2.0
"""By which each number is made larger and smaller in the sensitivity table."""


class GivenConfig(Config):
    """What an economy is made of beside the recipe's prices; every default is an assumption, and the report says so."""

    calls_per_month: float = Field(default=1e6, gt=0)
    """Of all tasks together."""
    num_tasks: int = Field(default=10, ge=1)
    """Tasks with a specialist, of like volume; their adapters share the replicas."""
    prompt_tokens: int = Field(default=800, ge=0)
    """Of a call, as the LLM counts them."""
    completion_tokens: int = Field(default=60, ge=0)
    """Of an answer."""
    calls_per_s: float = Field(default=5.0, gt=0)
    """Answers a second of one replica at full load; `understudy scale serve` measures it."""
    kept: float = Field(default=0.5, ge=0, le=1)
    """Share of the calls asked of a specialist whose answer is kept: its certified coverage, `understudy scale data`."""
    utilisation: float = Field(default=0.3, gt=0, le=1)
    """Share of the replicas' paid time that answers calls, at which break-even volumes are told."""
    training_hours: float = Field(default=0.5, ge=0)
    """Replica-priced hours of training one specialist, its share of the base's included."""
    trainings_per_month: float = Field(default=1.0, ge=0)
    """How often each specialist is trained anew."""
    min_replicas: float = Field(default=1.0, ge=0)
    """Replicas that are kept up, and paid, whether calls come or not; more are paid as calls come."""


class Prices(Record):
    """US dollars."""

    llm_call: float
    replica_hour: float
    audit_share: float


class Cost(Record):
    """US dollars a month."""

    llm: float
    """Calls that stay, are not kept, or are audited."""
    replicas: float
    training: float

    @property
    def total(self) -> float:
        return self.llm + self.replicas + self.training


def prices_of(recipe: Recipe, given: GivenConfig) -> Prices:
    """What the recipe says an LLM's answer and a replica cost.

    Raises:
        ConfigError: one of them is not said; 0 would make one side free.
    """
    llm = recipe.upstream[0] if recipe.upstream else None
    tokens = (getattr(llm, "prompt_usd_per_million", 0.0), getattr(llm, "completion_usd_per_million", 0.0))
    if not any(tokens):
        raise ConfigError(
            "upstream.0.prompt_usd_per_million=0, upstream.0.completion_usd_per_million=0: without the LLM's prices nothing can "
            "be compared; allowed: above 0; next: upstream.0.base_url=URL upstream.0.prompt_usd_per_million=USD "
            "upstream.0.completion_usd_per_million=USD"
        )
    if not recipe.prices.replica_usd_per_hour:
        raise ConfigError(
            "prices.replica_usd_per_hour=0: specialists would be free; allowed: above 0; next: prices.replica_usd_per_hour=USD"
        )
    usage = Usage(prompt_tokens=given.prompt_tokens, completion_tokens=given.completion_tokens)
    call = tokens_cost_usd(usage, prompt_usd_per_million=tokens[0], completion_usd_per_million=tokens[1])
    assert call is not None
    return Prices(llm_call=call, replica_hour=recipe.prices.replica_usd_per_hour, audit_share=recipe.audit.share)


def replica_usd_per_call(prices: Prices, given: GivenConfig, utilisation: float) -> float:
    """Of one call asked of a specialist."""
    return prices.replica_hour / (3600 * given.calls_per_s * utilisation)


def saved_usd_per_call(prices: Prices, given: GivenConfig) -> float:
    """LLM's money that a moved call saves."""
    return prices.llm_call * given.kept * (1 - prices.audit_share)


def training_usd_per_month(prices: Prices, given: GivenConfig) -> float:
    """Of all tasks' specialists."""
    return prices.replica_hour * given.num_tasks * given.trainings_per_month * given.training_hours


def idle_usd_per_month(prices: Prices, given: GivenConfig) -> float:
    """Of the replicas that are kept up without a call."""
    return prices.replica_hour * given.min_replicas * _HOURS_A_MONTH


def cost_of(prices: Prices, given: GivenConfig, moved: float, utilisation: float) -> Cost:
    """A month's cost where a share `moved` of the calls is asked of specialists.

    Example:
        >>> cost_of(Prices(llm_call=0.01, replica_hour=1, audit_share=0), GivenConfig(), 0.0, 1.0).total
        10000.0
    """
    calls = moved * given.calls_per_month
    busy = calls * replica_usd_per_call(prices, given, utilisation)
    return Cost(
        llm=prices.llm_call * given.calls_per_month - calls * saved_usd_per_call(prices, given),
        replicas=max(busy, idle_usd_per_month(prices, given)) if moved else 0.0,
        training=training_usd_per_month(prices, given) if moved else 0.0,
    )


def break_even_calls(prices: Prices, given: GivenConfig, utilisation: float) -> float | None:
    """Calls a month of each of the tasks from which moving all of them pays; None: never.

    Both must be saved: training with the replicas that are up anyway, and training with replica time by the call.
    """
    saved, spent = saved_usd_per_call(prices, given), replica_usd_per_call(prices, given, utilisation)
    if saved <= spent:
        return None
    training, idle = training_usd_per_month(prices, given), idle_usd_per_month(prices, given)
    return max((training + idle) / saved, training / (saved - spent)) / given.num_tasks


def run(lab: Laboratory, given: GivenConfig) -> Findings:
    """Compute everything; the same at every size."""
    prices = prices_of(lab.recipe, given)
    alone = cost_of(prices, given, 0.0, 1.0).total
    records = [
        {"moved": moved, "utilisation": u, "volume": given.calls_per_month, **cost.model_dump(), "total": cost.total}
        for u in _UTILISATIONS
        for moved in _SHARES
        for cost in [cost_of(prices, given, moved, u)]
    ]
    rows = [
        [
            f"{u:.0%}",
            round(1000 * replica_usd_per_call(prices, given, u), 6),
            round(cost_of(prices, given, 1.0, u).total / alone, 4),
            _calls(break_even_calls(prices, given, u)),
        ]
        for u in _UTILISATIONS
    ]
    swings = sensitivity(prices, given)
    return Findings(
        sentence=_sentence(prices, given, alone),
        head=[
            "utilisation",
            "replica USD per 1,000 calls",
            "cost with all calls moved / LLM alone",
            "break-even calls a task and month",
        ],
        rows=rows,
        laws={
            "prices": prices.model_dump(),
            "given": given.model_dump(),
            "break_even_utilisation": _least_utilisation(prices, given),
            "sensitivity": swings,
        },
        records=records,
        pictures=[_draw_cost(records, alone), _draw_break_even(prices, given), _draw_sensitivity(swings)],
        notes=_notes(given),
    )


def sensitivity(prices: Prices, given: GivenConfig) -> dict[str, dict[str, float | None]]:
    """Name of a number -> break-even volume of a task with half of it and with twice as much."""
    found = {}
    for name in ("calls_per_s", "kept", "utilisation", "training_hours", "min_replicas", "num_tasks"):
        most = 1.0 if name in ("kept", "utilisation") else math.inf
        own: dict[str, float | None] = {}
        for label, factor in (("half", 1 / _FACTOR), ("double", _FACTOR)):
            value = min(most, getattr(given, name) * factor)
            changed = given.model_copy(update={name: max(1, round(value)) if name == "num_tasks" else value})
            own[label] = break_even_calls(prices, changed, changed.utilisation)
        found[name] = own
    for name in ("llm_call", "replica_hour"):
        found[name] = {
            label: break_even_calls(
                prices.model_copy(update={name: getattr(prices, name) * factor}), given, given.utilisation
            )
            for label, factor in (("half", 1 / _FACTOR), ("double", _FACTOR))
        }
    return found


def _least_utilisation(prices: Prices, given: GivenConfig) -> float | None:
    """Below which no volume pays; None: not even full load does."""
    saved = saved_usd_per_call(prices, given)
    least = replica_usd_per_call(prices, given, 1.0) / saved if saved else math.inf
    return least if least <= 1 else None


def _busy_share(given: GivenConfig) -> float:
    """Share of their time that the replicas kept up answer, if all calls are moved and no more replicas are paid."""
    there_is = 3600 * _HOURS_A_MONTH * given.min_replicas * given.calls_per_s
    return min(1.0, given.calls_per_month / there_is) if there_is else 1.0


def _calls(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}"


def _draw_cost(records: Sequence[Mapping[str, Any]], alone: float) -> str:
    # At 0 nothing is paid but the LLM; a line from there to the first point would hide that the first call pays what is fixed.
    series = {
        f"utilisation {u:.0%}": [
            Dot(100 * r["moved"], r["total"] / alone) for r in records if r["utilisation"] == u and r["moved"]
        ]
        for u in (0.05, 0.1, 0.2, 0.5, 1.0)
    }
    axes = Axes("share of calls asked of specialists, %", "cost of a month / LLM alone")
    caption = (
        "Total cost by the share of calls moved; training and the replicas kept up are paid from the first call on."
    )
    return draw_lines(series, axes, caption, levels={"LLM alone": 1.0})


def _draw_break_even(prices: Prices, given: GivenConfig) -> str:
    series = {}
    for kept in (0.25, 0.5, 0.75, 1.0):
        found = [(u, break_even_calls(prices, given.model_copy(update={"kept": kept}), u)) for u in _UTILISATIONS]
        dots = [Dot(100 * u, calls) for u, calls in found if calls is not None]
        if dots:
            series[f"{kept:.0%} kept"] = dots
    axes = Axes("utilisation, %", "calls a task and month", is_y_log=True)
    caption = (
        "Volume from which a task pays, by utilisation and by the share of answers kept; what never pays is not drawn."
    )
    return draw_lines(series, axes, caption) if series else "<p>At these prices no task pays at any volume.</p>"


def _draw_sensitivity(swings: Mapping[str, Mapping[str, float | None]]) -> str:
    labels = {"half": "half as much", "double": "twice as much"}
    series = {
        label: {name: Dot(0, value) for name, own in swings.items() if (value := own[key]) is not None}
        for key, label in labels.items()
    }
    series = {label: dots for label, dots in series.items() if dots}
    caption = "What the break-even volume hangs on: each number halved and doubled. A missing point never pays."
    return draw_groups(series, "break-even calls a task and month", caption, is_log=True) if series else ""


def _sentence(prices: Prices, given: GivenConfig, alone: float) -> str:
    cost = cost_of(prices, given, 1.0, given.utilisation)
    least = _least_utilisation(prices, given)
    volume = break_even_calls(prices, given, given.utilisation)
    if least is None:
        return (
            f"At these prices no volume pays: an answer of a specialist costs {1000 * replica_usd_per_call(prices, given, 1.0):.3g} USD per "
            f"1,000 calls at full load, and saves {1000 * prices.llm_call * given.kept:.3g} USD."
        )
    busy = _busy_share(given)
    kept_up = f"; the replicas kept up are busy {busy:.1%} of their time with that" if busy < given.utilisation else ""
    pays = f"a task pays from {volume:,.0f} calls a month on" if volume is not None else "no volume of a task pays"
    return (
        f"At {given.utilisation:.0%} utilisation {pays}, and all {given.calls_per_month:,.0f} calls moved cost "
        f"{cost.total / alone:.2f} of the LLM alone{kept_up}; below {least:.1%} utilisation no volume pays."
    )


def _notes(given: GivenConfig) -> list[str]:
    told = sorted(given.model_fields_set)
    assumed = sorted(set(GivenConfig.model_fields) - set(told))
    return [
        f"Given: {', '.join(f'{name}={getattr(given, name):g}' for name in told) or 'nothing'}.",
        f"Assumed, give your own with --given NAME=VALUE: {', '.join(f'{name}={getattr(given, name):g}' for name in assumed) or 'nothing'}.",
        "Prices are the recipe's: upstream.0 for the LLM, prices.replica_usd_per_hour for replicas and training, audit.share for audits.",
        "Break-even: every task has so many calls a month, and all are moved; replicas are paid by the call at the utilisation, at least "
        "those that are kept up.",
    ]
