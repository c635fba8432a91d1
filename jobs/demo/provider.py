"""The LLM behind the demo: the scripted one, started as a process of its own, or the user's provider.

The user's provider is used only where it is asked for by name (`--provider env`), after its price has been printed: a
variable that happens to be set never spends.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Literal, NamedTuple

from cluster.config import validate
from cluster.errors import ConfigError
from cluster.upstream import UpstreamConfig
from jobs.demo.llm import MODEL_ID, PRICE_INPUT_USD_PER_MTOK, PRICE_OUTPUT_USD_PER_MTOK

ProviderName = Literal["scripted", "env"]
KEY_VARIABLE = "OPENAI_API_KEY"
_PROMPT_TOKENS, _COMPLETION_TOKENS = 330, 40
"""Of an average call of the demo's agent, rounded up."""


class Provider(NamedTuple):
    """Who answers, and what it is asked for."""

    upstream: UpstreamConfig
    model: str
    note: str
    """What a reader of the numbers must know of it."""
    process: subprocess.Popen[str] | None = None


def start_provider(name: ProviderName, num_calls: int, seed: int) -> Provider:
    """Start the scripted LLM, or take the provider that OPENAI_BASE_URL names and print what it will cost.

    Raises:
        ConfigError: the scripted LLM did not start, or a variable of the provider is missing or wrong.
    """
    return _start_scripted(seed) if name == "scripted" else _from_environment(num_calls)


def stop_provider(provider: Provider) -> None:
    """End the scripted LLM's process; a provider elsewhere is left alone."""
    if provider.process is not None:
        provider.process.terminate()
        provider.process.wait(timeout=10)


def _start_scripted(seed: int) -> Provider:
    command = [sys.executable, "-m", "jobs.demo.llm", "--port", "0", "--seed", str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline() if process.stdout else ""
    url = next((word for word in line.split() if word.startswith("http://")), None)
    if url is None:
        process.terminate()
        raise ConfigError(f"scripted LLM did not start; it said {line!r}")
    upstream = UpstreamConfig(
        base_url=f"{url.rstrip('/').removesuffix('/v1')}/v1",
        prompt_usd_per_million=PRICE_INPUT_USD_PER_MTOK,
        completion_usd_per_million=PRICE_OUTPUT_USD_PER_MTOK,
    )
    note = (
        "The LLM of this demo is scripted (jobs/demo/llm.py); it disagrees with itself on 0.3% of the calls with one "
        "right answer, and its prices are invented."
    )
    return Provider(upstream, MODEL_ID, note, process)


def _from_environment(num_calls: int) -> Provider:
    names = ("OPENAI_BASE_URL", KEY_VARIABLE, "OPENAI_MODEL", "OPENAI_USD_PER_MILLION")
    values = {name: os.environ.get(name, "") for name in names}
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise ConfigError(
            f"--provider env: {', '.join(missing)} not set; needed: OPENAI_BASE_URL (address with its version), "
            f"{KEY_VARIABLE}, OPENAI_MODEL and OPENAI_USD_PER_MILLION=PROMPT,COMPLETION (prices, to say what it costs); "
            "next: set them, or run the demo without --provider env"
        )
    prompt_usd, completion_usd = _prices(values["OPENAI_USD_PER_MILLION"])
    described = {
        "base_url": values["OPENAI_BASE_URL"],
        "model": values["OPENAI_MODEL"],
        "prompt_usd_per_million": prompt_usd,
        "completion_usd_per_million": completion_usd,
    }
    try:
        upstream = validate(UpstreamConfig, described)
    except ConfigError as error:
        raise ConfigError(f"OPENAI_BASE_URL: {error}") from None
    cost = num_calls * (_PROMPT_TOKENS * prompt_usd + _COMPLETION_TOKENS * completion_usd) / 1e6
    print(
        f"This run asks {values['OPENAI_MODEL']} at {values['OPENAI_BASE_URL']} about {num_calls} times: about "
        f"{cost:.2f} USD at {prompt_usd:g} and {completion_usd:g} USD per million prompt and completion tokens.",
        flush=True,
    )
    return Provider(upstream, values["OPENAI_MODEL"], f"The LLM was {values['OPENAI_MODEL']}.")


def _prices(text: str) -> tuple[float, float]:
    """Both positive: the summary divides by what all calls would have cost on the LLM."""
    try:
        prompt_usd, completion_usd = map(float, text.split(","))
    except ValueError:
        prompt_usd = completion_usd = 0.0
    if not all(math.isfinite(price) and price > 0 for price in (prompt_usd, completion_usd)):
        raise ConfigError(
            f"OPENAI_USD_PER_MILLION={text!r}: allowed: two positive numbers, PROMPT,COMPLETION, such as 2.5,10; "
            "next: set your provider's prices, which the summary compares costs by"
        )
    return prompt_usd, completion_usd
