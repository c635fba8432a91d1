"""An agent's captured calls -> which of its call sites small models could take, and what the calls cannot show.

What is decided of every call, by rules that stand before any model is trained:

| verdict   | the call                                                                                                  |
|-----------|-----------------------------------------------------------------------------------------------------------|
| shown     | is of a site where a repeater of known answers (training/stand_in.py) passes the gate: the share it keeps |
| plausible | fits, its site recurs with closed or structured answers, on which the LLM agrees with itself              |
| unknown   | is of a site with fewer calls than a task needs                                                           |
| stays     | faces a person, does not fit, or has an open answer; or its site has several forms or contradicts itself  |

Intervals are percentiles over draws of whole sessions with replacement; in each draw the sites that recur are found again,
the other facts of a site are held. Everything is in memory. Nothing is written here, and no message leaves: names are words
that most prompts of a site share.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

from cluster.answers import kind_of, to_text
from cluster.records import AgentCall, AnswerKind, Example, Record, Split
from cluster.store import content_hash
from jobs.assess_shares import Share, SiteCalls, Tally, Verdict
from jobs.recipe import Recipe
from training.candidates import estimate_prompt_tokens, p99
from training.discover import discover
from training.gate import clopper_pearson_interval, release_delta
from training.leakage import ANSWER_FIELDS
from training.naming import Nameable, name_tasks
from training.replaceability import Replaceability, guess_for
from training.splits import SplitConfig, split_of
from training.stand_in import StandInResult, measure_stand_in
from training.validity import FACES_PERSON, find_problem

WINDOWS = (1_024, 4_096, 8_192, 32_768)
"""Windows, in tokens, for which the plausible share is told too."""
_CHARACTERS_PER_TOKEN = 4
_NUM_SITE_CHARS = 12


class SiteReport(Record):
    """One call site of one agent."""

    name: str
    """Words that most of its prompts share."""
    site: str
    """The task's id, else the hash of the call site."""
    is_task: bool
    """Whether discovery makes a task of it."""
    num_calls: int
    share: float
    """Of the agent's answered calls."""
    num_sessions: int
    kind: AnswerKind
    """Of most of its answers."""
    kind_share: float
    prompt_tokens_p50: int
    prompt_tokens_p99: int
    """Characters / 4, as no tokenizer is chosen yet."""
    fitting_share: float
    """Of its calls, those whose prompt and answer fit the window."""
    greedy_share: float | None
    """Of its calls that name a temperature, those with 0; None where none names one."""
    num_repeated: int
    """Calls whose request came at least twice."""
    conflict: float | None
    """Of these, the share whose answer is not the most frequent one to that request; None without any."""
    conflict_least: float
    """Lower end of its exact 95% interval."""
    closed_share: float
    """Calls whose whole answer another call of the site has too."""
    num_answers: int
    """Distinct answers."""
    stand_in: StandInResult | None
    """None where the verdict needs none."""
    verdict: Verdict
    """Shown where part of its calls is."""
    reason: str
    rest_stays: str | None
    """Why what is not shown of it would stay at any window; None where it is plausible."""


class AgentReport(Record):
    """What the calls of one agent show."""

    agent: str
    num_calls: int
    """With a whole answer of an LLM or a person."""
    not_counted: dict[str, int]
    """Why a call is in no share (failed, cut off, answered by a specialist) -> calls."""
    num_sessions: int
    shares: dict[str, Share]
    """Verdict -> its calls, as shares that add up to 1."""
    replaceable: Replaceability
    """share: shown alone; its interval from what a draw shows to what a draw does not rule out."""
    not_ruled_out_by_window: dict[str, float]
    """Window in tokens -> shown and plausible calls together, if only the window were another."""
    left_out: dict[str, int]
    """Why calls stay whatever their site is -> calls."""
    sites: tuple[SiteReport, ...]
    """Most calls first."""
    cannot_show: tuple[str, ...]


class _Call(NamedTuple):
    example: Example
    num_tokens: int
    """Prompt and answer."""
    request_hash: str
    answer: str
    kind: AnswerKind


class _Site(NamedTuple):
    site: str
    is_task: bool
    kind: AnswerKind
    calls: list[_Call]


class _Sorted(NamedTuple):
    usable: list[_Call]
    stay: list[tuple[AgentCall, str]]
    not_counted: Counter[str]


def assess(calls: Sequence[AgentCall], recipe: Recipe, say: Callable[[str], object]) -> list[AgentReport]:
    """Assess each agent, most calls first.

    Args:
        recipe: discover, gate, specialists.max_model_tokens and curate's rules on what may be learned are read.
        say: told of each agent as it begins.
    """
    by_agent: dict[str, list[AgentCall]] = defaultdict(list)
    for call in calls:
        by_agent[call.agent].append(call)
    found = []
    for agent, own in sorted(by_agent.items(), key=lambda item: (-len(item[1]), item[0])):
        say(f"{agent}: {len(own)} calls")
        found.append(_assess_agent(agent, own, recipe))
    return found


def criterion(recipe: Recipe) -> list[str]:
    """What has to be true of a call to count, in words, with the numbers of this recipe."""
    gate, window = recipe.gate, recipe.specialists.max_model_tokens
    return [
        f"recurs: its call site has at least {recipe.discover.min_calls} calls, else nothing is known of it",
        f"fits: prompt and answer have at most {window} tokens (characters / 4), and the answer does not face a person",
        f"shown: a repeater of known answers passes the gate there (at most {gate.epsilon:.0%} of the kept answers differ "
        f"from the LLM's, delta {gate.delta:g} over all sites of the agent); the share of calls that it keeps is shown",
        "plausible otherwise: answers are tool calls, JSON or few labels, discovery makes a task of the site, and its "
        f"answers to repeated requests do not surely differ in more than {gate.epsilon:.0%} of them; anything else stays",
    ]


def _assess_agent(agent: str, calls: Sequence[AgentCall], recipe: Recipe) -> AgentReport:
    sorted_out = _sort_out(calls, recipe)
    sites = _find_sites(sorted_out.usable, recipe)
    total = len(sorted_out.usable) + len(sorted_out.stay)
    facts = [_facts_of(site, total, recipe) for site in sites]
    reports = _judge(sites, facts, recipe)
    tally = Tally(
        [_site_calls(site, report) for site, report in zip(sites, reports, strict=True)],
        [call.session_id for call, _ in sorted_out.stay],
        recipe.discover.min_calls,
    )
    window = recipe.specialists.max_model_tokens
    shares = tally.shares(window)
    shown, open_share = shares["shown"], tally.interval_of(window, ("shown", "plausible", "unknown"))
    return AgentReport(
        agent=agent,
        num_calls=total,
        not_counted=dict(sorted_out.not_counted.most_common()),
        num_sessions=tally.num_sessions,
        shares=shares,
        replaceable=Replaceability(
            agent=agent,
            num_calls=total,
            share=shown.share,
            interval=(shown.interval[0], open_share[1]) if shown.interval and open_share else (0.0, 1.0),
            share_known=shown.share + shares["stays"].share,
            guess=guess_for(agent),
        ),
        not_ruled_out_by_window={
            str(size): sum(tally.point(size)[verdict] for verdict in ("shown", "plausible")) for size in WINDOWS
        },
        left_out=dict(Counter(reason for _, reason in sorted_out.stay).most_common()),
        sites=tuple(sorted(reports, key=lambda one: (-one.num_calls, one.site))),
        cannot_show=tuple(_cannot_show(reports, tally.num_sessions, total, recipe)),
    )


def _sort_out(calls: Sequence[AgentCall], recipe: Recipe) -> _Sorted:
    """Which calls count, and which of these stay whatever their site is."""
    usable, stay, not_counted = [], [], Counter[str]()
    rules = recipe.curate
    for call in calls:
        problem = find_problem(call, keep_faces_person=rules.keep_faces_person, max_prompt_chars=rules.max_prompt_chars)
        if problem is None:
            usable.append(_to_call(call))
        elif problem.reason == FACES_PERSON or problem.reason.startswith("prompt longer"):
            stay.append((call, problem.reason))
        else:
            not_counted[problem.reason] += 1
    return _Sorted(usable, stay, not_counted)


def _to_call(call: AgentCall) -> _Call:
    message = call.message or {}
    answer = to_text(message)
    example = Example(
        example_id=call.call_id,
        split=split_of(call.session_id, SplitConfig()),
        session_id=call.session_id,
        ts=call.ts,
        request=call.request,
        target=message,
        reference="gold" if call.served_by == "gold" else "llm",
        source_call_ids=(call.call_id,),
        client_ids=(call.client_id,),
    )
    num_tokens = estimate_prompt_tokens(call.request) + -(-len(answer) // _CHARACTERS_PER_TOKEN)
    asked = {field: call.request[field] for field in ANSWER_FIELDS if call.request.get(field)}
    return _Call(example, num_tokens, content_hash(asked), answer, kind_of(message, call.request))


def _find_sites(calls: Sequence[_Call], recipe: Recipe) -> list[_Site]:
    """Tasks as discovery finds them, and what is of no task by its call site."""
    if not calls:
        return []
    by_split: dict[Split, list[Example]] = defaultdict(list)
    for call in calls:
        by_split[call.example.split].append(call.example)
    discovery = discover(by_split, recipe.discover)
    found: dict[str, list[_Call]] = defaultdict(list)
    for call in calls:
        task_id = discovery.assignment[call.example.example_id]
        found[task_id or discovery.grouping.sites.site_of(call.example.request).variant[:_NUM_SITE_CHARS]].append(call)
    kinds = {task.task_id: task.kind for task in discovery.tasks}
    return [_Site(site, site in kinds, kinds.get(site) or _most_frequent_kind(own), own) for site, own in found.items()]


def _most_frequent_kind(calls: Sequence[_Call]) -> AnswerKind:
    return Counter(c.kind for c in calls).most_common(1)[0][0]


def _facts_of(site: _Site, total: int, recipe: Recipe) -> dict[str, Any]:
    """What is counted of one site; no answer of it is predicted here."""
    calls, window = site.calls, recipe.specialists.max_model_tokens
    answers = Counter(c.answer for c in calls)
    asked = Counter(c.request_hash for c in calls)
    per_request: dict[str, Counter[str]] = defaultdict(Counter)
    for call in calls:
        if asked[call.request_hash] > 1:
            per_request[call.request_hash][call.answer] += 1
    num_repeated = sum(said.total() for said in per_request.values())
    num_deviating = sum(said.total() - max(said.values()) for said in per_request.values())
    temperatures = [c.example.request["temperature"] for c in calls if c.example.request.get("temperature") is not None]
    prompts = [estimate_prompt_tokens(c.example.request) for c in calls]
    kinds = Counter(c.kind for c in calls)
    return {
        "site": site.site,
        "is_task": site.is_task,
        "num_calls": len(calls),
        "share": len(calls) / total,
        "num_sessions": len({c.example.session_id for c in calls}),
        "kind": site.kind,
        "kind_share": 1.0 if site.kind == "label" else kinds[site.kind] / len(calls),
        "prompt_tokens_p50": int(median(prompts)),
        "prompt_tokens_p99": p99(prompts),
        "fitting_share": sum(c.num_tokens <= window for c in calls) / len(calls),
        "greedy_share": sum(t == 0 for t in temperatures) / len(temperatures) if temperatures else None,
        "num_repeated": num_repeated,
        "conflict": num_deviating / num_repeated if num_repeated else None,
        "conflict_least": clopper_pearson_interval(num_deviating, num_repeated)[0] if num_repeated else 0.0,
        "closed_share": sum(n for n in answers.values() if n > 1) / len(calls),
        "num_answers": len(answers),
    }


def _judge(sites: Sequence[_Site], facts: Sequence[dict[str, Any]], recipe: Recipe) -> list[SiteReport]:
    """The verdict on each site, with the stand-in tried wherever counting alone does not decide."""
    early = [_decide_early(one, recipe) for one in facts]
    delta = release_delta(recipe.gate.delta, max(1, early.count(None)))
    names = name_tasks([Nameable(site.kind, [_as_train(c.example) for c in site.calls], True) for site in sites])
    reports = []
    for site, one, decided, name in zip(sites, facts, early, names, strict=True):
        stand_in = None if decided else measure_stand_in(site.kind, _split(site, recipe), recipe.gate, delta)
        rest_stays = _why_rest_stays(one, recipe)
        verdict, reason = decided or _decide(stand_in, rest_stays)
        reports.append(
            SiteReport(name=name, stand_in=stand_in, verdict=verdict, reason=reason, rest_stays=rest_stays, **one)
        )
    return reports


def _decide_early(facts: dict[str, Any], recipe: Recipe) -> tuple[Verdict, str] | None:
    """What is decided by counting alone; None where the stand-in is to be tried."""
    if facts["num_calls"] < recipe.discover.min_calls:
        return "unknown", f"{facts['num_calls']} calls; a task needs {recipe.discover.min_calls}"
    if not facts["is_task"]:
        return "stays", "answers of several forms, of which discovery makes no task"
    if facts["fitting_share"] == 0:
        return "stays", f"no prompt with its answer fits {recipe.specialists.max_model_tokens} tokens"
    return None


def _why_rest_stays(facts: dict[str, Any], recipe: Recipe) -> str | None:
    """Why what is not shown of a recurring site stays, whatever the window; None where it is plausible."""
    if not facts["is_task"] and facts["num_calls"] >= recipe.discover.min_calls:
        return "no task"
    if facts["kind"] == "text":
        return "open answers: two good ones differ, so agreement says nothing of them"
    if facts["conflict_least"] > recipe.gate.epsilon:
        return f"the LLM contradicts itself on {facts['conflict']:.0%} of {facts['num_repeated']} repeated requests"
    return None


def _decide(stand_in: StandInResult | None, rest_stays: str | None) -> tuple[Verdict, str]:
    assert stand_in is not None
    if stand_in.refused is None:
        return "shown", f"a repeater of {stand_in.num_answers} answers keeps {stand_in.coverage:.0%} of its calls"
    if rest_stays:
        return "stays", rest_stays
    return "plausible", f"closed or structured; the repeater alone is refused: {stand_in.refused}"


def _site_calls(site: _Site, report: SiteReport) -> SiteCalls:
    """A call whose own answer is open cannot move with a site of tool calls or JSON: the LLM spoke to someone there."""
    can_move = [site.kind in (c.kind, "label") for c in site.calls]
    return SiteCalls(
        [c.example.session_id for c in site.calls],
        [c.num_tokens for c in site.calls],
        can_move,
        report.stand_in.coverage if report.stand_in else 0.0,
        report.stand_in.num_calibration if report.stand_in else 0,
        report.rest_stays is not None,
    )


def _split(site: _Site, recipe: Recipe) -> dict[Split, list[Example]]:
    """The site's fitting calls by split; train without requests that a later split holds too, as curation has it."""
    by_split: dict[Split, list[_Call]] = defaultdict(list)
    for call in site.calls:
        if call.num_tokens <= recipe.specialists.max_model_tokens:
            by_split[call.example.split].append(call)
    held_out = {call.request_hash for split, calls in by_split.items() if split != "train" for call in calls}
    by_split["train"] = [call for call in by_split["train"] if call.request_hash not in held_out]
    return {split: [call.example for call in calls] for split, calls in by_split.items()}


def _as_train(example: Example) -> Example:
    """Names are made of train examples; a site may have none."""
    return example.model_copy(update={"split": "train"})


def _cannot_show(reports: Sequence[SiteReport], num_sessions: int, total: int, recipe: Recipe) -> list[str]:
    """What the agent's calls leave open, in sentences for people."""
    told = [
        "Whether a fine-tuned model does what the repeater cannot: fill in values that it has not seen, or read more than "
        "words. Only a conversion with its gate shows that.",
        "Whether the LLM's answers were right: agreement with the LLM is measured, nothing else.",
    ]
    if num_sessions >= total:
        told.append(
            "How calls hang together: no sessions were recorded, so each call counts as one, and intervals may be "
            "too narrow."
        )
    small = sum(one.num_calls for one in reports if one.verdict == "unknown")
    small_open = sum(one.num_calls for one in reports if one.verdict == "unknown" and one.kind == "text")
    if small:
        told.append(
            f"Anything of {small} of {total} calls, whose sites were seen fewer than {recipe.discover.min_calls} times: more "
            f"traffic would tell. The sites of {small_open} of them answer in open text so far."
        )
    if not any(one.num_repeated for one in reports):
        told.append("Whether the LLM answers the same request the same way: no request came twice.")
    return told
