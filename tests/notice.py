"""NOTICE from the metadata of the installed packages: `python -m tests.notice > NOTICE` from the repository's root."""

from __future__ import annotations

import pathlib

from jobs.sbom import licence_of

ROOT = pathlib.Path(__file__).parents[1]
HEAD = """Understudy
Copyright 2026 The Understudy authors

Licensed under the Apache License, Version 2.0; see LICENSE.

This distribution contains no code of third parties. training/catalog.json states facts about published models, each
with the address it was read at; no model is part of it. It depends on the packages below, which are installed
separately and come under their own licences, here as each package's own metadata states them. The list is that of
requirements-cpu.txt, tests and their tools included; it is written by tests/notice.py.
"""


def notice() -> str:
    """The whole file."""
    pins = (ROOT / "requirements-cpu.txt").read_text().splitlines()
    names = sorted((line.partition("==")[0] for line in pins if "==" in line), key=str.lower)
    return "\n".join([HEAD, *(f"{name}: {licence_of(name)}" for name in names)]) + "\n"


if __name__ == "__main__":
    print(notice(), end="")
