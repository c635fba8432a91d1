"""NOTICE from the metadata of the installed packages: `python tests/notice.py > NOTICE` from the repository's root."""

from __future__ import annotations

import importlib.metadata
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
HEAD = """Understudy
Copyright 2026 The Understudy authors

Licensed under the Apache License, Version 2.0; see LICENSE.

This distribution contains no code of third parties. training/catalog.json states facts about published models, each
with the address it was read at; no model is part of it. It depends on the packages below, which are installed
separately and come under their own licences, here as each package's own metadata states them. The list is that of
requirements-cpu.txt, tests and their tools included; it is written by tests/notice.py.
"""
_NO_WORD = "not stated in its metadata"
_MAX_CHARS = 70


def licence_of(name: str) -> str:
    """What a package says of its licence: an SPDX expression, else classifiers, else a line of text."""
    facts = importlib.metadata.metadata(name)
    if facts["License-Expression"]:
        return facts["License-Expression"]
    classifiers = facts.get_all("Classifier") or ()
    classified = [one.split(" :: ")[-1] for one in classifiers if one.startswith("License ::")]
    named = [one for one in classified if one != "OSI Approved"]
    if named:
        return ", ".join(sorted(set(named)))
    line = (facts["License"] or "").strip().split("\n")[0].strip()
    return line if line and len(line) <= _MAX_CHARS else _NO_WORD


def notice() -> str:
    """The whole file."""
    pins = (ROOT / "requirements-cpu.txt").read_text().splitlines()
    names = sorted((line.partition("==")[0] for line in pins if "==" in line), key=str.lower)
    return "\n".join([HEAD, *(f"{name}: {licence_of(name)}" for name in names)]) + "\n"


if __name__ == "__main__":
    print(notice(), end="")
