"""Installed packages against what this project declares, and against the set that its tests pass with.

The declaration is read from the installed metadata; the tested set is requirements-cpu.txt of a checkout, which an
installed package does not carry.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
from collections.abc import Callable, Iterator

from packaging.requirements import Requirement
from packaging.version import Version

from jobs.doctor.check import Check, Reporter

DISTRIBUTION = "understudy"
TESTED = pathlib.Path(__file__).parents[2] / "requirements-cpu.txt"
_MAX_NAMED = 6
_say = Reporter("packages")


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(
    tested: pathlib.Path = TESTED, version_of: Callable[[str], str | None] = installed_version
) -> Iterator[Check]:
    """Compare what is installed.

    Args:
        tested: a file of `NAME==VERSION` lines; it need not exist.
        version_of: says what is installed.
    """
    yield _declared(version_of)
    if not tested.is_file():
        yield _say.ok("tested set", f"not here: {tested.name} comes with a checkout")
    else:
        yield _tested(tested, version_of)


def _declared(version_of: Callable[[str], str | None]) -> Check:
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        advice = "pip install --no-deps --no-build-isolation --editable ."
        return _say.failed("declared", f"{DISTRIBUTION} is not installed, only found by its path", advice)
    needed = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate({"extra": ""})]
    problems = []
    for one in needed:
        version = version_of(one.name)
        if version is None:
            problems.append(f"{one.name} is missing")
        elif not one.specifier.contains(version, prereleases=True):
            problems.append(f"{one.name} {version} is not {one.specifier}")
    if problems:
        return _say.failed("declared", _named(problems), "make setup, or on a GPU machine: pip install '.[gpu]'")
    return _say.ok("declared", f"all {len(needed)} within bounds")


def _tested(path: pathlib.Path, version_of: Callable[[str], str | None]) -> Check:
    pins = [line.strip().split("==") for line in path.read_text().splitlines() if "==" in line]
    problems = []
    for name, wanted in pins:
        version = version_of(name)
        # A build's own mark, such as +cpu, is no other version.
        if version is None:
            problems.append(f"{name} is missing")
        elif Version(version).public != Version(wanted).public:
            problems.append(f"{name} {version} instead of {wanted}")
    if problems:
        return _say.warning("tested set", f"differs: {_named(problems)}", f"make setup installs {path.name}")
    return _say.ok("tested set", f"all {len(pins)} as in {path.name}")


def _named(problems: list[str]) -> str:
    rest = len(problems) - _MAX_NAMED
    return ", ".join(problems[:_MAX_NAMED]) + (f", and {rest} more" if rest > 0 else "")
