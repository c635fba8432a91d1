"""`understudy sbom`: what is installed here, as CycloneDX 1.6 JSON, for whoever checks an image against advisories.

Read from the installed packages' own metadata, without network: name, version, licence and what depends on what. A hash of
the file that a package was installed from is not known any more; instead each has that of its RECORD, which holds the hash
of every file of it as installed. What it may be installed from is pinned in requirements-cpu.hashes. Source:
CycloneDX 1.6 JSON; the package-url specification (pkg:pypi, names lower-case with hyphens).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import re
import uuid
from typing import Any

DISTRIBUTION = "understudy"
NOT_STATED = "not stated in its metadata"
RECORD_PROPERTY = "understudy:record-sha256"
_MAX_LICENCE_CHARS = 70


def add_verb(verbs: Any) -> None:
    """Add `sbom` to the verbs of the command line."""
    sbom = verbs.add_parser(
        "sbom",
        help="list the installed packages with licences, as CycloneDX JSON",
        sections=(),
        examples=["understudy sbom"],
    )
    sbom.set_defaults(run=_run)


def _run(_: argparse.Namespace) -> None:
    print(json.dumps(describe_installed(), indent=1))


def describe_installed() -> dict[str, Any]:
    """The bill of materials of this Python environment. Its serial number and time are of the moment."""
    found = {_plain(one.metadata["Name"]): one for one in importlib.metadata.distributions()}
    own = found.pop(DISTRIBUTION, None)
    refs = {name: f"pkg:pypi/{name}@{one.version}" for name, one in found.items()}
    root = {
        "type": "application",
        "bom-ref": DISTRIBUTION,
        "name": DISTRIBUTION,
        "licenses": [{"expression": "Apache-2.0"}],
    }
    if own is not None:
        root["version"] = own.version
    graph = {refs[name]: _needed(one, refs) for name, one in found.items()}
    graph[DISTRIBUTION] = _needed(own, refs) if own is not None else []
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {"timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "component": root},
        "components": [_component(name, one, refs[name]) for name, one in sorted(found.items())],
        "dependencies": [{"ref": ref, "dependsOn": needed} for ref, needed in sorted(graph.items())],
    }


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
    return line if line and len(line) <= _MAX_LICENCE_CHARS else NOT_STATED


def _component(name: str, one: importlib.metadata.Distribution, ref: str) -> dict[str, Any]:
    component: dict[str, Any] = {"type": "library", "bom-ref": ref, "name": name, "version": one.version, "purl": ref}
    if record := one.read_text("RECORD"):
        digest = hashlib.sha256(record.encode()).hexdigest()
        component["properties"] = [{"name": RECORD_PROPERTY, "value": digest}]
    expression = one.metadata["License-Expression"]
    told = licence_of(one.metadata["Name"])
    if expression:
        component["licenses"] = [{"expression": expression}]
    elif told != NOT_STATED:
        component["licenses"] = [{"license": {"name": told}}]
    return component


def _needed(one: importlib.metadata.Distribution, refs: dict[str, str]) -> list[str]:
    """What it asks for here, as far as that is installed; extras are left out."""
    from packaging.requirements import Requirement

    asked = [Requirement(line) for line in one.requires or []]
    names = {_plain(need.name) for need in asked if need.marker is None or need.marker.evaluate({"extra": ""})}
    return sorted(refs[name] for name in names if name in refs)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
