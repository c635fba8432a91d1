"""The page's endpoints: who may see and do what, what an action needs besides a key, and that content never comes along."""

from __future__ import annotations

import asyncio
import json
import pathlib
import re
import tomllib
from typing import Any

from fakes import REQUEST, Running, gateway
from staged import CONTENT, TASKS, other_release, stage

from cluster import registry
from cluster.access import ApiKeys
from cluster.events import read_events
from cluster.records import AgentCall, RouteDecision
from serving.decisions import MAX_KEPT, RecentDecisions
from serving.rollout import RolloutConfig
from serving.status import MAX_ACTION_BYTES, TOKEN_HEADER, TOKEN_S, issue_token, status_routes

ROOT = pathlib.Path(__file__).parents[2]
VIEWS = ("/status/session", "/status/overview", "/status/live", "/status/tasks/triage")
SHELL = ("/", "/status/page.css", "/status/page.js")
ACTIONS = ("/status/freeze", "/status/unfreeze", "/status/promote", "/status/rollback")
OWN = {"sec-fetch-site": "same-origin"}


def _headers(tmp_path: pathlib.Path, role: Any, client: str = "ann") -> dict[str, str]:
    return {"Authorization": f"Bearer {ApiKeys(tmp_path / 'keys.json').create(client, role)}"}


async def _admin(run: Running, tmp_path: pathlib.Path) -> dict[str, str]:
    """Headers of an action that is allowed."""
    headers = _headers(tmp_path, "admin")
    session = (await run.http.get("/status/session", headers=headers)).json()
    return {**headers, **OWN, TOKEN_HEADER: session["token"]}


def test_every_endpoint_answers_each_role_as_the_table_says(tmp_path: pathlib.Path) -> None:
    expected = {None: (401, 401), "agent": (403, 403), "viewer": (200, 403), "curator": (200, 403), "admin": (200, 200)}

    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            sha, waits = stage(run.store), other_release(run.store)
            assert set(status_routes(run.core)) == {*SHELL, *VIEWS[:3], "/status/tasks/{task_id}", *ACTIONS}
            token = (await _admin(run, tmp_path))[TOKEN_HEADER]
            for role, (sees, acts) in expected.items():
                headers = _headers(tmp_path, role, f"the {role}") if role else {"Authorization": "Bearer us-no"}
                for path in SHELL:
                    assert (await run.http.get(path, headers=headers)).status_code == 200
                for path in VIEWS:
                    reply = await run.http.get(path, headers=headers)
                    assert (path, role, reply.status_code) == (path, role, sees)
                    assert sees == 200 or reply.json()["error"]["code"] in (
                        "invalid_api_key",
                        "insufficient_permissions",
                    )
                if role == "admin":
                    session = (await run.http.get("/status/session", headers=headers)).json()
                    assert session["can_administer"] and session["role"] == "admin"
                    token = session["token"]
                before = registry.current_sha(run.store), len(read_events(run.store))
                for path in ACTIONS:
                    served = {"expected": registry.current_sha(run.store)}
                    promotion = {"release": waits, "stage": "live", **served}
                    body = {ACTIONS[2]: promotion, ACTIONS[3]: served}.get(path, {})
                    reply = await run.http.post(path, json=body, headers={**headers, **OWN, TOKEN_HEADER: token})
                    assert (path, role, reply.status_code, "error" in reply.json()) == (path, role, acts, acts != 200)
                    assert acts != 403 or reply.json()["error"]["code"] == "insufficient_permissions"
                if acts != 200:
                    assert before == (registry.current_sha(run.store), len(read_events(run.store)))
            kinds = [(event.kind, event.by) for event in read_events(run.store)[-4:]]
            assert kinds == [(kind, "person") for kind in ("freeze", "unfreeze", "promote", "roll_back")]
            assert registry.current_sha(run.store) == sha

    asyncio.run(scenario())


def test_a_viewer_gets_no_token(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            session = (await run.http.get("/status/session", headers=_headers(tmp_path, "viewer"))).json()
            assert session == {
                "role": "viewer", "client": "ann", "is_open": False, "can_administer": False, "token": None,
            }  # fmt: skip

    asyncio.run(scenario())


FOREIGN: list[tuple[dict[str, str | None], int, str]] = [
    ({"sec-fetch-site": "cross-site"}, 403, "not_own"),
    ({"sec-fetch-site": "same-site"}, 403, "not_own"),
    ({"sec-fetch-site": "none"}, 403, "not_own"),
    ({"sec-fetch-site": None}, 403, "not_own"),
    ({"sec-fetch-site": None, "origin": "http://evil.example"}, 403, "not_own"),
    ({"sec-fetch-site": None, "origin": "http://gateway.evil.example"}, 403, "not_own"),
    ({"sec-fetch-site": None, "origin": "null"}, 403, "not_own"),
    ({"sec-fetch-site": None, "origin": "http://["}, 403, "not_own"),
    ({"sec-fetch-site": None, "origin": "null", "host": ""}, 403, "not_own"),
    # Fetch metadata is the browser's own word: an origin that fits does not outweigh it.
    ({"sec-fetch-site": "cross-site", "origin": "http://gateway"}, 403, "not_own"),
    ({"content-type": "text/plain"}, 415, "unsupported_media_type"),
    ({"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
    ({TOKEN_HEADER: None}, 403, "invalid_token"),
    ({TOKEN_HEADER: "99999999999.00"}, 403, "invalid_token"),
    ({TOKEN_HEADER: "x.\u00e9"}, 403, "invalid_token"),
]


def test_an_action_that_is_not_the_page_s_own_is_refused(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            own = {**await _admin(run, tmp_path), "content-type": "application/json"}
            for change, status, code in FOREIGN:
                headers = {**own, **change}
                sent = [(name.encode(), value.encode()) for name, value in headers.items() if value is not None]
                reply = await run.http.post("/status/freeze", content=b"{}", headers=sent)
                assert (change, reply.status_code, reply.json()["error"]["code"]) == (change, status, code)
            assert not registry.is_frozen(run.store)

    asyncio.run(scenario())


def test_an_origin_that_fits_stands_for_fetch_metadata_where_a_browser_sends_none(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            headers = {**await _admin(run, tmp_path), "origin": "http://gateway"}
            del headers["sec-fetch-site"]
            reply = await run.http.post("/status/freeze", json={"reason": "look"}, headers=headers)
            assert reply.status_code == 200 and registry.is_frozen(run.store)

    asyncio.run(scenario())


def test_a_token_is_of_one_key_and_ends(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            headers, other = await _admin(run, tmp_path), _headers(tmp_path, "admin", "eve")
            stolen = {**headers, **other}
            assert (await run.http.post("/status/freeze", json={}, headers=stolen)).status_code == 403
            identity = run.core.admission.admit({"authorization": headers["Authorization"]}, "administer")
            until = int(headers[TOKEN_HEADER].partition(".")[0])
            old = issue_token(run.core, identity, until - 2 * TOKEN_S)
            for token in (old, headers[TOKEN_HEADER].replace(str(until), str(until + 9))):
                reply = await run.http.post("/status/freeze", json={}, headers={**headers, TOKEN_HEADER: token})
                assert reply.json()["error"]["code"] == "invalid_token"
            ApiKeys(tmp_path / "keys.json").revoke("ann")
            assert (await run.http.post("/status/freeze", json={}, headers=headers)).status_code == 401
            assert not registry.is_frozen(run.store)

    asyncio.run(scenario())


def test_actions_refuse_what_they_do_not_know_and_what_is_no_longer_so(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            headers, first, sha = await _admin(run, tmp_path), run.release, stage(run.store)
            waits = other_release(run.store)
            wishes: list[tuple[str, Any, int]] = [
                ("/status/promote", {"release": "../" + "a" * 61, "stage": "live", "expected": sha}, 400),
                ("/status/promote", {"release": waits, "stage": "all", "expected": sha}, 400),
                ("/status/promote", {"release": waits, "stage": "live"}, 400),
                ("/status/promote", {"release": waits, "stage": "live", "expected": first}, 409),
                ("/status/promote", {"release": waits, "stage": "live", "expected": None}, 409),
                ("/status/promote", {"release": "0" * 64, "stage": "live", "expected": sha}, 409),
                ("/status/rollback", {"expected": waits}, 409),
                ("/status/rollback", {}, 400),
                ("/status/freeze", {"reason": "x" * 201}, 400),
                ("/status/freeze", {"reason": "x" * MAX_ACTION_BYTES}, 413),
                ("/status/unfreeze", {"more": 1}, 400),
                ("/status/unfreeze", [], 400),
            ]
            for path, wish, status in wishes:
                reply = await run.http.post(path, json=wish, headers=headers)
                assert (path, wish, reply.status_code) == (path, wish, status) and reply.json()["error"]["message"]
            assert registry.current_sha(run.store) == sha
            # A word that is said twice goes back once.
            replies = [await run.http.post("/status/rollback", json={"expected": sha}, headers=headers) for _ in "ab"]
            assert [reply.status_code for reply in replies] == [200, 409]
            assert replies[0].json()["release"] == registry.current_sha(run.store) == first
            run.core.rollout = RolloutConfig(canary_share=0.3, audit_share=0.7)
            wish = {"release": waits, "stage": "canary", "expected": first}
            promoted = (await run.http.post("/status/promote", json=wish, headers=headers)).json()["release"]
            served = registry.current(run.store)
            assert served and served[0] == promoted
            assert {task: served[1].stage_of(task) for task in served[1].specialists} == {
                "triage": "canary", "invoice": "canary",
            }  # fmt: skip
            shares = {(one.canary_share, one.audit_share) for one in served[1].rollout.values()}
            assert shares == {(0.3, 0.7)}, "what the recipe says of a stage"

    asyncio.run(scenario())


def test_without_keys_everybody_may_look_and_nobody_may_act(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, auth="open") as run:
            assert 'data-auth="open"' in (await run.http.get("/")).text
            session = (await run.http.get("/status/session")).json()
            assert (session["is_open"], session["can_administer"], session["token"]) == (True, False, None)
            assert (await run.http.get("/status/overview")).status_code == 200
            identity = run.core.admission.admit({}, "administer")
            headers = {**OWN, TOKEN_HEADER: issue_token(run.core, identity, 1e12)}
            for path in ACTIONS:
                assert (await run.http.post(path, json={}, headers=headers)).status_code == 403
            assert not registry.is_frozen(run.store)

    asyncio.run(scenario())


def test_the_shell_has_no_data_and_a_policy_that_holds_for_it(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            stage(run.store)
            for path in SHELL:
                reply = await run.http.get(path)
                rules = dict(rule.strip().split(" ", 1) for rule in reply.headers["content-security-policy"].split(";"))
                assert rules["default-src"] == "'none'" and rules["script-src"] == rules["connect-src"] == "'self'"
                assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
                assert "unsafe" not in str(rules) and reply.headers["x-content-type-options"] == "nosniff"
                assert "triage" not in reply.text and "set-cookie" not in reply.headers
                # Nothing from elsewhere, but the name of SVG's vocabulary.
                assert set(re.findall(r"https?://[^\"' ]+", reply.text)) <= {"http://www.w3.org/2000/svg"}
            html = (await run.http.get("/")).text
            scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.DOTALL)
            assert [body for _, body in scripts] == [""] and not re.search(r"<style|\sstyle=|\son\w+=", html)
            script = (await run.http.get("/status/page.js")).text
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\.style\b|cookie", script
            )
            ids = set(re.findall(r'id="([\w-]+)"', html))
            named = set(re.findall(r'\$\("([\w-]+)"\)', script)) | set(
                re.findall(r'(?:for|aria-\w+by)="([\w-]+)"', html)
            )
            assert named <= ids

    asyncio.run(scenario())


def test_no_content_is_in_any_answer(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            stage(run.store)
            said = [{"role": "system", "content": CONTENT}, {"role": "user", "content": CONTENT}]
            await run.ask()
            await run.ask(messages=said)
            headers = _headers(tmp_path, "admin")
            paths = ["/status/session", "/status/overview", "/status/live", *(f"/status/tasks/{one}" for one in TASKS)]
            for path in paths:
                reply = await run.http.get(path, headers=headers)
                assert reply.status_code == 200 and reply.headers["cache-control"] == "no-store"
                assert CONTENT not in reply.text and REQUEST["messages"][0]["content"] not in reply.text

    asyncio.run(scenario())


def test_tasks_are_shown_with_state_promise_and_live_evidence(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            sha = stage(run.store)
            waits, headers = other_release(run.store), _headers(tmp_path, "viewer")
            registry.freeze(run.store, "holiday")
            await run.core.table.refresh()
            facts = (await run.http.get("/status/overview", headers=headers)).json()
            assert (facts["release"], facts["roll_back_to"], facts["here"]["release"]) == (sha, run.release, sha)
            assert (facts["is_frozen"], facts["frozen_reason"]) == (True, "holiday")
            assert {task["task_id"]: task["state"] for task in facts["tasks"]} == TASKS
            assert [task["num_calls"] for task in facts["tasks"]] == [4000, 2000, 1333, 1000, 800, 666]
            triage, *_, summary, greeting, _ = facts["tasks"]
            assert (triage["coverage"], triage["upper_bound"], triage["epsilon"]) == (0.8, 0.03, 0.05)
            assert (triage["evidence"]["num_compared"], triage["evidence"]["num_disagreements"]) == (240, 4)
            assert summary["reason"].startswith("too few") and greeting["reason"].startswith("demoted: 31 of 200")
            assert [(one["release"], one["is_served"]) for one in facts["releases"]] == [
                (waits, False), (sha, True), (run.release, False),
            ]  # fmt: skip
            assert [event["kind"] for event in facts["events"]] == ["freeze", "advance", "promote"]
            page = (await run.http.get("/status/tasks/triage", headers=headers)).json()
            assert [arm["name"] for arm in page["arms"]] == ["base", "specialist", "specialist + gate"]
            assert page["gate"]["num_calibration"] == 100 and len(page["curve"]) == 20
            invoice = (await run.http.get("/status/tasks/invoice", headers=headers)).json()
            assert [one["tasks"]["invoice"]["num_compared"] for one in invoice["changes"]] == [120]

    asyncio.run(scenario())


def test_a_refused_task_shows_what_the_conversion_measured(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            sha = stage(run.store)
            report = run.store.read_json("reports/triage.json") | {"task_id": "summary"}
            run.store.write_json(f"releases/{sha}.report.json", {"evaluations": [report], "said": CONTENT})
            reply = await run.http.get("/status/tasks/summary", headers=_headers(tmp_path, "viewer"))
            assert len(reply.json()["arms"]) == 3 and CONTENT not in reply.text

    asyncio.run(scenario())


STRANGE = [
    "..",
    "../CURRENT",
    "..%2F..%2Fkeys",
    "%2e%2e%2freports%2ftriage",
    "triage%00",
    "identity",
    "x" * 5000,
    "%ff",
]


def test_a_task_s_name_leads_nowhere_else(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            stage(run.store)
            headers = _headers(tmp_path, "admin")
            for task in STRANGE:
                reply = await run.http.get(f"/status/tasks/{task}", headers=headers)
                assert (task, reply.status_code, reply.json()["error"]["code"]) == (task, 404, "not_found")
                assert str(tmp_path) not in reply.text

    asyncio.run(scenario())


def test_live_shows_decisions_counts_and_latency_of_this_gateway(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            headers = _headers(tmp_path, "viewer")
            call_ids = [(await run.ask()).headers["x-understudy-call-id"] for _ in range(2)]
            llm = await run.ask(model="understudy/llm") if run.core.fallback.has_own_model else None
            sent = await run.http.post("/v1/chat/completions", json=REQUEST, headers={"x-understudy-route": "llm"})
            live = (await run.http.get("/status/live", headers=headers)).json()
            shown = [(one["call_id"], one["task_id"], one["action"]) for one in live["decisions"]]
            own = [(sent.headers["x-understudy-call-id"], None, "llm")]
            assert llm is None and shown == [*own, *((call_id, "triage", "accept") for call_id in reversed(call_ids))]
            assert live["counts"]["calls"] == {"accept": 2, "llm": 1} and live["latencies"]["triage"]["num_calls"] == 2
            assert all(one["latency_ms"] > 0 and one["reason"] for one in live["decisions"])

    asyncio.run(scenario())


def test_a_store_that_cannot_be_read_is_said_without_its_place(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.store.write_bytes("CURRENT", b"{")
            reply = await run.http.get("/status/overview", headers=_headers(tmp_path, "viewer"))
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "store_unreadable")
            assert str(tmp_path) not in reply.text

    asyncio.run(scenario())


def test_the_last_decisions_are_kept_and_told_by_nearest_rank() -> None:
    kept = RecentDecisions()
    for number in range(MAX_KEPT + 10):
        route = RouteDecision(action="escalate", reason="r" * 500, task_id="t", confidence=float("nan"))
        facts = {"call_id": str(number), "ts": 1.0, "client_id": "c", "agent": "a", "session_id": "s", "step": 0}
        kept.note(AgentCall(**facts, request={}, response=None, latency_ms=float(number), route=route))  # type: ignore[arg-type]
    newest = kept.newest(3)
    assert [one["call_id"] for one in newest] == ["1009", "1008", "1007"] and len(kept.newest(5_000)) == MAX_KEPT
    assert newest[0]["confidence"] is None and len(newest[0]["reason"]) == 200 and json.dumps(newest, allow_nan=False)
    assert kept.latencies() == {"t": {"num_calls": MAX_KEPT, "p50_ms": 509.0, "p95_ms": 959.0}}


def test_the_page_s_files_are_in_the_package() -> None:
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["serving"]
    found = {path.name for pattern in packaged for path in (ROOT / "serving").glob(pattern)}
    assert found == {"index.html", "page.css", "page.js"}
