"""How much of the personal data is found, how much else is, what it breaks and how fast: training/redact.py beside Presidio.

A text's findings are the characters that the redactor would really replace. A gold span is *recalled* where each of its
letters and digits lies in a finding, of whatever type: what is gone is gone. It is recalled *strictly* where those findings
have its type. A finding is *right* where it overlaps a gold span of any type that the file labels, also of types that are not
asked for; precision is the right part of all findings, and is reported only for files that are gold for all types: files
whose records do not call themselves silver and that hold spans of at least `MIN_GOLD_TYPES` types. Presidio is measured on the
same texts in the same run by the same matching. The false-positive rate is the part of the negatives' user texts, all of
them and none excluded, in which anything is found: names of famous people and example addresses count as false.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from cluster.answers import check, kind_of
from cluster.errors import InputError
from jobs.bench.presidio_stock import build_stock_presidio
from training.redact import RedactConfig, Redactor

ASKED_TYPES = (
    "PERSON",
    "EMAIL_ADDRESS",
    "PHONE_NUMBER",
    "CREDIT_CARD",
    "IBAN_CODE",
    "US_SSN",
    "IP_ADDRESS",
    "STREET_ADDRESS",
    "DATE_OF_BIRTH",
)
"""The types over which recall is taken."""
MIN_GOLD_TYPES = 5
MIN_TIMED_S = 2.0
"""Throughput is taken over whole passes until so much processor time is spent."""
_KEY = b"bench" * 8
_SAME_TYPE = {
    "FIRST_NAME": {"PERSON"},
    "LAST_NAME": {"PERSON"},
    "STREET_ADDRESS": {"STREET_ADDRESS"},
    "ADDRESS_PLACE": {"STREET_ADDRESS", "CITY", "STATE", "COUNTRY"},
    "ZIP_CODE": {"STREET_ADDRESS", "ZIP_CODE"},
    "LOCATION": {"STREET_ADDRESS", "CITY", "STATE", "COUNTRY"},
    "DATE_TIME": {"DATE_TIME", "DATE_OF_BIRTH"},
}
"""Gold types a finding's kind stands for, where it is not the kind itself."""


class PiiText(NamedTuple):
    """A text with its gold spans."""

    text: str
    spans: list[dict[str, Any]]


Recognise = Callable[[str], Sequence[Any]]
"""A text -> spans with start, end and kind."""


class _Tally:
    """Counts over one or more files."""

    def __init__(self) -> None:
        self.num: Counter[str] = Counter()
        self.recalled: Counter[str] = Counter()
        self.strict: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.right: Counter[str] = Counter()

    def add(self, item: PiiText, findings: Sequence[Any]) -> None:
        kinds_at: dict[int, set[str]] = defaultdict(set)
        for finding in findings:
            types = _SAME_TYPE.get(finding.kind, {finding.kind})
            for index in range(finding.start, finding.end):
                kinds_at[index] |= types
            self.found.update(types)
            if any(finding.start < span["end"] and span["start"] < finding.end for span in item.spans):
                self.right.update(types)
        for span in item.spans:
            places = [i for i in range(span["start"], span["end"]) if item.text[i].isalnum()]
            self.num[span["type"]] += 1
            self.recalled[span["type"]] += all(i in kinds_at for i in places)
            self.strict[span["type"]] += all(span["type"] in kinds_at.get(i, ()) for i in places)

    def recall(self, types: Iterable[str] = ASKED_TYPES) -> float | None:
        return _ratio(sum(self.recalled[t] for t in types), sum(self.num[t] for t in types))

    def strict_recall(self, types: Iterable[str] = ASKED_TYPES) -> float | None:
        return _ratio(sum(self.strict[t] for t in types), sum(self.num[t] for t in types))


class _Measured:
    """One recogniser over the files: by file, over all, and over those that are gold for all types."""

    def __init__(self) -> None:
        self.files: dict[str, _Tally] = {}
        self.every, self.gold = _Tally(), _Tally()
        self.num_found, self.num_right = 0, 0
        self.found_by_file: dict[str, tuple[int, int]] = {}

    def add(self, name: str, texts: Sequence[PiiText], recognise: Recognise, *, is_gold: bool) -> None:
        tally = self.files.setdefault(name, _Tally())
        found = right = 0
        for item in texts:
            findings = recognise(item.text)
            tally.add(item, findings)
            self.every.add(item, findings)
            found += len(findings)
            right += sum(any(f.start < s["end"] and s["start"] < f.end for s in item.spans) for f in findings)
            if is_gold:
                self.gold.add(item, findings)
        self.found_by_file[name] = (found, right)
        if is_gold:
            self.num_found += found
            self.num_right += right

    @property
    def scored(self) -> _Tally:
        """The files that are gold for all types, else all: recall needs only that what is labelled is right."""
        return self.gold if self.gold.num else self.every


def measure_pii(paths: list[pathlib.Path], calls: list[pathlib.Path], negatives: list[pathlib.Path]) -> dict[str, Any]:
    """The PII part of `understudy bench curate`. Takes about a minute for a megabyte of text, most of it Presidio's.

    Args:
        paths: files of {"text", "spans": [{"start", "end", "type", "value"}]}, one JSON object a line, also gzipped.
        calls: agents' calls, for tool calls broken and, with the negatives, for throughput.
        negatives: calls whose user texts hold almost no personal data.

    Returns:
        pii_recall and pii_precision over `ASKED_TYPES` of the files that are gold for all types (without any, recall is that
        of all files and precision None), presidio_recall and presidio_precision on the same, pii_per_type, pii_files (a row for each file), pii_false_positive_rate over all
        negatives, pii_negatives (a row for each), tool_calls_broken, mb_per_s_core. None where nothing could be measured.

    Raises:
        InputError: a file is missing or holds something else.
    """
    redactor = Redactor(RedactConfig(), _KEY)
    presidio = build_stock_presidio()
    ours, theirs = _Measured(), _Measured()
    for path in paths:
        texts, is_gold = read_pii_texts(path)
        ours.add(path.name, texts, redactor.find_spans, is_gold=is_gold)
        theirs.add(path.name, texts, presidio, is_gold=is_gold)
    rates = [_false_positives(path, redactor) for path in negatives]
    texts = list(_distinct_texts(calls)) + list(_distinct_user_texts(negatives))
    return {
        "pii_recall": ours.scored.recall(),
        "pii_precision": _ratio(ours.num_right, ours.num_found),
        "pii_per_type": _per_type(ours.scored, theirs.scored),
        "presidio_recall": theirs.scored.recall(),
        "presidio_precision": _ratio(theirs.num_right, theirs.num_found),
        "pii_files": [_file_row(name, ours, theirs) for name in ours.files],
        "pii_false_positive_rate": _ratio(sum(r["with_finding"] for r in rates), sum(r["texts"] for r in rates)),
        "pii_negatives": rates,
        "tool_calls_broken": sum(count_broken_tool_calls(path) for path in calls) if calls else None,
        "mb_per_s_core": measure_throughput(texts) if texts else None,
    }


def read_pii_texts(path: pathlib.Path) -> tuple[list[PiiText], bool]:
    """A file's texts, and whether its spans are gold for all types (see the module's text).

    Raises:
        InputError: the file is missing, no JSON lines, or its spans are not those of its texts.
    """
    texts: list[PiiText] = []
    types: set[str] = set()
    is_silver = False
    for number, record in enumerate(_read_lines(path), 1):
        spans = record.get("spans")
        text = record.get("text")
        if not isinstance(text, str) or not isinstance(spans, list):
            raise InputError(f"{path}:{number}: allowed: an object with text and spans")
        for span in spans:
            value = text[span["start"] : span["end"]]
            if not value or span.get("value", value) != value:
                raise InputError(f"{path}:{number}: a span's offsets and its value differ")
        texts.append(PiiText(text, spans))
        types |= {span["type"] for span in spans}
        is_silver |= "silver" in str(record.get("label_kind", ""))
    return texts, not is_silver and len(types) >= MIN_GOLD_TYPES


def measure_throughput(texts: Sequence[str]) -> float:
    """Megabytes (10^6 bytes of UTF-8) of distinct text searched by patterns and lists in a second of one core's time.

    What is loaded once (lists of names, Presidio's recognisers) is loaded before; each pass begins with an empty memory.
    """
    for text in ("Olga", "call me on 020 7946 0958, 4111 1111 1111 1111, DE44 5001 0517 5407 3249 31"):
        Redactor(RedactConfig(), _KEY).find(text)
    size = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    passes, start = 0, time.process_time()
    while time.process_time() - start < MIN_TIMED_S:
        redactor = Redactor(RedactConfig(), _KEY)
        for text in texts:
            redactor.find(text)
        passes += 1
    return passes * size / (time.process_time() - start) / 1e6


def count_broken_tool_calls(path: pathlib.Path) -> int:
    """Tool calls of answers that redaction broke, over all calls of a file, redacted session by session.

    A call is broken where its arguments parsed before and do not now, where its answer satisfied the request's schemas and
    does not now or the reverse, or where a string of the arguments that stood word for word in the prompt does not stand
    so in the redacted one.
    """
    redactor = Redactor(RedactConfig(), _KEY)
    broken = 0
    for session, turns in _sessions(path).items():
        redacted, _ = redactor.redact_session(turns, session)
        broken += sum(count_broken(before, after) for before, after in zip(turns, redacted, strict=True))
    return broken


def count_broken(before: tuple[dict[str, Any], dict[str, Any]], after: tuple[dict[str, Any], dict[str, Any]]) -> int:
    """Broken tool calls of one answer; see `count_broken_tool_calls`."""
    (request, answer), (new_request, new_answer) = before, after
    calls, new_calls = answer.get("tool_calls") or [], new_answer.get("tool_calls") or []
    if len(calls) != len(new_calls):
        return max(len(calls), len(new_calls))
    if not calls:
        return 0
    kind = kind_of(answer, request)
    is_valid, is_still = check(answer, kind, request) is None, check(new_answer, kind, new_request) is None
    if is_valid != is_still:
        return len(calls)
    prompt, new_prompt = _prompt_text(request), _prompt_text(new_request)
    return sum(_is_broken(a, b, prompt, new_prompt) for a, b in zip(calls, new_calls, strict=True))


def _is_broken(call: dict[str, Any], new_call: dict[str, Any], prompt: str, new_prompt: str) -> bool:
    if call["function"]["name"] != new_call["function"]["name"] or call.get("id") != new_call.get("id"):
        return True
    try:
        values = list(_strings(json.loads(call["function"]["arguments"])))
    except ValueError:
        return False
    try:
        new_values = list(_strings(json.loads(new_call["function"]["arguments"])))
    except ValueError:
        return True
    if len(values) != len(new_values):
        return True
    pairs = zip(values, new_values, strict=True)
    return any(value in prompt and new_value not in new_prompt for value, new_value in pairs)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value


def _prompt_text(request: dict[str, Any]) -> str:
    """Contents and earlier arguments of a request as a model reads them, with JSON strings decoded one level."""
    parts: list[str] = []
    for message in request.get("messages", ()):
        content = message.get("content")
        texts = (
            [content] if isinstance(content, str) else [p.get("text", "") for p in content or () if isinstance(p, dict)]
        )
        texts += [call["function"].get("arguments", "") for call in message.get("tool_calls") or ()]
        for text in texts:
            parts.append(text)
            try:
                parts.extend(_strings(json.loads(text)))
            except ValueError:
                continue
    return "\n".join(parts)


def _per_type(ours: _Tally, theirs: _Tally) -> dict[str, dict[str, Any]]:
    rows = {}
    for kind in sorted(ours.num, key=lambda t: (t not in ASKED_TYPES, t)):
        rows[kind] = {
            "num": ours.num[kind],
            "recall": ours.recall([kind]),
            "recall_strict": ours.strict_recall([kind]),
            "presidio_recall": theirs.recall([kind]),
        }
        if ours.found[kind]:
            rows[kind]["precision"] = _ratio(ours.right[kind], ours.found[kind])
    return rows


def _file_row(name: str, ours: _Measured, theirs: _Measured) -> dict[str, Any]:
    mine, stock = ours.files[name], theirs.files[name]
    types = [kind for kind in ASKED_TYPES if mine.num[kind]]
    return {
        "file": name,
        "spans": sum(mine.num[kind] for kind in types),
        "recall": mine.recall(types),
        "recall_strict": mine.strict_recall(types),
        "presidio_recall": stock.recall(types),
        "recall_by_type": {kind: mine.recall([kind]) for kind in sorted(mine.num)},
    }


def _false_positives(path: pathlib.Path, redactor: Redactor) -> dict[str, Any]:
    num = with_finding = 0
    for record in _read_calls(path):
        for text in _user_texts(record["request"]):
            num += 1
            with_finding += bool(redactor.find_spans(text))
    return {"file": path.name, "texts": num, "with_finding": with_finding, "rate": _ratio(with_finding, num)}


def _user_texts(request: dict[str, Any]) -> Iterator[str]:
    for message in request.get("messages", ()):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            yield message["content"]


def _distinct_texts(paths: Iterable[pathlib.Path]) -> dict[str, None]:
    """Texts of all messages but system prompts, each once: contents and arguments."""
    texts: dict[str, None] = {}
    for path in paths:
        for record in _read_calls(path):
            for message in (*record["request"].get("messages", ()), _answer_of(record)):
                if message.get("role") in ("system", "developer"):
                    continue
                if isinstance(message.get("content"), str):
                    texts[message["content"]] = None
                for call in message.get("tool_calls") or ():
                    texts[call["function"].get("arguments", "")] = None
    return texts


def _distinct_user_texts(paths: Iterable[pathlib.Path]) -> dict[str, None]:
    return {text: None for path in paths for record in _read_calls(path) for text in _user_texts(record["request"])}


def _sessions(path: pathlib.Path) -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    sessions: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for record in _read_calls(path):
        sessions[str(record.get("session", record.get("id")))].append((record["request"], _answer_of(record)))
    return sessions


def _answer_of(record: dict[str, Any]) -> dict[str, Any]:
    return record["response"]["choices"][0]["message"]


def _read_calls(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Calls of a file of calls, or of sessions that hold their messages once (`at`: the answer's place in them)."""
    for number, record in enumerate(_read_lines(path), 1):
        try:
            if "calls" not in record:
                yield {**record, "request": record["request"], "response": record["response"]}
                continue
            messages = record["messages"]
            for call in record["calls"]:
                request = {**record.get("request", {}), "messages": messages[: call["at"]]}
                choice = {"message": messages[call["at"]]}
                yield {"session": record.get("session"), "request": request, "response": {"choices": [choice]}}
        except (KeyError, TypeError, IndexError):
            raise InputError(f"{path}:{number}: no call and no session of the format of `understudy ingest`") from None


def _read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise InputError(f"{path}:{number}: allowed: one JSON object a line")
                yield record
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); allowed: .jsonl or .jsonl.gz") from None


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
