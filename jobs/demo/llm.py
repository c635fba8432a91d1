"""A scripted stand-in for a hosted LLM: an OpenAI-compatible server that answers the demo's five calls by rules.

It is no language model and says so: model id `scripted-llm-v1`, `system_fingerprint: "scripted"`. It turns the TEXT of a
request (system prompt, user message, tools) into an answer through its own keyword tables and regular expressions; it
never sees headers or metadata, and imports nothing of the world that knows the right answers. Like an LLM it is not quite
consistent: at a stated rate it gives another plausible answer, and it words every reply anew. Each draw depends on the
seed, the request's text and how often this very request was asked before, so the order of arrival changes nothing.

    python -m jobs.demo.llm --port 0      # prints its URL; listens on loopback only
"""

import argparse
import asyncio
import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from pydantic import BaseModel, Field, ValidationError

from jobs.demo.wording import word_reply

MODEL_ID = "scripted-llm-v1"
NOT_UNDERSTOOD = "I am a scripted model for a demonstration and do not know this kind of request."

PRICE_INPUT_USD_PER_MTOK = 2.50
PRICE_OUTPUT_USD_PER_MTOK = 10.00
"""Both prices are invented, in the range that hosts ask for a mid-size model."""

TTFT_SIGMA = 0.35
"""Spread of the lognormal time to first token: 1 call in 20 takes 1.8 times the median or longer."""
CHARS_PER_TOKEN = 4
MAX_REQUEST_BYTES = 1 << 20

SITE_CUES = {
    "intent": "triage incoming messages",
    "order_lookup": "calling exactly one tool",
    "field_extraction": "extract the fields",
    "status_text": "house template",
    "reply": "write the reply",
}

# Tried in order at the beginning of words, the first match decides; a message that matches none asks where an order is.
INTENT_CUES = {
    "cancel_order": r"cancel\b|call off|withdraw|stop (my|the) order|remove my order",
    "refund_status": r"refund|money\b|credited|paid\b|pay\b",
    "change_address": r"address|street|postcode|house number|apartment|redirect|office\b|pickup|hotel\b|new home|"
    r"change where|we moved",
    "exchange_size": r"size\b|fits?\b|swap\b|exchange\b|trade\b|smaller|larger|bigger|a small\b|large\b|"
    r"too (small|big|tight|loose|long|short|large)",
    "damaged_item": r"broken?\b|torn|tear\b|ripped|hole\b|damaged|defective|faulty|split\b|snapped|ruined|"
    r"scratch|leaks",
    "wrong_item": r"wrong|else\b|instead|in place of|different|another|mix(ed)? up|not match|not the .*(chose|ordered)|"
    r"not my|ordered a green",
    "return_item": r"return|back\b|send it back|not keeping",
}
URGENCY_CUES = {
    "low": r"no rush|no hurry|not urgent|take your time|whenever|next month|can wait|no need to hurry",
    "high": r"urgent|hurry|today|tonight|tomorrow|right away|immediately|emergency|as soon as possible",
}
ORDER_ID = r"\b[A-Z]{2}-\d{5}\b"
PRODUCT_CODE = r"\b[A-Z]{2}-\d{3}\b"
EMAIL = r"\b[\w.]+@[\w.]+\w"
QUANTITY = r"(?<![\w-])\d+(?![\w-])"
TWO_CAPITALISED = r"\b([A-Z][a-z]+) [A-Z][a-z]+\b"
NOT_FIRST_NAMES = {"A", "An", "Cancel", "The", "My", "Our", "This", "That", "Your", "Is", "Did", "Please"}


@dataclass(frozen=True)
class Answer:
    """What the model says and how long it takes to begin."""

    message: dict[str, Any]
    finish_reason: str
    usage: dict[str, int]
    ttft_s: float
    completion_id: str


class ChatMessage(BaseModel, extra="allow"):
    """One message; whatever else it carries counts as part of the request's text."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(BaseModel):
    """The fields of a chat.completions body that the scripted LLM reads; it ignores the others."""

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None


class ScriptedLLM:
    """Answers requests by rules, and counts them and what a hosted model would have charged.

    Args:
        self_disagreement: Share of the calls with one right answer that get another plausible one, in [0, 1].
        ttft_ms: Median time to the first token.
        ms_per_token: Time for each token of the answer after that.
        latency_scale: Factor on both times; 0 answers at once.
    """

    def __init__(
        self,
        seed: int = 0,
        self_disagreement: float = 0.003,
        ttft_ms: float = 250.0,
        ms_per_token: float = 6.0,
        latency_scale: float = 1.0,
    ) -> None:
        self.seed = seed
        self.self_disagreement = self_disagreement
        self.ttft_s = ttft_ms * latency_scale / 1000
        self.s_per_token = ms_per_token * latency_scale / 1000
        self.num_calls: Counter[str] = Counter()
        self.num_disagreements = 0
        self.num_prompt_tokens = 0
        self.num_completion_tokens = 0
        # One small entry per distinct request: the demo asks some thousands.
        self._num_asked: Counter[str] = Counter()

    def answer(self, request: ChatRequest) -> Answer:
        """Answer a request and count it in the statistics."""
        asked = json.dumps(request.model_dump(include={"messages", "tools"}), sort_keys=True)
        digest = hashlib.sha256(asked.encode()).hexdigest()[:24]
        time_asked = self._num_asked[digest]
        self._num_asked[digest] += 1
        rng = random.Random(f"{self.seed}:{digest}:{time_asked}")
        disagrees = rng.random() < self.self_disagreement
        ttft_s = self.ttft_s * rng.lognormvariate(0.0, TTFT_SIGMA)

        system, user = _text_of(request.messages, "system"), _text_of(request.messages, "user")
        site = next((site for site, cue in SITE_CUES.items() if cue in system), "unknown")
        said = say(site, system, user, rng, disagrees)
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if isinstance(said, dict):
            call = {"id": f"call_{digest[:12]}{time_asked}", "type": "function", "function": said}
            message |= {"content": None, "tool_calls": [call]}
            said = said["name"] + said["arguments"]
        usage = _count_usage(asked, said)

        self.num_calls[site] += 1
        self.num_disagreements += disagrees and site not in ("reply", "unknown")
        self.num_prompt_tokens += usage["prompt_tokens"]
        self.num_completion_tokens += usage["completion_tokens"]
        finish_reason = "tool_calls" if "tool_calls" in message else "stop"
        return Answer(message, finish_reason, usage, ttft_s, f"chatcmpl-{digest}-{time_asked}")

    def stats(self) -> dict[str, Any]:
        """Count calls, tokens and cost since the start."""
        cost = (
            self.num_prompt_tokens * PRICE_INPUT_USD_PER_MTOK + self.num_completion_tokens * PRICE_OUTPUT_USD_PER_MTOK
        ) / 1e6
        return {
            "model": MODEL_ID,
            "scripted": True,
            "num_calls": self.num_calls.total(),
            "num_calls_by_site": dict(self.num_calls),
            "num_disagreements": self.num_disagreements,
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "cost_usd": cost,
        }


def say(site: str, system: str, user: str, rng: random.Random, disagrees: bool) -> str | dict[str, str]:
    """Return the text of an answer, or the name and JSON arguments of a tool call."""
    if site == "intent":
        return _dump(_understand_intent(user, rng, disagrees))
    if site == "order_lookup":
        return _choose_lookup(user, disagrees)
    if site == "field_extraction":
        return _dump(_extract_fields(user, disagrees))
    if site == "status_text":
        return _fill_template(system, user, disagrees)
    if site == "reply":
        text, _, status = user.partition("\nOrder status: ")
        return word_reply(_find_name(text), _find_intent(text), status, rng)
    return NOT_UNDERSTOOD


def build_app(llm: ScriptedLLM) -> web.Application:
    """Build the server: POST /v1/chat/completions, GET /v1/models, GET /stats."""

    async def complete(http_request: web.Request) -> web.StreamResponse:
        try:
            request = ChatRequest.model_validate_json(await http_request.read())
        except ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors())
            detail = {"message": found, "type": "invalid_request_error", "param": None, "code": None}
            return web.json_response({"error": detail}, status=400)
        answer = llm.answer(request)
        await asyncio.sleep(answer.ttft_s)
        if request.stream:
            return await _stream(http_request, llm, answer, bool((request.stream_options or {}).get("include_usage")))
        await asyncio.sleep(llm.s_per_token * answer.usage["completion_tokens"])
        choice = {"index": 0, "message": answer.message, "logprobs": None, "finish_reason": answer.finish_reason}
        return web.json_response(_envelope(answer, "chat.completion") | {"choices": [choice], "usage": answer.usage})

    async def list_models(_: web.Request) -> web.Response:
        model = {"id": MODEL_ID, "object": "model", "created": 0, "owned_by": "jobs.demo"}
        model["description"] = "A scripted program for demonstrations, not a language model."
        return web.json_response({"object": "list", "data": [model]})

    async def show_stats(_: web.Request) -> web.Response:
        return web.json_response(llm.stats())

    app = web.Application(client_max_size=MAX_REQUEST_BYTES)
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_get("/v1/models", list_models)
    app.router.add_get("/stats", show_stats)
    return app


async def start_server(llm: ScriptedLLM, port: int = 0) -> tuple[web.AppRunner, str]:
    """Listen on loopback (port 0: any free one); return the runner to clean up and the URL without /v1."""
    runner = web.AppRunner(build_app(llm), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve the demo's scripted LLM on loopback.")
    parser.add_argument("--port", type=int, default=0, help="0 takes any free port")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--latency-scale", type=float, default=1.0, help="factor on all waiting times; 0 answers at once"
    )
    args = parser.parse_args()
    try:
        asyncio.run(_serve(ScriptedLLM(seed=args.seed, latency_scale=args.latency_scale), args.port))
    except KeyboardInterrupt:
        pass


async def _serve(llm: ScriptedLLM, port: int) -> None:
    runner, url = await start_server(llm, port)
    print(url, flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _understand_intent(text: str, rng: random.Random, disagrees: bool) -> dict[str, str]:
    urgency = _first_match(URGENCY_CUES, text) or "normal"
    if disagrees:
        urgency = rng.choice(("low", "high")) if urgency == "normal" else "normal"
    return {"intent": _find_intent(text), "urgency": urgency}


def _find_intent(text: str) -> str:
    return _first_match(INTENT_CUES, text) or "order_status"


def _first_match(cues: dict[str, str], text: str) -> str | None:
    prose = re.sub(EMAIL, "", text)
    return next((label for label, cue in cues.items() if re.search(rf"\b(?:{cue})", prose, re.IGNORECASE)), None)


def _choose_lookup(text: str, disagrees: bool) -> dict[str, str]:
    order_id, email = re.search(ORDER_ID, text), re.search(EMAIL, text)
    options = [("ask_customer", {"missing": "order_id"})]
    if email:
        options.insert(0, ("lookup_by_email", {"email": email[0]}))
    if order_id:
        options.insert(0, ("lookup_order", {"order_id": order_id[0]}))
    if len(options) == 1:
        options.append(("ask_customer", {"missing": "email"}))
    name, arguments = options[disagrees]
    return {"name": name, "arguments": _dump(arguments)}


def _extract_fields(text: str, disagrees: bool) -> dict[str, str | int | None]:
    order_id, code = re.search(ORDER_ID, text), re.search(PRODUCT_CODE, text)
    number = re.search(QUANTITY, re.sub(EMAIL, "", text))
    quantity = int(number[0]) if number else None
    if disagrees:
        # A thing named without a number may be read as one piece, and a number as something else.
        quantity = 1 if quantity is None else None
    return {
        "name": _find_name(text),
        "order_id": order_id[0] if order_id else None,
        "product_code": code[0] if code else None,
        "quantity": quantity,
    }


def _find_name(text: str) -> str | None:
    return next((m[0] for m in re.finditer(TWO_CAPITALISED, text) if m[1] not in NOT_FIRST_NAMES), None)


def _fill_template(system: str, user: str, disagrees: bool) -> str:
    """Fill the template that the system prompt gives for the record's state."""
    templates = dict(re.findall(r"^(\w+): (.+)$", system, re.MULTILINE))
    try:
        record = json.loads(user)
        filled = templates[record["state"]].format_map(record)
    except (ValueError, KeyError, TypeError):
        return NOT_UNDERSTOOD
    return f"Here is the latest news from our warehouse: {filled[0].lower()}{filled[1:]}" if disagrees else filled


def _text_of(messages: list[ChatMessage], role: str) -> str:
    """Join the text that a role says, given as a string or as content parts."""
    contents = [message.content or "" for message in messages if message.role == role]
    return "\n".join(
        content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)
        for content in contents
    )


def _count_usage(asked: str, said: str) -> dict[str, int]:
    prompt, completion = math.ceil(len(asked) / CHARS_PER_TOKEN), math.ceil(len(said) / CHARS_PER_TOKEN)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _envelope(answer: Answer, kind: str) -> dict[str, Any]:
    return {
        "id": answer.completion_id,
        "object": kind,
        "created": int(time.time()),
        "model": MODEL_ID,
        "system_fingerprint": "scripted",
    }


async def _stream(
    http_request: web.Request, llm: ScriptedLLM, answer: Answer, include_usage: bool
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(http_request)
    async for event in _events(llm, answer, include_usage):
        await response.write(f"data: {event}\n\n".encode())
    await response.write_eof()
    return response


async def _events(llm: ScriptedLLM, answer: Answer, include_usage: bool) -> AsyncIterator[str]:
    envelope = _envelope(answer, "chat.completion.chunk")
    for num_tokens, delta in _deltas(answer.message):
        await asyncio.sleep(llm.s_per_token * num_tokens)
        yield _dump(envelope | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield _dump(envelope | {"choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish_reason}]})
    if include_usage:
        yield _dump(envelope | {"choices": [], "usage": answer.usage})
    yield "[DONE]"


def _deltas(message: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Cut a message into (tokens, delta) pieces: a word each, or a tool call's name and then its arguments."""
    deltas: list[tuple[int, dict[str, Any]]] = [
        (0, {"role": "assistant", "content": "" if message["content"] else None})
    ]
    for piece in re.findall(r"\s*\S+\s*$|\s*\S+", message["content"] or ""):
        deltas.append((math.ceil(len(piece) / CHARS_PER_TOKEN), {"content": piece}))
    for index, call in enumerate(message.get("tool_calls", [])):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        opening = call | {"index": index, "function": {"name": name, "arguments": ""}}
        deltas.append((math.ceil(len(name) / CHARS_PER_TOKEN), {"tool_calls": [opening]}))
        rest = {"index": index, "function": {"arguments": arguments}}
        deltas.append((math.ceil(len(arguments) / CHARS_PER_TOKEN), {"tool_calls": [rest]}))
    return deltas


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    main()
