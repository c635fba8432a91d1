"""The gateway's page and what it shows: a shell without data at `/`, JSON below `/status/`, and an admin's four actions.

The page logs in with an API key that it keeps in its tab (sessionStorage) and sends as a bearer token, like every client:
no cookie, so there is nothing that a foreign site could make a browser send along, a revoked key is out at its next
request, and every replica of the gateway can answer. What that costs is that a script in this origin could read the key;
hence no inline script, no outside source, and no markup made of text (`_POLICY`, with Trusted Types). An action asks for
more: a request of the same origin, JSON, and a token of this key that `/status/session` gave out less than TOKEN_S ago.

Without keys (`gateway.auth=open`) everybody may look and nobody may act: nobody could say who did. Knows nothing of how
facts come about (serving/status_facts.py). Source: W3C CSP 3 and Fetch Metadata; RFC 6454 (Origin).
"""

from __future__ import annotations

import asyncio
import hmac
import pathlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster import registry
from cluster.access import Identity, may
from cluster.errors import ReleaseError, UnderstudyError
from cluster.records import Record
from cluster.telemetry import log_event
from serving.body import read_body
from serving.gateway import GatewayCore
from serving.openai_wire import Denied, parse_strictly
from serving.savings import AVOIDED, SPENT
from serving.status_facts import overview, task_page

TOKEN_S = 3600
"""How long a token for actions is good, in seconds."""
TOKEN_HEADER = "x-understudy-token"
MAX_ACTION_BYTES = 4096
_NUM_SHOWN = 50
_FACTS_S = 2.0
"""How long facts of the store are shown again before it is read again, however many look."""
_PAGE = pathlib.Path(__file__).with_name("page")
_ASSETS = {"/": "index.html", "/status/page.css": "page.css", "/status/page.js": "page.js"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_NO_STORE = {**_HEADERS, "cache-control": "no-store"}

Endpoint = Callable[[Request], Awaitable[Response]]


class _Promotion(Record):
    release: str = Field(pattern="^[0-9a-f]{64}$")
    stage: Literal["shadow", "canary", "live"]
    expected: str | None = Field(pattern="^[0-9a-f]{64}$")
    """The served release that the person saw; null where there was none."""


class _RollBack(Record):
    expected: str = Field(pattern="^[0-9a-f]{64}$")


class _Freeze(Record):
    reason: str = Field(default="", max_length=200)


class _Unfreeze(Record):
    pass


def status_routes(core: GatewayCore) -> dict[str, tuple[str, Endpoint]]:
    """Path -> method and endpoint, to be added to the gateway's own."""
    facts = _Remembered(core)
    return {
        **{path: ("GET", _asset(name, core.config.auth)) for path, name in _ASSETS.items()},
        **_views(core, facts),
        **_actions(core, facts),
    }


def issue_token(core: GatewayCore, identity: Identity, now: float) -> str:
    """A token for actions of this key, until `now` + TOKEN_S seconds; any replica of the gateway can check it."""
    until = str(int(now) + TOKEN_S)
    return f"{until}.{core.pseudonyms.of('action token', f'{identity.key_id} {until}')}"


def check_action(core: GatewayCore, identity: Identity, headers: Mapping[str, str], now: float) -> None:
    """Let a request change what is served.

    Raises:
        Denied: 403 where it is not the page's own, or its token is of another key, altered or too old; 415 where its
            body is not JSON.
    """
    site, origin, host = (headers.get(name) for name in ("sec-fetch-site", "origin", "host"))
    # A browser tells where a request comes from in one of the two; what tells neither is no page.
    is_own = site == "same-origin" if site else origin in (f"http://{host}", f"https://{host}")
    if not is_own:
        raise Denied(
            403, "Only this gateway's own page may do this; elsewhere use `understudy release`", code="not_own"
        )
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Denied(415, "content-type: allowed is application/json", code="unsupported_media_type")
    until, _, mac = headers.get(TOKEN_HEADER, "").partition(".")
    expected = core.pseudonyms.of("action token", f"{identity.key_id} {until}")
    if not hmac.compare_digest(mac.encode(), expected.encode()) or int(until) <= now:
        message = f"{TOKEN_HEADER}: missing, of another key or too old; get one from status/session and try again"
        raise Denied(403, message, code="invalid_token")


def _asset(name: str, auth: str) -> Endpoint:
    """A file of the page. It is told whether to ask for a key, so that it need not try without one."""
    content = (_PAGE / name).read_text().replace('data-auth="keys"', f'data-auth="{auth}"')
    kind = _TYPES[pathlib.PurePath(name).suffix]

    async def show(_: Request) -> Response:
        return Response(content, media_type=kind, headers={**_HEADERS, "cache-control": "no-cache"})

    return show


def _views(core: GatewayCore, facts: _Remembered) -> dict[str, tuple[str, Endpoint]]:

    async def show_session(request: Request) -> Response:
        identity = core.admission.admit(request.headers, "read_metadata")
        can_administer = _can_administer(core, identity)
        token = issue_token(core, identity, time.time()) if can_administer else None
        who = {"role": identity.role, "client": identity.client, "is_open": core.config.auth == "open"}
        return JSONResponse({**who, "can_administer": can_administer, "token": token}, headers=_NO_STORE)

    async def show_overview(request: Request) -> Response:
        core.admission.admit(request.headers, "read_metadata")
        snapshot = core.table.snapshot
        here = {"gateway": core.decisions.gateway, "release": snapshot.release, "skipped": dict(snapshot.skipped)}
        return JSONResponse({**await facts.overview(), "here": here, "now": time.time()}, headers=_NO_STORE)

    async def show_task(request: Request) -> Response:
        core.admission.admit(request.headers, "read_metadata")
        task_id = request.path_params["task_id"]
        page = await facts.task(task_id)
        if page is None:
            raise Denied(404, "No such task; allowed: those of status/overview", code="not_found", param="task_id")
        return JSONResponse(page, headers=_NO_STORE)

    async def show_live(request: Request) -> Response:
        core.admission.admit(request.headers, "read_metadata")
        kept = core.decisions
        about = {"gateway": kept.gateway, "started_ts": kept.started_ts, "now": time.time()}
        shown = {"counts": _counts(core), "latencies": kept.latencies(), "decisions": kept.newest(_NUM_SHOWN)}
        return JSONResponse({**about, **shown}, headers=_NO_STORE)

    return {
        "/status/session": ("GET", show_session),
        "/status/overview": ("GET", show_overview),
        "/status/tasks/{task_id}": ("GET", show_task),
        "/status/live": ("GET", show_live),
    }


def _actions(core: GatewayCore, facts: _Remembered) -> dict[str, tuple[str, Endpoint]]:
    store = core.table.store

    def promote(wish: _Promotion) -> str:
        if wish.expected is None and (served := registry.current_sha(store)) is not None:
            raise ReleaseError(f"{registry.CURRENT} is {served}, not none; look at it and decide again")
        return registry.promote_at(store, wish.release, core.rollout.at(wish.stage), expected=wish.expected)

    def roll_back(wish: _RollBack) -> str:
        return registry.roll_back(store, expected=wish.expected)

    def freeze(wish: _Freeze) -> None:
        registry.freeze(store, wish.reason)

    def unfreeze(_: _Unfreeze) -> None:
        registry.unfreeze(store)

    def action(name: str, kind: type[Record], do: Callable[[Any], str | None]) -> Endpoint:
        async def act(request: Request) -> Response:
            identity = core.admission.admit(request.headers, "administer")
            if not _can_administer(core, identity):
                raise Denied(
                    403, "gateway.auth=open: nobody is an admin here; use `understudy release`", code="no_keys"
                )
            check_action(core, identity, request.headers, time.time())
            wish = _read_wish(kind, await read_body(request, MAX_ACTION_BYTES))
            try:
                release = await asyncio.to_thread(do, wish)
            except ReleaseError as error:
                # Where the store lies is for who runs it, not for who looks at it in a browser.
                raise Denied(409, str(error).replace(store.uri, "of this gateway"), code="release_refused") from None
            except (UnderstudyError, OSError, ValueError) as error:
                raise _unreadable(error) from None
            finally:
                facts.forget()
            log_event("page_action", action=name, key_id=identity.key_id, release=release)
            return JSONResponse({"action": name, "release": release}, headers=_NO_STORE)

        return act

    return {
        "/status/promote": ("POST", action("promote", _Promotion, promote)),
        "/status/rollback": ("POST", action("rollback", _RollBack, roll_back)),
        "/status/freeze": ("POST", action("freeze", _Freeze, freeze)),
        "/status/unfreeze": ("POST", action("unfreeze", _Unfreeze, unfreeze)),
    }


class _Remembered:
    """Facts of the store, read in a thread and at most once in _FACTS_S for all who look. Belongs to one event loop."""

    def __init__(self, core: GatewayCore) -> None:
        self._store = core.table.store
        self._lock = asyncio.Lock()
        self._overview: dict[str, Any] = {}
        self._until = 0.0

    async def overview(self) -> dict[str, Any]:
        async with self._lock:
            now = time.monotonic()
            if now >= self._until:
                self._overview = await self._read(overview, self._store)
                self._until = time.monotonic() + _FACTS_S
            return self._overview

    def forget(self) -> None:
        """Read the store again at the next look."""
        self._until = 0.0

    async def task(self, task_id: str) -> dict[str, Any] | None:
        async with self._lock:
            return await self._read(task_page, self._store, task_id)

    async def _read(self, read: Callable[..., Any], *args: Any) -> Any:
        try:
            return await asyncio.to_thread(read, *args)
        except (UnderstudyError, OSError, ValueError) as error:
            raise _unreadable(error) from None


def _can_administer(core: GatewayCore, identity: Identity) -> bool:
    return core.config.auth == "keys" and may(identity.role, "administer")


def _counts(core: GatewayCore) -> dict[str, Any]:
    """What this gateway has counted since it started."""
    calls: dict[str, float] = {}
    audits: dict[str, dict[str, float]] = {}
    usd: dict[str, dict[str, float]] = {}
    for (name, *tags), value in list(core.meter.counts.items()):
        if name == "understudy_calls_total":
            calls[tags[0]] = calls.get(tags[0], 0) + value
        elif name == "understudy_audits_total":
            audits.setdefault(tags[0], {})["agree" if tags[1] == "true" else "differ"] = value
        elif name in (AVOIDED, SPENT):
            usd.setdefault(tags[0], {})["avoided" if name == AVOIDED else "spent"] = value
    totals = {
        "audits_missed": "understudy_audits_missed_total",
        "calls_dropped": "understudy_calls_dropped_total",
        "errors": "understudy_requests_failed_total",
        "llm_spend_usd": "understudy_llm_spend_usd_total",
    }
    budget = core.auditor.budget
    stream = {"share": core.auditor.share, "spent_usd": budget.spent_usd, "max_usd_per_day": budget.max_usd}
    counts = {"calls": calls, "audits": audits, "reference_stream": stream, "usd": usd}
    return {**counts, **{name: core.meter.total(metric) for name, metric in totals.items()}}


def _read_wish(kind: type[Record], raw: bytes) -> Record:
    try:
        return kind.model_validate(parse_strictly(raw))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise Denied(400, f"{field}: {first['msg']}", code="invalid_request", param=field) from None


def _unreadable(error: Exception) -> Denied:
    log_event("status_unreadable", error=f"{type(error).__name__}: {error}")
    message = "The store cannot be read now; next: understudy release show, and the gateway's log"
    return Denied(503, message, "server_error", "store_unreadable")
