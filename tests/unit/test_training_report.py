"""The report shows every task and every reason, and nothing that comes from traffic can act on its page."""

import base64
import html.parser
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.records import Gate, TaskSpec
from training.candidates import BaseCandidate
from training.catalog import Needs
from training.evaluation import Arm, Evaluation, newcombe_interval, validation_agreement
from training.gate import Outcome, clopper_pearson_interval, coverage_curve
from training.pictures import percent
from training.reliability import coverage_by_epsilon, reliability
from training.replaceability import Moved, SiteFacts, replaceability
from training.report import write_report
from training.selection import Selection
from training.snapshot import CurationCounts
from training.usefulness import Usefulness, compare

HOSTILE = '<script>alert("x")</script>\' onerror=$\\frac$ \u202e\u0416\ud800\x07'
REASON = "too few calibration calls: needs 12 more & <b>better</b> examples"
VOID = {"meta", "img", "br", "link", "input", "hr"}


def task(task_id: str, name: str, num_calls: int, share: float) -> TaskSpec:
    return TaskSpec(
        task_id=task_id,
        name=name,
        signature="s",
        kind="tool_call",
        reference="llm",
        num_calls=num_calls,
        share_calls=share,
        share_cost=share,
        num_examples={"train": num_calls},
    )


def arm(name: str, num_calls: int, num_kept: int, wrong: int) -> Arm:
    return Arm(
        name=name,
        num_calls=num_calls,
        coverage=num_kept / num_calls,
        num_kept=num_kept,
        num_disagreements=wrong,
        disagreement=wrong / num_kept if num_kept else None,
        interval=clopper_pearson_interval(wrong, num_kept) if num_kept else (0.0, 1.0),
    )


def evaluation(task_id: str, refused: str | None = None) -> Evaluation:
    is_open = refused is None
    outcomes = [Outcome(confidence=1 - i / 200, agrees=i < 80 or i % 3 > 0, session_id=f"s{i}") for i in range(120)]
    gate = Gate(
        reference="llm",
        population="calls of this task as served",
        epsilon=0.05,
        delta=0.025,
        threshold=0.613 if is_open else None,
        num_calibration=120,
        num_accepted=77 if is_open else 0,
        num_disagreements=0,
        upper_bound=0.0468 if is_open else None,
        coverage=0.6417 if is_open else 0.0,
        fingerprint="f",
        refused=refused,
    )
    gated = arm("specialist + gate", 100, 63 if is_open else 0, 1 if is_open else 0)
    arms = (arm("scratch base (as given)", 100, 100, 42), arm("specialist", 100, 100, 11), gated)
    return Evaluation(task_id=task_id, gate=gate, arms=arms, curve=tuple(coverage_curve(outcomes)))


TASKS = [
    task("t1", "route ticket", 900, 0.6),
    task("t2", HOSTILE, 450, 0.3),
    task("t3", "refund", 60, 0.04),
    task("t4", "rare", 3, 0.01),
]
INPUTS = {
    "tasks": TASKS,
    "evaluations": [evaluation("t1"), evaluation("t2", refused=REASON)],
    "refused": {"t2": REASON, "t3": "no examples in test (60 calls in all)"},
    "unassigned": {"too_rare <i>": 17, "failed": 4},
    "losses": {"t1": {"eval_loss": 0.12345, "step": 40}, "t2": {"eval_loss": 0.5}},
    "summary": {
        "share_off_llm": 0.412,
        "cost_ratio": 0.37,
        "agreement_interval": [0.951, 0.993],
        "p50_ms": 41.5,
        "p99_ms": 12345.6,
        "routes": {"a<b": 3},
    },
    "notes": ["the LLM is scripted & free"],
}


class Page(html.parser.HTMLParser):
    """Collects elements, attributes and text; fails where an element closes that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(path: pathlib.Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("report") / "new" / "report.html"
    write_report(made, **INPUTS)
    return made


def test_hostile_names_and_reasons_are_text_everywhere(path):
    page = parse(path)
    shown = HOSTILE.replace("\ud800", "?")
    assert shown in page.text and "<b>better</b>" in page.text and "too_rare <i>" in page.text
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "b", "i"})
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert any(shown in (attrs.get("alt") or "") for _, attrs in page.elements)


def test_page_stands_alone(path):
    assert not re.search(r"https?:|url\(|@import|=\"//", path.read_text(encoding="utf-8"))
    elements = parse(path).elements
    assert {tag for tag, _ in elements}.isdisjoint({"link", "iframe", "object"})
    assert all(attrs["src"].startswith("data:image/svg+xml;base64,") for _, attrs in elements if "src" in attrs)
    assert not any("href" in attrs for _, attrs in elements)


def test_every_task_and_reason_appears_by_volume(path):
    text = parse(path).text
    places = [text.index(t.name.replace("\ud800", "?")) for t in TASKS]
    assert places == sorted(places)
    assert REASON in text and "no examples in test (60 calls in all)" in text and "not evaluated" in text


def test_headline_counts_what_moved(path):
    text = parse(path).text
    assert "1 of 4 tasks moved" in text and "60.0% of the captured calls" in text and "about 38.5% of all calls" in text


def test_arms_gain_losses_and_summary_are_shown(path):
    text = parse(path).text
    for shown in ("scratch base (as given)", "LLM (reference)", "+31.0 percentage points", "no answers kept"):
        assert shown in text
    assert "0.1235" in text and "95.1% to 99.3%" in text and "12346" in text and "a<b: 3" in text
    assert "the LLM is scripted & free" in text and "4.7%" in text


def test_pictures_have_alt_text_and_the_page_a_language(path):
    elements = parse(path).elements
    pictures = [attrs for tag, attrs in elements if tag == "img"]
    assert len(pictures) == 4 and all(len(attrs["alt"]) > 30 for attrs in pictures)
    assert "threshold 0.613: coverage 65.0%, disagreement 0.0%" in pictures[2]["alt"]
    assert "no threshold was opened" in pictures[3]["alt"]
    assert all(b"<svg" in base64.b64decode(a["src"].split(",")[1]) for a in pictures)
    assert ("html", {"lang": "en"}) in elements


def test_nothing_moved_and_nothing_measured(tmp_path):
    empty = dict.fromkeys(("refused", "unassigned", "losses"), {})
    bare = evaluation("t1", refused="none of 5 validation answers can be used").model_copy(update={"curve": ()})
    write_report(tmp_path / "r.html", tasks=TASKS[:1], evaluations=[bare], summary=None, notes=[], **empty)
    text = parse(tmp_path / "r.html").text
    assert "all 1 tasks stay on the LLM" in text and "none of 5 validation answers" in text
    assert "so there is no curve" in text and "Money" not in text and "Every call belongs to a task" in text
    write_report(tmp_path / "r.html", tasks=[], evaluations=[], summary=None, notes=[], **empty)
    assert "all 0 tasks" in parse(tmp_path / "r.html").text


def test_the_page_tells_how_the_base_was_chosen(tmp_path):
    needs = Needs(p99_prompt_tokens=9, needs_tool_use=False, allowed_licenses=None, memory_gib=1.0, max_model_tokens=64)
    away = BaseCandidate(name="a/b", status="unavailable", reason="cannot be fetched <hub>")
    chosen = Selection(
        base="x", is_scratch=True, arm="arm", rule="the smallest", needs=needs, candidates=(away,), key="k"
    )
    write_report(tmp_path / "r.html", **INPUTS, selection=chosen)
    text = parse(tmp_path / "r.html").text
    assert "the smallest" in text and "unavailable" in text and "cannot be fetched <hub>" in text


def test_a_refusal_outweighs_an_open_gate(tmp_path):
    changed = {"tasks": TASKS[:1], "evaluations": [evaluation("t1")], "refused": {"t1": "withdrawn by hand"}}
    write_report(tmp_path / "r.html", **{**INPUTS, **changed})
    text = parse(tmp_path / "r.html").text
    assert "No calls moved" in text and "withdrawn by hand" in text


def test_newcombe_interval_of_the_source():
    assert newcombe_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)


@given(st.integers(1, 500), st.integers(1, 500), st.data())
def test_newcombe_interval_holds_the_difference_and_flips_with_the_samples(calls_a, calls_b, data):
    a, b = data.draw(st.integers(0, calls_a)), data.draw(st.integers(0, calls_b))
    low, high = newcombe_interval(a, calls_a, b, calls_b)
    assert -1 - 1e-9 <= low <= a / calls_a - b / calls_b <= high <= 1 + 1e-9
    assert newcombe_interval(b, calls_b, a, calls_a) == pytest.approx((-high, -low))


def test_the_page_says_what_curation_left_out_and_flagged(tmp_path):
    counts = CurationCounts(
        num_calls=90,
        dropped={"answer is a refusal": 7, HOSTILE: 3},
        num_examples={"train": 40, "test": 20},
        num_source_calls={"train": 60, "test": 20},
        num_train_requests_with_several_answers=2,
        redacted={"PERSON": 11},
        flagged={"planted instruction": 5},
        num_clients=4,
        num_sessions={"train": 30, "test": 10},
        test_drawn={"by time": 40, "by hash": 0},
    )
    path = tmp_path / "report.html"
    write_report(
        path, tasks=[], evaluations=[], refused={}, unassigned={}, losses={}, summary=None, notes=[], curation=counts
    )
    page = path.read_text()
    for said in ("answer is a refusal", "planted instruction", "PERSON", "40 by time", "4 clients", "90 calls, 10 of"):
        assert said in page
    assert "<script>" not in page


def test_the_page_says_how_often_specialists_agree_and_why_tasks_are_together_or_apart(tmp_path):
    tie = compare([True] * 93 + [False] * 7, [True] * 92 + [False] * 8, num_parts=2, num_compared=1)
    found = Usefulness(task_ids=("t1",), reason=REASON, compared=(tie,), base="scratch-micro", num_steps=60)
    told = {"usefulness": [found], "left_out": {"t1": "70 of 100 train prompts are longer than 768 tokens"}}
    write_report(tmp_path / "report.html", **{**INPUTS, **told})
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert "joint 0.93, 2 parts 0.92, difference -0.01 [" in page.text
    assert f"kept together: {REASON}" in page.text, "escaped where it stands"
    assert (
        "70 of 100 train prompts" in page.text and percent(validation_agreement(INPUTS["evaluations"][0])) in page.text
    )


def test_the_page_shows_what_moves_each_agent_and_the_papers_guesses(tmp_path):
    facts = [SiteFacts("helpdesk", "t1", 900, 120, 77), SiteFacts("helpdesk", "t2", 450, stays=REASON)]
    found = replaceability([*facts, SiteFacts("open-operator", "t9", 30)])
    totals = {"calls": found[0], "tokens": found[0], "money": found[0]}
    moved = Moved(totals=totals, agents=tuple(found))
    measured = evaluation("t1")
    outcomes = [Outcome(confidence=(i + 1) / 200, agrees=i % 3 > 0, session_id=f"s{i}") for i in range(200)]
    measured = measured.model_copy(update={"reliability": reliability(outcomes)})
    told = {"evaluations": [measured, INPUTS["evaluations"][1]], "moved": moved}
    write_report(tmp_path / "report.html", **{**INPUTS, **told})
    page = parse(tmp_path / "report.html")
    share = percent(found[0].share)
    assert page.text.count(share) >= 4 and "MetaGPT 60.0%, Open Operator 40.0%, Cradle 70.0%" in page.text
    assert "Coverage for every epsilon" in page.text
    alts = [attrs["alt"] for tag, attrs in page.elements if tag == "img"]
    assert any(alt.startswith("Replaceable share of each agent's calls: helpdesk " + share) for alt in alts)
    assert any("that agree, by confidence, for route ticket: " in alt for alt in alts)


def test_bins_hold_every_usable_answer_once_and_other_promises_keep_more():
    outcomes = [Outcome(confidence=(i % 97) / 97, agrees=i % 5 > 0, session_id=f"s{i}") for i in range(97)]
    bins = reliability(outcomes)
    assert sum(one.num_calls for one in bins) == 96 and len(bins) == 10
    assert [one.confidence for one in bins] == sorted(one.confidence for one in bins)
    assert all(one.interval[0] <= one.num_agreements / one.num_calls <= one.interval[1] for one in bins)
    found = coverage_by_epsilon(evaluation("t1").curve)
    assert [likely for _, likely, _ in found] == sorted(likely for _, likely, _ in found)
    assert all(sure <= likely for _, likely, sure in found) and reliability([]) == ()
