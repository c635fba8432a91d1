"""Every route of the gateway against every role, taken from the app's own routes; names that lead elsewhere; secrets in what
is logged, answered and printed."""

from __future__ import annotations

import asyncio
import json
import logging
import pathlib
import time
from typing import Any, NamedTuple, get_args

import httpx
import pytest
from fakes import PATH, REQUEST, Running, gateway
from staged import other_release, stage

from cluster import registry
from cluster.access import ApiKeys, Role
from cluster.events import read_events
from cluster.store import Store
from serving.passthrough import DEFAULT_PATHS
from serving.status import TOKEN_HEADER

EVERYBODY = frozenset({"nobody", "a stranger", "a revoked", "an expired", *get_args(Role)})
CALLERS, WATCHERS = frozenset({"agent", "admin"}), frozenset({"viewer", "curator", "admin"})
TELLERS, ADMIN = frozenset({"agent", "curator", "admin"}), frozenset({"admin"})


class Access(NamedTuple):
    """Who may ask for a route, and a request that would do something."""

    allowed: frozenset[str]
    body: dict[str, Any] | None = None
    path: str | None = None
    """Where the route's own path has a name in it."""


MATRIX: dict[tuple[str, str], Access] = {
    ("POST", PATH): Access(CALLERS, REQUEST),
    ("GET", "/v1/models"): Access(CALLERS),
    ("GET", "/v1/models/{model:path}"): Access(CALLERS, path="/v1/models/understudy/triage"),
    ("POST", "/v1/feedback"): Access(TELLERS, {"call_id": "c", "score": 1}),
    **{("POST", path): Access(CALLERS, {}) for path in DEFAULT_PATHS},
    ("GET", "/healthz"): Access(EVERYBODY),
    ("GET", "/"): Access(EVERYBODY),
    ("GET", "/status/page.css"): Access(EVERYBODY),
    ("GET", "/status/page.js"): Access(EVERYBODY),
    ("GET", "/status/session"): Access(WATCHERS),
    ("GET", "/status/overview"): Access(WATCHERS),
    ("GET", "/status/live"): Access(WATCHERS),
    ("GET", "/status/tasks/{task_id}"): Access(WATCHERS, path="/status/tasks/triage"),
    ("POST", "/status/freeze"): Access(ADMIN, {}),
    ("POST", "/status/unfreeze"): Access(ADMIN, {}),
    ("POST", "/status/promote"): Access(ADMIN, {"release": "RELEASE", "stage": "live", "expected": "SERVED"}),
    ("POST", "/status/rollback"): Access(ADMIN, {"expected": "SERVED"}),
}


def routes(run: Running) -> set[tuple[str, str]]:
    """What the app answers; a HEAD is a GET without its body."""
    return {(method, route.path) for route in run.api.routes for method in route.methods - {"HEAD"}}


def keys_of_each(tmp_path: pathlib.Path) -> dict[str, str | None]:
    """Who asks -> the key."""
    then = [time.time() - 100]
    past = ApiKeys(tmp_path / "keys.json", clock=lambda: then[0])
    keys = ApiKeys(tmp_path / "keys.json")
    made: dict[str, str | None] = {role: keys.create(f"the {role}", role) for role in get_args(Role)}
    made |= {"nobody": None, "a stranger": "us-" + "0" * 76, "a revoked": keys.create("gone", "admin")}
    made["an expired"] = past.create("late", "admin", expires_ts=then[0] + 1)
    keys.revoke("gone")
    return made


async def token_of(run: Running, key: str) -> str:
    return (await run.http.get("/status/session", headers=bearer(key))).json()["token"]


def bearer(key: str | None) -> dict[str, str]:
    # An empty header stands for the fixture's own key, which would be sent otherwise.
    return {"Authorization": f"Bearer {key}" if key else ""}


async def ask(run: Running, route: tuple[str, str], key: str | None, token: str) -> httpx.Response:
    access, served = MATRIX[route], registry.current_sha(run.store)
    names = {"RELEASE": other_release(run.store), "SERVED": served}
    body = access.body and {
        name: names.get(value, value) if isinstance(value, str) else value for name, value in access.body.items()
    }
    headers = {**bearer(key), "sec-fetch-site": "same-origin", TOKEN_HEADER: token}
    content = None if access.body is None else json.dumps(body).encode()
    if content is not None:
        headers["content-type"] = "application/json"
    return await run.http.request(route[0], access.path or route[1], content=content, headers=headers)


def test_each_route_lets_in_whom_the_table_says_and_a_route_without_a_line_fails(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            assert routes(run) == set(MATRIX), "a new route needs a line in the table"
            stage(run.store)
            keys = keys_of_each(tmp_path)
            admin = keys["admin"]
            assert set(keys) == EVERYBODY and admin is not None
            # An admin's token in everybody's hands: it must be of no use without an admin's key.
            token = await token_of(run, admin)
            seen = {}
            for route, access in MATRIX.items():
                for who, key in sorted(keys.items()):
                    before = registry.current_sha(run.store), len(read_events(run.store))
                    reply = await ask(run, route, key, token)
                    seen[route, who] = reply.status_code
                    if who in access.allowed:
                        assert reply.status_code not in (401, 403) and reply.status_code < 500, (route, who, reply.text)
                        continue
                    expected = 403 if who in get_args(Role) else 401
                    assert reply.status_code == expected, (route, who, reply.text)
                    assert reply.json()["error"]["code"] in ("invalid_api_key", "insufficient_permissions")
                    assert before == (registry.current_sha(run.store), len(read_events(run.store))), (route, who)
            did = [(event.kind, event.by) for event in read_events(run.store)[-4:]]
            assert did == [(kind, "person") for kind in ("freeze", "unfreeze", "promote", "roll_back")]
            assert all(seen[route, "admin"] == 200 for route in MATRIX if route[1].startswith("/status/"))

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/v1/models/understudy/triage", "/status/overview", "/status/page.js", PATH])
def test_other_methods_do_nothing(tmp_path: pathlib.Path, path: str) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            key = ApiKeys(tmp_path / "keys.json").create("ann", "admin")
            for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"):
                reply = await run.http.request(method, path, headers=bearer(key))
                assert reply.status_code == 405 and "access-control-allow-origin" not in reply.headers

    asyncio.run(scenario())


OUT = ["../api_keys.json", "..%2f..%2fkeys.json", "%2e%2e/%2e%2e/keys.json", "....//keys.json", "..\\keys.json", "%00",
       "/etc/passwd", "//etc/passwd", "page.css/../../../keys.json", "page.css%2f..%2f..%2fstatus.py", "status.py", "page/index.html"]  # fmt: skip


def test_no_name_leads_out_of_its_folder(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            key = ApiKeys(tmp_path / "keys.json").create("ann", "admin")
            stage(run.store)
            secret = (tmp_path / "keys.json").read_text()
            for prefix in ("/status/", "/status/tasks/", "/", "/v1/models/", "/status/page.css/"):
                for name in OUT:
                    # As bytes of the target: a client would tidy a path before it is sent.
                    reply = await _raw(run, f"{prefix}{name}", key)
                    assert reply.status_code in (404, 200) and "salt" not in reply.text and "root:" not in reply.text
                    assert reply.status_code == 404 or prefix == "/status/" and name.startswith("page.css"), (
                        prefix,
                        name,
                    )
                    assert reply.text not in secret

    asyncio.run(scenario())


async def _raw(run: Running, target: str, key: str) -> httpx.Response:
    url = httpx.URL("http://gateway").copy_with(raw_path=target.encode())
    return await run.http.get(url, headers=bearer(key))


@pytest.mark.parametrize(
    "name", ["../../keys", "a" * 63, "A" * 64, "0" * 64, "g" * 64, "a" * 64 + "\n", "", None, 3, ["a" * 64]]
)
def test_a_release_is_named_by_its_hash_alone(tmp_path: pathlib.Path, name: Any) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            key = ApiKeys(tmp_path / "keys.json").create("ann", "admin")
            served = registry.current_sha(run.store)
            headers = {**bearer(key), "sec-fetch-site": "same-origin", TOKEN_HEADER: await token_of(run, key)}
            for body in (
                {"release": name, "stage": "live", "expected": served},
                {"release": served, "stage": name, "expected": name},
            ):
                reply = await run.http.post("/status/promote", json=body, headers=headers)
                assert reply.status_code in (400, 409) and str(tmp_path) not in reply.text, reply.text
            if name != "0" * 64:
                assert (
                    await run.http.post("/status/rollback", json={"expected": name}, headers=headers)
                ).status_code == 400
            assert registry.current_sha(run.store) == served

    asyncio.run(scenario())


FOREIGN = "an error of the LLM's own"
OWNERS, SAID, SESSION = "sk-marker-of-the-owner", "marker of what was said", "marker-of-a-session"


class Heard:
    """All that leaves the gateway besides its answers' own content."""

    def __init__(self, admin: str) -> None:
        self.admin, self.token = admin, ""
        self.errors: list[str] = []
        self.heads: list[str] = []

    def note(self, reply: httpx.Response) -> httpx.Response:
        self.heads.append(str(reply.headers))
        if reply.status_code >= 400:
            self.errors.append(reply.text)
        return reply


async def live_through(run: Running, heard: Heard) -> None:
    """Calls that go well, calls that go wrong in every way, feedback, and a broken store."""
    body = {**REQUEST, "messages": [*REQUEST["messages"], {"role": "user", "content": SAID}]}
    headers = {"x-session-id": SESSION, "x-agent": "desk"}

    async def call(**extra: Any) -> None:
        heard.note(await run.http.post(PATH, json={**body, **extra}, headers=headers))

    await call()
    await call(stream=True)
    for status in (400, 401, 403, 404, 429, 500, 302):
        run.llm.status = status
        # It quotes what it was sent: the words to whom they are from, the key where it refuses it.
        run.llm.error = {"message": f"{SAID} {OWNERS if status in (401, 403) else ''}", "type": FOREIGN, "code": None}
        await call(model="understudy/llm")
        heard.note(await run.http.post(PATH, json=body, headers={**headers, "x-understudy-route": "llm"}))
        heard.note(await run.http.post("/v1/embeddings", json={"input": SAID}))
    run.llm.status = 200
    for fate in ("cut", "unfinished", "unreadable", "error"):
        run.llm.fate = fate
        try:
            heard.note(
                await run.http.post(
                    PATH, json={**body, "stream": True}, headers={**headers, "x-understudy-route": "llm"}
                )
            )
        except httpx.HTTPError:
            continue
    await call(temperature=SAID)
    await call(messages=SAID)
    heard.note(await run.http.post(PATH, content=f'{{"messages": "{SAID}"'.encode()))
    heard.note(await run.http.post(PATH, json=body, headers={"x-deadline-s": SAID}))
    heard.note(await run.http.post("/v1/feedback", json={"call_id": "c", "score": 1, "text": SAID}))
    heard.note(await run.http.post("/v1/feedback", json={"call_id": "c", "score": SAID}))
    heard.note(await run.http.get("/v1/models", headers=bearer(f"us-{SAID}")))
    await act(run, heard)
    run.engine.is_away = True
    await call()
    run.store.write_bytes("CURRENT", b"{")
    await asyncio.gather(run.core.table.refresh(), return_exceptions=True)
    await call()
    await run.core.capture.flush()


async def act(run: Running, heard: Heard) -> None:
    """An admin's actions by the page, with a token that is good and with one that is not."""
    heard.token = await token_of(run, heard.admin)
    for value in (heard.token, f"{heard.token}0"):
        headers = {**bearer(heard.admin), "sec-fetch-site": "same-origin", TOKEN_HEADER: value}
        for name in ("freeze", "unfreeze"):
            heard.note(await run.http.post(f"/status/{name}", json={}, headers=headers))
        heard.note(await run.http.post("/status/promote", json={"release": SAID}, headers=headers))


def test_no_secret_and_no_content_is_logged_printed_or_in_an_error(
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", OWNERS)
    # Others' loggers say what they like at DEBUG; nothing of ours may be silent by its level alone.
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "understudy")
    heard = Heard(ApiKeys(tmp_path / "keys.json").create("ann", "admin"))

    async def scenario() -> tuple[str, Store]:
        async with gateway(tmp_path) as run:
            await live_through(run, heard)
            return run.key, run.store

    key, store = asyncio.run(scenario())
    out, err = capfd.readouterr()
    logged = "\n".join(f"{one.getMessage()} {vars(one)}" for one in caplog.records) + out + err
    assert len(heard.errors) > 15 and "upstream_failed" in logged, "the flows were run"
    keys = (OWNERS, key, key[15:], heard.admin, heard.admin[15:], heard.token)
    for marker in (*keys, SESSION, SAID, "billing"):
        assert marker and marker not in logged, marker
    for marker in (*keys, SESSION, str(tmp_path)):
        assert not [text for text in [*heard.errors, *heard.heads] if marker in text], marker
    # What the LLM says of a client's own words is passed on; the gateway itself repeats none.
    assert not [text for text in heard.errors if SAID in text and FOREIGN not in text]
    assert [text for text in heard.errors if FOREIGN in text]
    files = [path for path in pathlib.Path(store.uri).rglob("*") if path.is_file()]
    assert files and not [
        path for path in files if any(m.encode() in path.read_bytes() for m in (*keys, SESSION, SAID))
    ]
