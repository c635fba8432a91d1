"""One running endpoint: the serving graph behind Ray Serve's HTTP proxy, up until this process is told to stop.

Ctrl-C and SIGTERM take it down in order: the proxy turns new calls away, calls in flight finish, every gateway replica
writes what it has captured. Belongs to a cluster that no other Ray Serve runs on: its HTTP address is fixed when it
starts. To share a Ray Serve, deploy `serving.app:build` with `serve deploy` instead.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from typing import Any, NoReturn

from pydantic import Field

from cluster.config import Config
from cluster.errors import ConfigError, ReleaseError
from cluster.session import serve_is_running
from serving.app import ServeArgs, build
from serving.scaling import STOP_MARGIN_S

APP = "understudy"
_STATUS_MARGIN_S = 5.0
"""How long Ray Serve may take to tell that the last replica has ended."""
_STATUS_INTERVAL_S = 0.2


class HttpConfig(Config):
    """Where the endpoint listens."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all of the machine's."""
    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""


class ServeConfig(Config):
    """How `understudy serve` runs the endpoint."""

    http: HttpConfig = HttpConfig()


def check_port(http: HttpConfig) -> None:
    """Bind the address once.

    Raises:
        ConfigError: another program listens there, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise ConfigError(
                f"serve.http.host={http.host}, serve.http.port={http.port}: cannot listen there ({error.strerror}); "
                "allowed: an address of this machine and a port that is free; next: serve.http.port=PORT"
            ) from None


def run_endpoint(args: ServeArgs, http: HttpConfig, on_ready: Callable[[str], Any], *, has_proxy: bool) -> None:
    """Serve until Ctrl-C or SIGTERM. Needs a connected Ray.

    Args:
        on_ready: called with the base_url once calls are answered.
        has_proxy: whether Serve's proxy listens at `http`; else the gateway itself does, as
            `cluster.session.let_ingress_listen` has told it to.

    Raises:
        ConfigError: Ray Serve runs on this cluster already.
        ReleaseError: the graph did not start.
    """
    from ray import serve

    if serve_is_running():
        raise ConfigError(
            "serve: Ray Serve runs on this cluster already; allowed: one endpoint of `understudy serve` for a "
            "cluster; next: stop it (`serve shutdown`), or deploy serving.app:build beside it with `serve deploy`"
        )
    signal.signal(signal.SIGTERM, _interrupt)
    app = build(args)
    try:
        # Serve starts a proxy in any case; where the gateway listens itself, nobody is told of it.
        port = http.port if has_proxy else _free_port()
        serve.start(http_options={"host": http.host, "port": port})
        _deploy(app)
        on_ready(base_url(http))
        # Woken by a signal's handler, which raises.
        while True:
            signal.pause()
    except KeyboardInterrupt:
        _drain(args.gateway.drain_timeout_s)
    finally:
        serve.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def base_url(http: HttpConfig) -> str:
    """What an agent on this machine sets as its base_url."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(http.host, f"[{http.host}]" if ":" in http.host else http.host)
    return f"http://{host}:{http.port}/v1"


def _deploy(app: Any) -> None:
    from ray import serve

    try:
        serve.run(app, name=APP, route_prefix="/")
    except RuntimeError as error:
        raise ReleaseError(f"serve: the endpoint did not start: {error}; see the logs of Ray Serve") from None


def _drain(timeout_s: float) -> None:
    """Take the application down while Ray's proxies stay: `serve.shutdown` ends them first, and every stream with them."""
    from ray import serve

    serve.delete(APP, _blocking=False)
    deadline = time.monotonic() + timeout_s + STOP_MARGIN_S + _STATUS_MARGIN_S
    while APP in serve.status().applications and time.monotonic() < deadline:
        time.sleep(_STATUS_INTERVAL_S)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
