"""cluster/session.py without Ray: what a Ray Serve of this machine is told by the environment."""

from __future__ import annotations

import os
import socket
import sys
import types
from typing import NoReturn

import pytest

from cluster.errors import ConfigError
from cluster.session import connect, let_ingress_listen, let_ingress_listen_again


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")}
    monkeypatch.setattr(os, "environ", kept)


def test_the_one_ingress_listens_where_it_is_told_and_what_the_user_set_stays() -> None:
    os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "0"
    let_ingress_listen(8_000)
    let_ingress_listen(8_123)
    # Serve hands out ports from the first to the one before the last.
    ports = range(*(int(os.environ[f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT"]) for end in ("MIN", "MAX")))
    assert list(ports) == [8_123]
    assert os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "0"


def test_where_nobody_was_told_to_listen_serve_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    let_ingress_listen_again()


def test_a_cluster_that_refuses_this_process_is_told_with_its_reason_and_the_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**_: object) -> NoReturn:
        try:
            raise RuntimeError("Failed to connect to GCS.\nInvalidAuthToken: the token is missing or incorrect\n")
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster") from error

    ray = types.SimpleNamespace(init=init, is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        os.environ["RAY_ADDRESS"] = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ConfigError, match="InvalidAuthToken: the token is missing.*; next:.*RAY_AUTH_TOKEN_PATH"):
            connect()
