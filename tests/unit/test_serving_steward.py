"""serving/steward.py with serving/evidence.py: what is counted, when a specialist is demoted or moved on, and who may stop it."""

from __future__ import annotations

import json
import pathlib
import random
import threading
import time
from collections.abc import Sequence

import pytest
from fakes import BASE, REQUEST, FakeApps, llm_body, make_specialist, promote_release

from cluster import registry
from cluster.calls import write_calls
from cluster.compaction import compact_calls
from cluster.errors import ReleaseError
from cluster.events import read_events
from cluster.records import Action, AgentCall, Release, Rollout, RouteDecision
from cluster.store import Store
from serving.evidence import KEPT, LATE_S, Comparison, begin, count
from serving.steward import STATE_FILE, Change, Steward, StewardConfig
from serving.steward_replica import StewardReplica

NOW = 1_000_000.0
NAME = make_specialist().name
SHADOW = Rollout(stage="shadow", canary_share=0.2)


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Store:
    store = Store(str(tmp_path / "store"))
    promote_release(store, tmp_path / "scratch", make_specialist())
    return store


def compared(
    outcomes: Sequence[bool | None],
    *,
    action: Action = "audit",
    begin: float = NOW,
    prefix: str = "a",
    session: str | None = None,
    specialist: str = NAME,
) -> list[AgentCall]:
    """Comparisons a tenth of a second apart, each of a session of its own; True agrees, None is an answer not kept."""
    calls = []
    for number, agrees in enumerate(outcomes):
        reason = (
            "reference stream" if action == "audit" else KEPT if agrees is not None else "confidence below threshold"
        )
        route = RouteDecision(action=action, reason=reason, task_id="triage", specialist=specialist, agrees=agrees)
        name = f"{prefix}{number:05d}"
        calls.append(
            AgentCall(
                call_id=name,
                ts=begin + number / 10,
                client_id="c",
                agent="a",
                session_id=session or f"s-{name}",
                step=0,
                request=REQUEST,
                response=llm_body(),
                route=route,
                is_reference=action == "audit",
                audit_of=f"of-{name}",
            )
        )
    return calls


def step(store: Store, now: float = NOW + 1_000, steward: Steward | None = None) -> Steward:
    steward = steward or Steward(store, StewardConfig())
    steward.step(now)
    return steward


def served(store: Store) -> tuple[str, Release]:
    found = registry.current(store)
    assert found is not None
    return found


def rolled_out(store: Store, rollout: Rollout) -> None:
    sha, release = served(store)
    registry.promote(store, registry.publish_release(store, registry.derive(sha, release, rollout={"triage": rollout})))


BAD = [False] * 30
GOOD = [True] * 100


def test_a_bad_specialist_is_withdrawn_with_its_evidence_and_the_others_stay(store: Store) -> None:
    before, release = served(store)
    other = make_specialist().model_copy(update={"task_id": "other"})
    both = registry.publish_release(
        store, release.model_copy(update={"specialists": {**release.specialists, "other": other}})
    )
    registry.promote(store, both)
    write_calls(store, compared(GOOD) + compared(BAD, begin=NOW + 100, prefix="b"))
    step(store)
    sha, after = served(store)
    assert sorted(after.specialists) == ["other"] and after.previous == both
    assert after.refused["triage"].startswith("demoted: 30 of 130 audited conversations differ from the LLM, evidence ")
    event = read_events(store)[-1]
    assert (event.kind, event.by, event.release, event.before) == ("demote", "steward", sha, both)
    facts = event.evidence["triage"]
    assert (facts["num_compared"], facts["num_disagreements"], facts["specialist"]) == (130, 30, NAME)
    assert (
        facts["peak_risk"] >= 20 and facts["interval"][0] > 0.05 and (facts["from"], facts["to"]) == ("live", "refused")
    )
    assert registry.roll_back(store) == both, "what was served before is one step back"
    assert before != both


def test_a_good_specialist_stays_and_nothing_is_written_twice(store: Store) -> None:
    write_calls(store, compared(GOOD * 3))
    steward = step(store)
    before, written = served(store)[0], store.read_bytes(STATE_FILE)
    step(store, steward=steward)
    step(store)
    assert served(store)[0] == before and store.read_bytes(STATE_FILE) == written
    assert steward.state.evidence[NAME].risk.num_observed == 300


def test_a_comparison_counts_once_whatever_is_read_again(store: Store) -> None:
    calls = compared([True, False] * 10)
    write_calls(store, calls[:12])
    steward = step(store)
    write_calls(store, calls[8:])
    compact_calls(store)
    step(store, steward=steward)
    assert steward.state.evidence[NAME].risk.num_observed == 20
    compact_calls(store)
    risk = step(store).state.evidence[NAME].risk
    assert (risk.num_observed, risk.num_disagreements) == (20, 10)


def test_a_session_counts_once_when_it_is_over_with_the_share_that_differs(store: Store) -> None:
    write_calls(store, compared([True, False, False, True], session="one"))
    steward = step(store, now=NOW + 10)
    assert steward.state.evidence[NAME].risk.num_observed == 0
    write_calls(store, compared([True] * 4, session="one", begin=NOW + 100, prefix="b"))
    step(store, now=NOW + 390, steward=steward)
    assert steward.state.evidence[NAME].risk.num_observed == 0, "it is idle since the newest one"
    step(store, now=NOW + 401, steward=steward)
    write_calls(store, compared(BAD, session="one", begin=NOW + 500, prefix="c"))
    known = step(store, steward=steward).state.evidence[NAME]
    assert (known.risk.num_observed, known.risk.num_disagreements, known.num_repeated) == (1, 0.25, 30)
    assert known.open == {} and "triage" in served(store)[1].specialists


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_what_is_audited_more_is_no_other_risk(share: float) -> None:
    """First steps are wrong in a fifth of the sessions, later ones in 3%: of ten answers 4.7%, below epsilon."""
    rng = random.Random(7)
    seen = [
        Comparison(f"{session}-{at}", 60.0 * session + at, f"s{session}", "audit", NAME, rng.random() >= risk)
        for session in range(1_000)
        for at, risk in enumerate([0.2, *[0.03] * 9])
        if rng.random() < share
    ]
    known = {NAME: begin(make_specialist(), "live", 0.05, 0.0)}
    risk = count(known, seen, now=1e6, idle_s=300.0)[NAME].risk
    assert not risk.is_rejected and risk.num_disagreements / risk.num_observed == pytest.approx(0.047, abs=0.02)


def test_late_ones_and_a_clock_that_runs_ahead_do_no_harm(store: Store) -> None:
    write_calls(store, compared([True], begin=NOW + 900_000, prefix="future"))
    steward = step(store, now=NOW)
    write_calls(store, compared([True] * 5) + compared([True] * 3, begin=NOW - LATE_S - 10, prefix="late"))
    state = step(store, now=NOW + 100, steward=steward).state
    assert state.evidence[NAME].risk.num_observed == 0 and len(state.evidence[NAME].open) == 6
    assert step(store, steward=steward).state.evidence[NAME].risk.num_observed == 6


def test_other_specialists_and_answers_without_an_outcome_say_nothing(store: Store) -> None:
    foreign = compared(BAD, specialist="triage@000000000000")
    unknown = [
        call.model_copy(update={"route": call.route and call.route.model_copy(update={"agrees": None})})
        for call in compared(BAD, prefix="u")
    ]
    write_calls(store, foreign + unknown)
    assert step(store).state.evidence[NAME].risk.num_observed == 0


def test_a_frozen_store_is_counted_and_left_alone_until_it_thaws(store: Store) -> None:
    before = served(store)[0]
    registry.freeze(store, "the LLM is being changed")
    write_calls(store, compared(BAD))
    steward = step(store)
    assert served(store)[0] == before and steward.state.evidence[NAME].risk.is_rejected
    registry.unfreeze(store)
    step(store)
    assert "triage" not in served(store)[1].specialists
    assert [event.kind for event in read_events(store)] == ["promote", "freeze", "unfreeze", "demote"]


def test_promoted_again_a_demoted_specialist_is_demoted_again(store: Store) -> None:
    before = served(store)[0]
    write_calls(store, compared(BAD))
    step(store)
    registry.promote(store, before)
    step(store)
    assert "triage" not in served(store)[1].specialists


def test_a_person_who_is_faster_wins_and_the_next_step_judges_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha, release = served(store)
    mine = registry.publish_release(store, release.model_copy(update={"snapshot": "mine"}))
    write_calls(store, compared(BAD))
    publish = registry.publish_release

    def publish_late(*args: object) -> str:
        registry.promote(store, mine)
        monkeypatch.setattr(registry, "publish_release", publish)
        return publish(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "publish_release", publish_late)
    steward = Steward(store, StewardConfig())
    with pytest.raises(ReleaseError, match=f"CURRENT is {mine}, not {sha}"):
        steward.step(NOW + 1_000)
    assert served(store)[0] == mine
    step(store, steward=steward)
    assert served(store)[1].snapshot == "mine" and "triage" not in served(store)[1].specialists


def test_from_shadow_over_canary_to_live_on_evidence_of_each_stage(store: Store) -> None:
    rolled_out(store, SHADOW)
    steward = step(store, now=NOW - 1)
    write_calls(store, compared([*GOOD, None, None], action="shadow"))
    step(store, now=NOW + 320, steward=steward)
    assert served(store)[1].rollout == {"triage": SHADOW.model_copy(update={"stage": "canary"})}
    assert steward.state.evidence[NAME].num_unkept == 2
    step(store, now=NOW + 321, steward=steward)
    # Shadows that come late are of the stage before, and so are audits from before the canary.
    write_calls(store, compared(GOOD, action="shadow", begin=NOW + 330, prefix="b"))
    write_calls(store, compared(GOOD, begin=NOW, prefix="c"))
    step(store, now=NOW + 650, steward=steward)
    assert served(store)[1].stage_of("triage") == "canary"
    write_calls(store, compared(GOOD, begin=NOW + 660, prefix="d"))
    step(store, now=NOW + 980, steward=steward)
    assert served(store)[1].stage_of("triage") == "live" and served(store)[1].rollout == {}
    moves = [(event.evidence["triage"]["from"], event.evidence["triage"]["to"]) for event in read_events(store)[-2:]]
    assert moves == [("shadow", "canary"), ("canary", "live")]


def test_a_bad_shadow_never_meets_a_client(store: Store) -> None:
    rolled_out(store, SHADOW)
    write_calls(store, compared(BAD, action="shadow"))
    step(store)
    sha, release = served(store)
    assert "triage" not in release.specialists and release.rollout == {} and "demoted" in release.refused["triage"]


def test_the_loop_outlives_what_fails_and_ends_when_told(store: Store) -> None:
    write_calls(store, compared(BAD))
    good = store.read_bytes(registry.CURRENT)
    steward, stop, looked = Steward(store, StewardConfig(interval_s=0.001)), threading.Event(), threading.Event()
    inner = steward.step

    def look(now: float) -> list[Change]:
        looked.set()
        return inner(NOW + 1_000)

    steward.step = look  # type: ignore[method-assign]
    store.write_bytes(registry.CURRENT, b"{}")
    thread = threading.Thread(target=steward.run, args=(stop,))
    thread.start()
    assert looked.wait(5)
    store.write_bytes(registry.CURRENT, good)
    for _ in range(2_000):
        if registry.current_sha(store) != json.loads(good)["release"]:
            break
        stop.wait(0.005)
    stop.set()
    thread.join(5)
    assert not thread.is_alive() and "triage" not in served(store)[1].specialists


def test_a_state_that_is_none_is_told_by_every_step(store: Store) -> None:
    store.write_bytes(STATE_FILE, b'{"cursor": 1}')
    steward = Steward(store, StewardConfig())
    for _ in range(2):
        with pytest.raises(ReleaseError, match="steward/state.json in store .*: not readable; next: remove it"):
            steward.step(NOW)
    store.delete(STATE_FILE)
    steward.step(NOW)


def test_a_person_who_goes_back_right_after_an_advance_begins_the_stage_anew(store: Store) -> None:
    rolled_out(store, SHADOW)
    steward = step(store, now=NOW - 1)
    write_calls(store, compared(GOOD, action="shadow"))
    step(store, now=NOW + 400, steward=steward)
    assert served(store)[1].stage_of("triage") == "canary"
    registry.roll_back(store)
    step(store, now=NOW + 401, steward=steward)
    assert served(store)[1].stage_of("triage") == "shadow"


def test_a_replica_looks_by_itself_and_is_unhealthy_once_its_thread_ended(store: Store) -> None:
    write_calls(store, compared(BAD, begin=time.time() - 600))
    before = registry.current_sha(store)
    replica = StewardReplica(store.uri, {"interval_s": 0.001}, FakeApps(), [BASE])
    for _ in range(2_000):
        if registry.current_sha(store) != before:
            break
        time.sleep(0.005)
    assert "triage" not in served(store)[1].specialists
    replica.check_health()
    replica.__del__()
    for thread in replica._threads:
        thread.join(5)
    with pytest.raises(ReleaseError, match="its thread has ended"):
        replica.check_health()
