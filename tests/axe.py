"""axe-core, the accessibility checker, as a text of JavaScript that a test runs in a page; no part of this repository.

Its licence is MPL-2.0. UNDERSTUDY_AXE names an axe.min.js; else npm fetches the pinned package once into pytest's cache.
Where neither is to be had, the reason says so.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile

VERSION = "4.10.3"
SHA256 = "0f2b4d7dcdf7d1219df8d1959ad68e565f51d14c3f0d88bb71cd59abeb956292"
"""Of the package as npm gives it."""
_WAIT_S = 60
# What is wrong, as "impact rule: where": of WCAG 2.2 A and AA and axe's best practices. RUN.replace("document", "'#id'") asks of
# one part.
RUN = """axe.run(document, {resultTypes: ['violations']}).then((found) => found.violations.flatMap((one) =>
    one.nodes.map((node) => `${one.impact} ${one.id}: ${node.target.join(' ')}`)))"""


class NoAxe(Exception):
    """It cannot be had here; says why and what to do."""


def axe_source(folder: pathlib.Path) -> str:
    """Its source; `folder` keeps the package for the next time.

    Raises:
        NoAxe: no file is named, and npm is not there or gave none.
    """
    if named := os.environ.get("UNDERSTUDY_AXE"):
        return pathlib.Path(named).read_text()
    package = folder / f"axe-core-{VERSION}.tgz"
    if not package.exists():
        _fetch(package)
    assert hashlib.sha256(package.read_bytes()).hexdigest() == SHA256, (
        f"another axe-core than the one that is pinned: {package}"
    )
    with tarfile.open(package) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def _fetch(package: pathlib.Path) -> None:
    how = "next: UNDERSTUDY_AXE=PATH/axe.min.js"
    npm = shutil.which("npm")
    if npm is None:
        raise NoAxe(f"no npm on this machine; {how}")
    with tempfile.TemporaryDirectory(dir=package.parent) as folder:  # What was broken off is not taken for the package.
        words = [npm, "pack", f"axe-core@{VERSION}", "--silent", "--pack-destination", folder]
        try:
            subprocess.run(words, check=True, capture_output=True, timeout=_WAIT_S, cwd=folder)
        except (subprocess.SubprocessError, OSError) as error:
            raise NoAxe(f"npm gave no axe-core {VERSION} ({type(error).__name__}); {how}") from None
        (pathlib.Path(folder) / package.name).replace(package)
