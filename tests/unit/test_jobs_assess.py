"""What an agent's calls, or its source, say of how much small models could take."""

from __future__ import annotations

import json
import pathlib
import random

import pytest

from cluster.errors import InputError
from cluster.records import AgentCall
from jobs.__main__ import main
from jobs.assess import AgentReport, assess
from jobs.assess_shares import VERDICTS, SiteCalls, Tally
from jobs.assess_source import find_source_sites
from jobs.recipe import load_recipe

COLOURS = ("red", "green", "blue")


def call(number: int, system: str, user: str, answer: str, session: str = "", **fields: object) -> AgentCall:
    request = {"model": "m", "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]}
    message = {"role": "assistant", "content": answer}
    return AgentCall(
        call_id=f"{system[:12]}{number}", ts=float(number), client_id="c", agent="desk",
        session_id=session or f"{system[:12]}{number}", step=0, request=request,
        response={"choices": [{"message": message, "finish_reason": "stop"}]}, **fields,
    )  # fmt: skip


def sorting(number: int) -> AgentCall:
    colour = COLOURS[number % 3]
    return call(number, "Sort the order by its colour word.", f"the {colour} one of lot {number}", colour)


def filling(number: int) -> AgentCall:
    answer = json.dumps({"lot": f"L{number * 7919}"})
    return call(number, "Take the lot out of the note as JSON.", f"note of L{number * 7919} please", answer)


def writing(number: int) -> AgentCall:
    words = random.Random(number).sample("sun rain hill road boat bird tree snow lamp song".split(), 6)
    return call(
        number, "Write a poem about what the person likes.", f"I like {words[0]}", f"O {' '.join(words)} of mine"
    )


def wavering(number: int) -> AgentCall:
    answer = random.Random(number).choice(["yes", "no"])
    return call(number, "Say whether the coin shows its head side.", f"coin {number % 5}", answer)


def rare(number: int) -> AgentCall:
    return call(number, "Translate the greeting into some other tongue.", f"greeting {number}", "hej")


@pytest.fixture(scope="module")
def report() -> AgentReport:
    calls = [sorting(k) for k in range(400)] + [filling(k) for k in range(100)] + [writing(k) for k in range(150)]
    calls += [wavering(k) for k in range(100)] + [rare(k) for k in range(10)]
    calls += [call(k, "Answer the caller at once.", f"hello {k}", f"Hi {k}", faces_person=True) for k in range(40)]
    calls += [sorting(9_999).model_copy(update={"call_id": "x", "status": 500, "response": None})]
    (found,) = assess(calls, load_recipe([]), lambda told: None)
    return found


def test_each_site_gets_the_verdict_that_its_calls_bear(report: AgentReport) -> None:
    verdicts = {site.num_calls: site for site in report.sites}
    assert verdicts[400].verdict == "shown" and verdicts[400].stand_in.upper_bound <= 0.05
    assert verdicts[150].verdict == "stays" and "open answers" in verdicts[150].reason
    assert verdicts[10].verdict == "unknown"
    by_kind = {(site.kind, site.num_calls): site for site in report.sites}
    assert by_kind["json", 100].verdict == "plausible" and by_kind["json", 100].closed_share == 0
    wavered = by_kind["label", 100]
    assert wavered.verdict == "stays" and "contradicts itself" in wavered.reason and wavered.num_repeated == 100


def test_the_shares_are_of_all_answered_calls_and_hold_their_intervals(report: AgentReport) -> None:
    assert report.num_calls == 800 and report.not_counted == {"call failed": 1}
    assert report.left_out == {"answer faces a person": 40}
    assert sum(share.share for share in report.shares.values()) == pytest.approx(1)
    for share in report.shares.values():
        assert share.interval[0] <= share.share + 1e-9 and share.share <= share.interval[1] + 1e-9
    kept = next(site.stand_in.coverage for site in report.sites if site.num_calls == 400)
    assert report.shares["shown"].share == pytest.approx(0.5 * kept)
    assert report.shares["unknown"].share == pytest.approx(0.0125)
    low, high = report.replaceable.interval
    assert low < report.replaceable.share < high < 1 and report.replaceable.guess is None


def test_a_prompt_that_does_not_fit_moves_with_a_larger_window_alone() -> None:
    calls = [filling(k) for k in range(60)]
    long = [one.model_copy(update={"request": padded(one.request)}) for one in calls]
    (found,) = assess(long, load_recipe([]), lambda told: None)
    assert found.shares["stays"].share == 1 and "fits 1024 tokens" in found.sites[0].reason
    assert found.not_ruled_out_by_window == {"1024": 0, "4096": 1, "8192": 1, "32768": 1}


def padded(request: dict) -> dict:
    first, *rest = request["messages"]
    return {**request, "messages": [{**first, "content": first["content"] + " pad" * 2_000}, *rest]}


def test_calls_that_hang_together_widen_the_interval() -> None:
    def width(num_sessions: int) -> float:
        sessions = [f"s{k % num_sessions}" for k in range(400)]
        half = [k % num_sessions < num_sessions // 2 for k in range(400)]
        tally = Tally([SiteCalls(sessions, [10] * 400, half, 0.0, 0, False)], [], 20)
        low, high = tally.interval_of(100, ("plausible",))
        assert tally.point(100)["plausible"] == pytest.approx(0.5)
        return high - low

    assert width(8) > 3 * width(400)


def test_a_site_near_the_least_number_of_calls_recurs_in_some_draws_only() -> None:
    sessions = [f"s{k}" for k in range(22)]
    tally = Tally([SiteCalls(sessions, [10] * 22, [True] * 22, 0.0, 0, False)], [f"t{k}" for k in range(22)], 20)
    assert tally.point(100) == {"shown": 0, "plausible": 0.5, "unknown": 0, "stays": 0.5}
    low, high = tally.interval_of(100, ("unknown",))
    assert low == 0 and high > 0.3
    assert Tally([], [], 20).point(100) == dict.fromkeys(VERDICTS, 0.0)
    assert Tally([], ["one"], 20).interval_of(100, ("stays",)) is None


AGENT = """
import os
from openai import OpenAI
from litellm import completion

MODEL = "gpt-4o-mini"
SYSTEM = "You sort mails."
TOOLS = [{"type": "function", "function": {"name": "file_mail", "parameters": {}}}]

class Sorter:
    def sort(self, mail):
        return OpenAI().chat.completions.create(
            model=MODEL, tools=TOOLS, temperature=0,
            messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Mail: {mail}"}])

def plan(text):
    return completion(model=os.environ["MODEL"], messages=make(text), response_format=Plan)

def send(twilio):
    twilio.messages.create(body="no LLM here")
"""


def test_source_tells_the_places_and_what_they_say(tmp_path: pathlib.Path) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "other.py").write_text(AGENT)
    (sort, plan), num_unread = find_source_sites(tmp_path)
    assert num_unread == 1
    assert (sort.function, sort.library, sort.model, sort.temperature) == ("Sorter.sort", "openai", "gpt-4o-mini", 0)
    assert sort.tools == ("file_mail",) and sort.answers == "tool calls or open" and "slots" in sort.prompt
    assert (plan.function, plan.library, plan.model, plan.prompt) == ("plan", "litellm", None, "computed")
    assert plan.answers == "JSON" and plan.tools_are == "none"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no Python file"):
        find_source_sites(tmp_path / "empty")


def test_the_verb_writes_json_and_a_page_that_stands_alone(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, found, page = tmp_path / "calls.jsonl", tmp_path / "found.json", tmp_path / "page.html"
    lines = [
        {"id": one.call_id, "session": one.session_id, "request": one.request, "response": one.response}
        for one in map(filling, range(40))
    ]
    log.write_text("\n".join(map(json.dumps, lines)))
    words = ["assess", str(log), "--agent", "<script>alert(1)</script>", "--json", str(found), "--report", str(page)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "100.0% more are not ruled out" in out and "Cradle" in out and "cannot show" in out
    told = json.loads(found.read_text())
    assert told["agents"][0]["num_calls"] == 40 and told["provenance"]["hardware"]["cores"] >= 1
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "<svg" in text and "note of L7919" not in text
    assert 'src="' not in text and "href=" not in text


def test_the_verb_lists_source_and_refuses_what_it_cannot_read(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    assert main(["assess", str(tmp_path), "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    assert "agent.py:12" in out and "only traffic shows that" in out
    assert len(json.loads((tmp_path / "found.json").read_text())["sites"]) == 2
    assert main(["assess", f"store={tmp_path / 'store'}"]) == 2
    assert "no calls" in capsys.readouterr().err
    assert main(["assess", str(tmp_path), "--report", str(tmp_path / "no" / "page.html")]) == 2
