"""An endpoint's address and the environment -> the header that carries its key. The key is neither stored nor shown."""

from __future__ import annotations

import ipaddress
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.config import has_credentials
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.upstream import UpstreamConfig


def check_address(url: str) -> str:
    """The address, where it carries no credentials.

    Raises:
        ValueError: it does.
    """
    if has_credentials(url):
        raise ValueError(
            "the address carries credentials, which would be shown and written beside every release; allowed: "
            "https://HOST/VERSION; next: take them out, and put the LLM's key into the environment variable that "
            "api_key_env names (OPENAI_API_KEY)"
        )
    return url


def authorization(config: UpstreamConfig) -> dict[str, str]:
    """The header that carries the endpoint's key; none for a loopback address without one.

    Raises:
        ConfigError: the key's variable is unset and the address is not a loopback one.
    """
    key = os.environ.get(config.api_key_env)
    if key:
        return {"Authorization": f"Bearer {key}"}
    if not is_loopback(config.base_url):
        raise ConfigError(
            f"upstream.api_key_env={config.api_key_env!r}: this variable is not set, and upstream.base_url="
            f"{without_query(config.base_url)} is not on this machine; set it: export {config.api_key_env}=..."
        )
    return {}


def is_loopback(url: str) -> bool:
    """Whether the address is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_query(url: str) -> str:
    """The address as it may be shown: a query may hold a key."""
    return urlsplit(url)._replace(query="").geturl()
