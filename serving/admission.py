"""Who may come in: an API key -> its holder, if the key's role allows the action and its rate is not used up.

Deny by default. Rates are counted in this process: a key may be used at its rate at each gateway replica. Knows
nothing of requests beyond their headers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Literal

from cluster.access import ApiKeys, Deed, Identity, may
from cluster.errors import ConfigError
from serving.openai_wire import Denied

_OPEN = Identity(key_id="", client="open", role="agent")
_MAX_BUCKETS = 10_000


class Admission:
    """Lets callers in. Belongs to one event loop."""

    def __init__(
        self, auth: Literal["keys", "open"], api_keys: ApiKeys | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`api_keys` may be None where auth is open."""
        assert api_keys is not None or auth == "open", "auth=keys needs API keys"
        self._api_keys = api_keys if auth == "keys" else None
        self._rates = RateLimiter(clock)

    def admit(self, headers: Mapping[str, str], deed: Deed) -> Identity:
        """Who calls; counts as one use of the key.

        Raises:
            Denied: 401 without a valid key, 403 where its role may not do this, 429 where its rate is used up, 503 where
                the keys cannot be read.
        """
        if self._api_keys is None:
            return _OPEN
        scheme, _, key = headers.get("authorization", "").partition(" ")
        try:
            identity = self._api_keys.verify(key.strip()) if scheme.lower() == "bearer" else None
        except ConfigError:
            raise Denied(503, "This gateway cannot read its keys; try again later", "server_error", "no_keys") from None
        if identity is None:
            message = "Incorrect or missing API key; send one of this gateway's keys as `Authorization: Bearer us-...`"
            raise Denied(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if not may(identity.role, deed):
            message = f"A key of role {identity.role} may not {deed.replace('_', ' ')}; use one of another role"
            raise Denied(403, message, code="insufficient_permissions")
        wait_s = self._rates.wait_s(identity.key_id, identity.rate_per_minute)
        if wait_s > 0:
            seconds = math.ceil(wait_s)
            message = f"Rate limit of this key reached: {identity.rate_per_minute} requests a minute; try again in {seconds} s"
            raise Denied(429, message, "rate_limit_error", "rate_limit_exceeded", headers={"retry-after": str(seconds)})
        return identity


class RateLimiter:
    """A token bucket for each key: it holds a minute's requests and fills evenly."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """Key id -> (tokens, when they were counted)."""

    def wait_s(self, key_id: str, rate_per_minute: int | None) -> float:
        """0 and one token taken, or how many seconds until there is one. None is no limit."""
        if rate_per_minute is None:
            return 0.0
        now, per_second = self._clock(), rate_per_minute / 60
        tokens, since = self._buckets.get(key_id, (float(rate_per_minute), now))
        tokens = min(float(rate_per_minute), tokens + (now - since) * per_second)
        if tokens < 1:
            self._buckets[key_id] = (tokens, now)
            return (1 - tokens) / per_second
        if key_id not in self._buckets and len(self._buckets) >= _MAX_BUCKETS:
            # Keys that were revoked long ago; one that is in use begins a new minute.
            self._buckets.clear()
        self._buckets[key_id] = (tokens - 1, now)
        return 0.0
