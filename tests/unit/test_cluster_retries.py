"""What may be asked again and when."""

from __future__ import annotations

import email.utils
import time

import pytest

from cluster.retries import backoff_s, is_retryable, parse_retry_after


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 520, 529])
def test_the_servers_own_failures_may_be_tried_again(status: int) -> None:
    assert is_retryable(status)


@pytest.mark.parametrize("status", [200, 301, 400, 401, 402, 403, 404, 413, 422])
def test_answers_and_the_clients_errors_may_not(status: int) -> None:
    assert not is_retryable(status)


def test_waits_spread_over_the_whole_of_a_growing_interval() -> None:
    for attempt, most in ((1, 0.25), (2, 0.5), (3, 1.0), (9, 8.0)):
        waits = [backoff_s(attempt) for _ in range(500)]
        assert 0 <= min(waits) < most / 10 and 0.9 * most < max(waits) <= most


def test_a_retry_after_is_seconds_or_a_date() -> None:
    assert parse_retry_after("7") == 7.0 and parse_retry_after("-1") == 0.0
    until = parse_retry_after(email.utils.formatdate(time.time() + 60, usegmt=True))
    assert until is not None and 50 < until <= 60
    assert [parse_retry_after(wrong) for wrong in (None, "", "soon", "nan", "inf")] == [None] * 5
