"""What `understudy serve` says before Ray: the config that Ray Serve deploys, and the gateways it will start."""

import json
import sys

import pytest
import yaml

from cluster.config import validate
from jobs.__main__ import main
from jobs.recipe import load_recipe
from jobs.serve import serve_args
from serving.app import ServeArgs

LLM = "upstream.0.base_url=https://llm.example/v1"
WORDS = [
    LLM,
    "upstream.1.cluster_model=/shared/llm",
    "gateway.max_replicas=4",
    "specialists.device=gpu",
    "gateway.passthrough=[]",
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("RAY_ADDRESS", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    # No verb of these tests may get as far as Ray.
    monkeypatch.setitem(sys.modules, "ray", None)


def test_the_printed_config_deploys_the_endpoint_of_the_recipe(capsys, tmp_path):
    """It needs no key: those stay on the nodes. Nothing is made."""
    words = [f"store={tmp_path / 'store'}", *WORDS, "serve.http.host=0.0.0.0", "serve.http.port=8100"]
    assert main(["serve", "--print-config", *words]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    (application,) = config["applications"]
    assert validate(ServeArgs, application.pop("args")) == serve_args(load_recipe(words))
    assert application == {"name": "understudy", "route_prefix": "/", "import_path": "serving.app:build"}
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8100}
    assert not (tmp_path / "store").exists()


def test_the_printed_config_leaves_defaults_out(capsys):
    assert main(["serve", "--print-config", "store=/shared/store", LLM, "gateway.max_replicas=1"]) == 0
    (application,) = yaml.safe_load(capsys.readouterr().out)["applications"]
    assert application["args"] == {"store": "/shared/store", "upstream": [{"base_url": "https://llm.example/v1"}]}


def test_a_config_without_an_llm_is_refused(capsys):
    assert main(["serve", "--print-config", "store=/shared/store"]) == 2
    assert "next: understudy serve upstream.0.base_url=" in capsys.readouterr().err


def test_a_plan_counts_every_gateway(capsys, tmp_path):
    words = ["upstream.0.base_url=http://127.0.0.1:9/v1", f"store={tmp_path / 'store'}"]
    assert main(["serve", "--dry-run", *words, "gateway.min_replicas=1", "gateway.max_replicas=3"]) == 0
    assert [one["total_cpus"] for one in json.loads(capsys.readouterr().out)["resources"]] == [1.0]
    assert main(["serve", "--dry-run", *words, "gateway.min_replicas=9999", "gateway.max_replicas=9999"]) == 2
    assert "gateway.min_replicas=9999: gateway: 9999 CPUs wanted at the same time" in capsys.readouterr().err


def test_more_gateways_at_least_than_at_most_are_refused(capsys):
    assert main(["serve", "--dry-run", LLM, "gateway.min_replicas=2"]) == 2
    err = capsys.readouterr().err
    assert "gateway: max_replicas=1: below min_replicas=2" in err and "next: raise max_replicas to 2" in err
