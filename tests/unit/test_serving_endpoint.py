"""serving/endpoint.py without Ray: what an agent is told to call, and that a port is tried before it is promised."""

import socket

import pytest

from cluster.errors import ConfigError
from serving.endpoint import HttpConfig, base_url, check_port


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/v1"),
        ("0.0.0.0", "http://127.0.0.1:8000/v1"),
        ("::1", "http://[::1]:8000/v1"),
        ("llm.internal", "http://llm.internal:8000/v1"),
    ],
)
def test_the_base_url_can_be_called(host, url):
    assert base_url(HttpConfig(host=host)) == url


def test_a_free_port_passes_and_a_taken_one_is_named():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.listen()
        with pytest.raises(ConfigError, match=f"serve.http.port={port}: cannot listen.*allowed"):
            check_port(HttpConfig(port=port))
    check_port(HttpConfig(port=port))


def test_an_address_of_another_machine_is_named():
    with pytest.raises(ConfigError, match="serve.http.host=192.0.2.1, .*cannot listen"):
        check_port(HttpConfig(host="192.0.2.1"))
