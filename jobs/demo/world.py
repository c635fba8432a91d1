"""The demo's invented world: an outdoor-gear shop, its system prompts, and conversations whose right answers are known.

Turns (season, count, seed) into Conversations: what one customer wrote, what the shop's order table says, and the values
from which `true_answers` derives the right answer of every call that has one. The `captured` and `fresh` seasons share no
template, name, product, product code or order id, so nothing of a fresh conversation can have been memorised. Every value
is invented. Knows nothing of LLMs, HTTP or the product that watches the agent.
"""

import json
import random
from dataclasses import dataclass
from typing import Any

from jobs.demo.phrases import GEAR, PHRASEBOOKS, PRODUCT_LINES, WEARABLES, Phrasebook, Season

SITES = ("intent", "order_lookup", "field_extraction", "status_text", "reply")
"""The agent's five call sites, in the order in which it makes them."""

CARRIERS = ("Northway", "Alpine Post", "Bluebird Freight", "Swift Parcel", "Harbor Express", "Redline Courier")
CODE_LETTERS = "ABCDEFGHJKLMNPQSUVWXYZ"
"""No R or T: a product code never looks like the beginning of an order id (TR-48213)."""
MAX_WORDS = 35
MAX_DETAIL_WORDS = 6
FRESH_EVERY = 7
"""Order ids and product codes whose number is divisible by this belong to the fresh season alone."""

STATUS_TEMPLATES = {
    "processing": "We are preparing order {order_id} ({quantity} x {product}). It should ship on {date} with {carrier}.",
    "packed": "Your {product} is packed. Order {order_id} leaves our warehouse on {date} with {carrier}.",
    "shipped": "Your {product} left our warehouse on {date}. {carrier} is bringing order {order_id} to you.",
    "out_for_delivery": "{carrier} is delivering order {order_id} on {date}. Please expect your {product} that day.",
    "backordered": "The {product} in order {order_id} is out of stock. We expect to ship it on {date} with {carrier}.",
    "delivered": "{carrier} delivered order {order_id} ({quantity} x {product}) on {date}.",
    "returned": "We received the {product} of order {order_id} on {date}. Your refund is on its way.",
    "cancelled": "Order {order_id} was cancelled on {date}. You will not be charged for the {product}.",
}
STATES_BY_INTENT = {
    "order_status": ("processing", "packed", "shipped", "out_for_delivery", "backordered"),
    "return_item": ("delivered",),
    "refund_status": ("returned", "cancelled"),
    "damaged_item": ("delivered",),
    "wrong_item": ("delivered",),
    "cancel_order": ("processing", "packed", "backordered"),
    "change_address": ("processing", "packed", "shipped"),
    "exchange_size": ("delivered",),
}
INTENTS = tuple(STATES_BY_INTENT)

INTENT_PROMPT = """\
You triage incoming messages for the support desk of Fernhill Outfitters, a shop for outdoor gear. Read the customer's \
message and decide what the customer wants and how soon an answer is needed. Choose exactly one intent from this list: \
order_status, return_item, refund_status, damaged_item, wrong_item, cancel_order, change_address, exchange_size. Choose the \
urgency from the customer's own words: high when the customer asks for help at once or names a close deadline, low when the \
customer says that it can wait, and normal in every other case. Do not guess a deadline that is not in the text. Answer with \
one JSON object that has the keys intent and urgency, in that order, and nothing else."""

LOOKUP_PROMPT = """\
You are the order clerk of Fernhill Outfitters. Today is {today}. Find the order that the customer writes about by calling \
exactly one tool. If the message contains an order id (two letters, a dash and five digits), call lookup_order with that id, \
copied character by character. If there is no order id but there is an email address, call lookup_by_email with the address. \
If the message contains neither, call ask_customer and name what is missing. An order id always goes before an email address. \
Never invent or correct an id, and never answer the customer yourself: a colleague writes the reply."""

FIELDS_PROMPT = """\
You extract the fields of a support ticket for Fernhill Outfitters. Copy the values from the customer's message exactly as \
they are written there. The fields are name (the customer's full name), order_id (two letters, a dash and five digits), \
product_code (two letters, a dash and three digits) and quantity (a whole number of pieces). Use null for every field that \
the message does not give; do not infer a name from an email address and do not assume a quantity. Answer with one JSON \
object with the keys name, order_id, product_code and quantity, in that order, without any explanation."""

STATUS_PROMPT = """\
You write the status line that stands on a customer's order page at Fernhill Outfitters. The message is the order record as \
JSON. Use the house template of the record's state word for word and fill in the values of the record exactly as they are \
written. Add nothing else.
House templates:
""" + "\n".join(f"{state}: {template}" for state, template in STATUS_TEMPLATES.items())

REPLY_PROMPT = """\
You write the reply to the customer for the support desk of Fernhill Outfitters, a small shop for outdoor gear. You get the \
customer's message and the status of the order. Write like a kind and capable person who has read the message with care: \
greet the customer by name if it is known, show that you understand what the trouble means for them, say what you see in the \
order, and say what happens next. Find your own words each time; our customers notice canned answers. Write four to six \
sentences in plain language, promise nothing that the status does not support, and close in a friendly way."""


def _tool(name: str, description: str, parameter: str, schema: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {parameter: schema}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


LOOKUP_TOOLS = [
    _tool("lookup_order", "Find one order by its id.", "order_id", {"type": "string"}),
    _tool("lookup_by_email", "Find the latest order of an email address.", "email", {"type": "string"}),
    _tool(
        "ask_customer",
        "Ask the customer for what is needed to find the order.",
        "missing",
        {"type": "string", "enum": ["order_id", "email"]},
    ),
]


@dataclass(frozen=True)
class Conversation:
    """One customer's request and all that is true of it."""

    session_id: str
    number: int
    """Position in its season's list, from 0."""
    text: str
    """What the customer wrote: 10 to 35 words."""
    intent: str
    urgency: str
    name: str | None
    """The customer's full name where the text gives it; so for every value that may be None."""
    mentioned_order_id: str | None
    mentioned_email: str | None
    mentioned_product_code: str | None
    mentioned_quantity: int | None
    order: dict[str, Any]
    """The shop's own record of the order: order_id, product, product_code, quantity, state, date (ISO), carrier."""
    today: str
    """ISO date on which the customer wrote."""


def make_conversations(season: Season, count: int, seed: int) -> list[Conversation]:
    """Draw conversations; the same arguments give the same list, and a longer list begins with the shorter one."""
    return [_make_conversation(season, number, seed) for number in range(count)]


def true_answers(conversation: Conversation) -> dict[str, Any]:
    """Return call site -> right answer: JSON values, a `{"name", "arguments"}` tool call, or a text.

    The reply has no entry: there is no single right one.
    """
    if conversation.mentioned_order_id:
        lookup = {"name": "lookup_order", "arguments": {"order_id": conversation.mentioned_order_id}}
    elif conversation.mentioned_email:
        lookup = {"name": "lookup_by_email", "arguments": {"email": conversation.mentioned_email}}
    else:
        lookup = {"name": "ask_customer", "arguments": {"missing": "order_id"}}
    return {
        "intent": {"intent": conversation.intent, "urgency": conversation.urgency},
        "order_lookup": lookup,
        "field_extraction": {
            "name": conversation.name,
            "order_id": conversation.mentioned_order_id,
            "product_code": conversation.mentioned_product_code,
            "quantity": conversation.mentioned_quantity,
        },
        "status_text": STATUS_TEMPLATES[conversation.order["state"]].format_map(conversation.order),
    }


def build_messages(conversation: Conversation, site: str) -> list[dict[str, Any]]:
    """Build the system and user message of one call site; they depend on the conversation alone, on no earlier answer."""
    order = conversation.order
    system, user = {
        "intent": (INTENT_PROMPT, conversation.text),
        "order_lookup": (LOOKUP_PROMPT.format(today=conversation.today), conversation.text),
        "field_extraction": (FIELDS_PROMPT, conversation.text),
        "status_text": (STATUS_PROMPT, json.dumps(order, separators=(",", ":"))),
        "reply": (
            REPLY_PROMPT,
            f"Customer: {conversation.text}\nOrder status: {order['state']}, {order['date']}, {order['carrier']}",
        ),
    }[site]
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _make_conversation(season: Season, number: int, seed: int) -> Conversation:
    rng = random.Random(f"{season}:{seed}:{number}")
    book = PHRASEBOOKS[season]
    intent = rng.choice(INTENTS)
    urgency = rng.choices(("low", "normal", "high"), weights=(20, 50, 30))[0]
    order = _draw_order(rng, season, intent)
    first, last = rng.choice(book.first_names), rng.choice(book.last_names)
    values = {
        "name": f"{first} {last}",
        "email": f"{first}.{last}@example.{rng.choice(('com', 'net', 'org'))}".lower(),
        "order_id": order["order_id"],
        "product": order["product"],
        "product_code": order["product_code"],
        "quantity": order["quantity"],
    }
    text, given = _draw_text(rng, book, intent, urgency, values)
    return Conversation(
        session_id=f"{season}-{seed}-{number:05d}",
        number=number,
        text=text,
        intent=intent,
        urgency=urgency,
        name=given.get("name"),
        mentioned_order_id=given.get("order_id"),
        mentioned_email=given.get("email"),
        mentioned_product_code=given.get("product_code"),
        mentioned_quantity=given.get("quantity"),
        order=order,
        today=f"2026-05-{rng.randint(1, 28):02d}",
    )


def _draw_order(rng: random.Random, season: Season, intent: str) -> dict[str, Any]:
    kinds = WEARABLES if intent == "exchange_size" else GEAR
    products = [
        f"{line} {kind}"
        for row, line in enumerate(PRODUCT_LINES)
        for column, kind in enumerate(kinds)
        # Both seasons see every line and every kind, but never the same pair.
        if ((row + column) % 6 == 0) == (season == "fresh")
    ]
    return {
        "order_id": f"TR-{_draw_number(rng, season, 10_000, 99_999)}",
        "product": rng.choice(products),
        "product_code": f"{''.join(rng.sample(CODE_LETTERS, 2))}-{_draw_number(rng, season, 100, 999)}",
        "quantity": rng.randint(2, 6),
        "state": rng.choice(STATES_BY_INTENT[intent]),
        "date": f"2026-{rng.randint(4, 6):02d}-{rng.randint(1, 28):02d}",
        "carrier": rng.choice(CARRIERS),
    }


def _draw_number(rng: random.Random, season: Season, low: int, high: int) -> int:
    """Draw a number of the season: multiples of FRESH_EVERY are fresh, all others captured."""
    number = rng.randint(low, high - FRESH_EVERY)
    if season == "fresh":
        return number + -number % FRESH_EVERY
    return number if number % FRESH_EVERY else number + 1


def _draw_text(
    rng: random.Random, book: Phrasebook, intent: str, urgency: str, values: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Compose a customer's message; also return the values that it gives."""
    opener = rng.choices(("name", ""), weights=(70, 30))[0]
    mention = rng.choices(("order_id", "order_id and email", "email", ""), weights=(80, 7, 8, 5))[0]
    detail = rng.choices(("product_code and quantity", "product_code", "quantity", ""), weights=(35, 25, 15, 25))[0]
    middle = [rng.choice(book.problems[intent]), rng.choice(book.mentions[mention])]
    if rng.random() < 0.25:
        middle.reverse()
    parts = [rng.choice(book.openers[opener]), *middle, rng.choice(book.closers[urgency])]
    if len(" ".join(parts).format_map(values).split()) > MAX_WORDS - MAX_DETAIL_WORDS:
        detail = ""
    parts.insert(-1, rng.choice(book.details[detail]))
    given = {key for kinds in (opener, mention, detail) for key in kinds.split(" and ") if key}
    return " ".join(part for part in parts if part).format_map(values), {key: values[key] for key in given}
