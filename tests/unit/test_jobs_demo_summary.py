"""The demo's summary counts every fresh call, prices audits, and a provider is never asked before it says what it costs."""

import pytest

from cluster.errors import ConfigError
from cluster.records import AgentCall, RouteDecision, Usage
from cluster.upstream import UpstreamConfig
from jobs.demo.provider import start_provider
from jobs.demo.summary import LLMAnswer, summarise_costs

PRICED = UpstreamConfig(base_url="http://127.0.0.1:1/v1", prompt_usd_per_million=2.0, completion_usd_per_million=10.0)
USAGE = Usage(prompt_tokens=1000, completion_tokens=100)
USD = (1000 * 2 + 100 * 10) / 1e6
VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL", "OPENAI_USD_PER_MILLION")


def call(number: int, action: str, served_by: str) -> AgentCall:
    return AgentCall(
        call_id=f"c{number}",
        ts=float(number),
        client_id="c",
        agent="a",
        session_id="s",
        step=0,
        request={"messages": [{"role": "user", "content": "x"}]},
        response=None,
        usage=USAGE,
        served_by=served_by,
        route=RouteDecision(action=action, reason="r"),
    )


def test_cost_is_upstream_spend_with_audits_and_the_machine_over_every_call_on_the_llm():
    calls = [call(1, "llm", "llm"), call(2, "accept", "specialist"), call(3, "accept", "specialist")]
    calls.append(call(4, "audit", "llm"))
    references = [LLMAnswer({}, USAGE), LLMAnswer({}, USAGE)]
    costs = summarise_costs(calls, references, PRICED, fresh_s=36.0, conversion_s=360.0, usd_per_hour=0.1)
    assert costs["all_llm_usd"] == pytest.approx(3 * USD)
    assert costs["upstream_usd"] == pytest.approx(2 * USD)
    assert costs["audits"] == 1 and costs["audits_usd"] == pytest.approx(USD)
    assert costs["machine_usd"] == pytest.approx(0.001) and costs["training_usd"] == pytest.approx(0.01)
    assert costs["cost_ratio"] == pytest.approx((2 * USD + 0.001) / (3 * USD))


@pytest.mark.parametrize("missing", VARIABLES)
def test_a_provider_of_the_environment_names_the_variable_that_is_missing(monkeypatch, missing):
    values = ("http://127.0.0.1:9/v1", "k", "m", "2.5,10")
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(ConfigError, match=f"env: {missing} not set.*next:"):
        start_provider("env", 10, 0)


def test_a_provider_of_the_environment_says_what_it_will_cost(monkeypatch, capsys):
    for name, value in zip(VARIABLES, ("http://127.0.0.1:9/v1", "k", "m", "2,10"), strict=True):
        monkeypatch.setenv(name, value)
    provider = start_provider("env", 10_000, 0)
    assert "about 10000 times: about 10.60 USD" in capsys.readouterr().out
    assert provider.process is None and provider.model == "m" and provider.upstream.prompt_usd_per_million == 2.0


@pytest.mark.parametrize("prices", ["cheap", "2", "1,2,3", "0,0", "0,10", "2,0", "-1,2", "nan,2", "2,inf"])
def test_prices_of_the_environment_are_two_positive_numbers(monkeypatch, prices):
    for name, value in zip(VARIABLES, ("http://127.0.0.1:9/v1", "k", "m", prices), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"OPENAI_USD_PER_MILLION='{prices}': allowed: two positive numbers.*next:"):
        start_provider("env", 10, 0)


@pytest.mark.parametrize("address", ["localhost:8000/v1", "https://me:s3cr3t@llm.example/v1"])
def test_a_provider_of_the_environment_names_a_wrong_address_and_no_secret(monkeypatch, address):
    for name, value in zip(VARIABLES, (address, "k", "m", "2,10"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL: base_url: ") as caught:
        start_provider("env", 10, 0)
    assert "allowed" in str(caught.value) and "s3cr3t" not in str(caught.value)
