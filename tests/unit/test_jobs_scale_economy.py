"""What moving calls costs: the arithmetic against a month counted out by hand, and its ends."""

from __future__ import annotations

import json
import pathlib

import pytest
from hypothesis import given as given_that
from hypothesis import strategies as st

from jobs.__main__ import main
from jobs.scale.economy import GivenConfig, Prices, break_even_calls, cost_of, sensitivity

PRICES = Prices(llm_call=0.002, replica_hour=2.0, audit_share=0.1)
GIVEN = GivenConfig(
    calls_per_month=1_000_000,
    num_tasks=4,
    calls_per_s=2.0,
    kept=0.5,
    training_hours=3.0,
    trainings_per_month=2.0,
    min_replicas=0.0,
)
WORDS = ["upstream.0.base_url=http://127.0.0.1:1/v1", "upstream.0.prompt_usd_per_million=2.0"]


def test_a_month_counted_out_by_hand() -> None:
    cost = cost_of(PRICES, GIVEN, moved=0.8, utilisation=0.25)
    # 800,000 asked, 400,000 kept, 40,000 of these audited: 640,000 are paid to the LLM.
    assert cost.llm == pytest.approx(640_000 * 0.002)
    # 800,000 calls at 2 a second are 111.1 busy hours, 444.4 paid ones.
    assert cost.replicas == pytest.approx(800_000 / 2 / 3600 / 0.25 * 2.0)
    assert cost.training == pytest.approx(4 * 2 * 3 * 2.0)
    assert cost_of(PRICES, GIVEN, 0.0, 0.25).total == pytest.approx(2000.0)


def test_replicas_that_are_kept_up_are_paid_once() -> None:
    kept_up = GIVEN.model_copy(update={"min_replicas": 1.0})
    assert cost_of(PRICES, kept_up, 0.1, 1.0).replicas == pytest.approx(730 * 2.0)
    busy = GIVEN.model_copy(update={"min_replicas": 0.1})
    assert cost_of(PRICES, busy, 0.8, 0.25).replicas == cost_of(PRICES, GIVEN, 0.8, 0.25).replicas


@given_that(
    utilisation=st.floats(0.05, 1), kept=st.floats(0.05, 1), replicas=st.floats(0, 3), hours=st.floats(0.01, 20)
)
def test_at_the_break_even_volume_moving_all_costs_what_moving_none_does(
    utilisation: float, kept: float, replicas: float, hours: float
) -> None:
    given = GIVEN.model_copy(update={"kept": kept, "min_replicas": replicas, "training_hours": hours})
    volume = break_even_calls(PRICES, given, utilisation)

    def gain(calls: float) -> float:
        at = given.model_copy(update={"calls_per_month": calls * given.num_tasks})
        return cost_of(PRICES, at, 0.0, utilisation).total - cost_of(PRICES, at, 1.0, utilisation).total

    if volume is None:
        assert gain(1e3) < 0 and gain(1e9) < 0
    else:
        assert gain(volume) == pytest.approx(0, abs=1e-6 * cost_of(PRICES, given, 1.0, utilisation).total)
        assert gain(volume * 1.5) > 0 > gain(volume / 1.5)


def test_half_and_double_move_the_break_even_the_right_way() -> None:
    found = sensitivity(PRICES, GIVEN.model_copy(update={"min_replicas": 1.0, "utilisation": 1.0}))
    for name in ("kept", "llm_call", "num_tasks"):
        assert found[name]["double"] < found[name]["half"]  # type: ignore[operator]
    for name in ("replica_hour", "training_hours", "min_replicas"):
        assert found[name]["double"] > found[name]["half"]  # type: ignore[operator]


def test_the_verb_computes_without_ray_and_says_what_was_assumed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    words = [*WORDS, "prices.replica_usd_per_hour=1.2", "--out", str(tmp_path), "--given", "kept=0.6"]
    words += ["--given", "num_tasks=3"]
    assert main(["scale", "economy", *words]) == 0
    out = capsys.readouterr().out
    assert "Given: kept=0.6, num_tasks=3." in out and "Assumed" in out
    page = (tmp_path / "report.html").read_text()
    laws = json.loads((tmp_path / "laws.json").read_text())
    lead = page.split('<p class="lead">')[1].split("</p>")[0]
    assert lead.startswith("At 30% utilisation a task pays from ") and laws["found"] == lead
    assert page.count("<svg") == 3 and "<script" not in page and "<img" not in page
    assert laws["provenance"]["machine"]["cores"] > 0 and laws["laws"]["given"]["kept"] == 0.6
    assert (tmp_path / "cells.parquet").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ([], "upstream.0.prompt_usd_per_million=0"),
        (WORDS, "prices.replica_usd_per_hour=0"),
        (["--given", "kept=2.0"], "kept"),
        (["--given", "keept=0.2"], "keept"),
    ],
)
def test_what_is_not_said_is_asked_for(words: list[str], field: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "economy", *words]) == 2
    assert f"understudy scale: {field}" in capsys.readouterr().err
