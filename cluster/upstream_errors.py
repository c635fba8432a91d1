"""What goes wrong with an endpoint -> the UpstreamError that says so; status and body are fit for the client."""

from __future__ import annotations

from typing import Any

from cluster.endpoint_key import without_query
from cluster.errors import UpstreamError

LISTS_NONE = "no_model_list"
"""Code of the error of an endpoint that has no list of its models."""


def is_owners(status: int) -> bool:
    """Whether a reply of this status is the owner's to mend: a refused key, an account without money or a moved address."""
    return status in (401, 402, 403) or 300 <= status < 400


def is_out_of_quota(body: dict[str, Any] | None) -> bool:
    """Whether an error says that its account's quota is used up: asked again in a moment, it says so again.

    Source: OpenAI API reference, error codes, 429 "You exceeded your current quota".
    """
    error = (body or {}).get("error")
    return isinstance(error, dict) and "insufficient_quota" in (error.get("code"), error.get("type"))


class EndpointErrors:
    """The errors of one endpoint, named by its address."""

    def __init__(self, base_url: str, api_key_env: str) -> None:
        self._address, self._api_key_env = without_query(base_url), api_key_env

    def error(
        self, status: int, reason: str, code: str = "upstream_error", retry_after_s: float | None = None
    ) -> UpstreamError:
        """An error with a body of its own."""
        message = self.named(reason)
        kind = "rate_limit_error" if status == 429 else "upstream_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
        return UpstreamError(message, status, body, retry_after_s)

    def passed_on(self, status: int, body: dict[str, Any] | None, retry_after_s: float | None) -> UpstreamError:
        """The endpoint's own error, as it is where it is OpenAI-shaped."""
        error = self.error(status, f"answered {status}; try again later", retry_after_s=retry_after_s)
        if body is None or "error" not in body:
            return error
        return UpstreamError(error.message, status, body, retry_after_s)

    def misconfigured(self, status: int) -> UpstreamError:
        """For a reply that `is_owners`."""
        steps = {401: f"put a valid key into {self._api_key_env}", 402: "pay its account"}
        step = steps.get(status, steps[401] if status == 403 else "set its final address")
        return self.error(502, f"answered {status} to the gateway's request; {step}", "upstream_misconfigured")

    def unreachable(self, error: BaseException) -> UpstreamError:
        """For an endpoint that gave no reply, or not all of one."""
        if isinstance(error, TimeoutError):
            reason = "did not answer in time; raise upstream.timeout_s or first_token_timeout_s, or try again"
            return self.error(504, reason, "upstream_timeout")
        reason = f"cannot be reached ({type(error).__name__}); check the address and that the LLM is up"
        return self.error(503, reason, "upstream_unavailable")

    def left_alone(self, wait_s: float, *, has_asked: bool) -> UpstreamError:
        """For an endpoint that is spared: it failed repeatedly, or `has_asked` for it."""
        if has_asked:
            reason = "asked to be left alone for a while; try again then"
            return self.error(429, reason, "rate_limit_exceeded", wait_s)
        reason = "has failed repeatedly and is being left alone; try again shortly"
        return self.error(503, reason, "upstream_unavailable", wait_s)

    def busy(self) -> UpstreamError:
        """For an endpoint that has as many calls in flight as it may have."""
        reason = "has as many calls in flight as upstream.max_concurrent allows; try again or raise it"
        return self.error(429, reason, "upstream_busy", 1.0)

    def without_list(self, status: int) -> UpstreamError:
        """For a reply of this status to a request for the endpoint's models; some serve chat completions alone."""
        if is_owners(status):
            return self.misconfigured(status)
        code = LISTS_NONE if status in (404, 405, 501) else "upstream_error"
        return self.error(502, f"answered {status} to a request for its models; it may list none", code)

    def named(self, reason: str) -> str:
        """The reason, with the address; without its query, which may hold a key."""
        return f"upstream.base_url={self._address} {reason}"


class FailedAttempt(Exception):
    """One attempt that gave no answer worth having."""

    def __init__(self, error: UpstreamError, *, may_retry: bool) -> None:
        super().__init__(error)
        self.error, self.may_retry = error, may_retry
