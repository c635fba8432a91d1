"""The cluster of two hosts is refused with what to do, where it cannot be made or another Ray could be touched."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from jobs.bench import two_hosts


def test_it_never_runs_on_somebody_s_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="next: unset RAY_ADDRESS"):
        two_hosts.run_two_hosts()


def test_what_it_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(two_hosts.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="need root and the program ip; next: run as root"):
        two_hosts.run_two_hosts()


def test_a_wire_that_cannot_be_made_leaves_nothing_behind(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that allows namespaces and no interfaces."""
    ip = tmp_path / "ip"
    ip.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n[ "$1" != link ] || {{ echo "not permitted" >&2; exit 2; }}\n'
    )
    ip.chmod(0o755)
    with pytest.raises(ConfigError, match="not permitted; next: root"), two_hosts._wire(str(ip)):
        pass
    said = (tmp_path / "said").read_text().splitlines()
    assert [one.split()[1] for one in said if one.startswith("netns")] == ["add", "add", "del", "del"]
