"""Commands, recipes, environment, ports, paths, images and labels of the manifests are those of the code; what is renamed
in them is found."""

import re
import shlex

import pytest
from k8s_code import code_problems, is_read, parser, recipe_of
from k8s_manifests import K8S, OVERLAYS, build, jobs, only

from jobs.__main__ import main
from jobs.recipe import load_recipe


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_agree_with_the_code(overlay):
    assert code_problems(build(overlay)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_one_file_is_the_local_endpoint_and_the_cluster_s(overlay, capsys):
    """`understudy serve recipe=FILE` is what the RayService runs: its config is printed from that file."""
    folder = K8S / "overlays" / overlay
    assert main(["serve", "--print-config", f"recipe={folder / 'recipe.toml'}"]) == 0
    assert capsys.readouterr().out == (folder / "serve-config.yaml").read_text()


def test_a_remote_store_is_the_same_recipe_with_three_words():
    """Those that the component object-store tells."""
    recipe = K8S / "overlays/gpu-autoscaled/recipe.toml"
    words = ["store=s3://bucket/prefix", "work=/shared/store/work", "gateway.auth=open"]
    text = (K8S / "components/object-store/kustomization.yaml").read_text()
    assert 'store = "s3://' in text and f'work = "{words[1][5:]}"' in text and 'auth = "open"' in text
    assert load_recipe([f"recipe={recipe}", *words]).work == "/shared/store/work"


def test_names_of_variables_are_looked_up_where_they_are_read():
    known = ["RAY_SERVE_ENABLE_HA_PROXY", "RAY_worker_niceness", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "UNDERSTUDY_KMS"]
    assert all(is_read(name) for name in [*known, "AWS_SECRET_ACCESS_KEY", "VAULT_TOKEN"])
    unknown = ["RAY_SERVE_ENABLE_HAPROXY", "RAY_worker_nicenes", "OMP_NUM_THREAD", "HF_OFFLINE", "UNDERSTUDY_KMZ"]
    assert not any(is_read(name) for name in [*unknown, "AWS_SECRET", "VAULT_PASSWORD"])


def commands(text: str) -> list[str]:
    """`understudy VERB ...` wherever a page has it, in a block or in backticks."""
    blocks = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    found = [one for line in blocks for one in re.findall(r"(?<!-n )\bunderstudy [a-z].*", line.partition("#")[0])]
    found += [one for one in re.findall(r"`(?:\$SH )?(understudy [^`]+)`", text)]
    return [one.partition(" > ")[0].strip() for one in found]


def test_the_runbook_s_commands_are_verbs_with_these_words():
    found = commands((K8S / "README.md").read_text())
    verbs = {one.split()[1] for one in found}
    assert {"serve", "keys", "convert", "refine", "promote", "rollback", "calls", "compact"} <= verbs
    for one in found:
        parser().parse_args(shlex.split(one)[1:])


def cluster(documents):
    return only(documents, "RayService")["spec"]["rayClusterConfig"]


def worker(documents):
    return cluster(documents)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]


def set_variable(documents, name, new):
    next(one for one in worker(documents)["env"] if one["name"] == name)["name"] = new


def set_recipe(documents, old, new):
    data = only(documents, "ConfigMap", "understudy-config")["data"]
    assert old in data["recipe.toml"]
    data["recipe.toml"] = data["recipe.toml"].replace(old, new)


def set_config(documents, old, new):
    """In both places, as if serve-config.yaml had been edited."""
    spec, data = only(documents, "RayService")["spec"], only(documents, "ConfigMap", "understudy-config")["data"]
    assert old in spec["serveConfigV2"]
    spec["serveConfigV2"] = data["serve-config.yaml"] = spec["serveConfigV2"].replace(old, new)


def set_entrypoint(documents, old, new):
    found = [spec for _, spec in jobs(documents) if old in spec["entrypoint"]]
    assert found
    for spec in found:
        spec["entrypoint"] = spec["entrypoint"].replace(old, new)


def set_secret(documents, field, value):
    one = next(one for one in worker(documents)["env"] if one["name"] == "VAULT_TOKEN")
    one["valueFrom"]["secretKeyRef"][field] = value


def set_port(documents, name, number):
    next(one for one in worker(documents)["ports"] if one["name"] == name)["containerPort"] = number


MUTATIONS = {
    "program": lambda d: set_entrypoint(d, "understudy convert", "understudi convert"),
    "verb": lambda d: set_entrypoint(d, "convert", "release list"),
    "nightly verb": lambda d: set_entrypoint(d, "understudy refine", "understudy refines"),
    "flag": lambda d: set_entrypoint(d, "convert ", "convert --publish "),
    "word": lambda d: set_entrypoint(d, "recipe.toml", "recipe.toml gate.epsilom=0.1"),
    "recipe's path": lambda d: set_entrypoint(d, "recipe.toml", "recipes.toml"),
    "recipe's key": lambda d: set_recipe(d, "[gateway]", "[gatway]"),
    "recipe's value": lambda d: set_recipe(d, "max_replicas = 8", "max_replicas = 7"),
    "recipe's store": lambda d: set_recipe(d, "/shared/store", "/shared/stores"),
    "limits": lambda d: set_recipe(d, "gpus = 8", "gpus = 9"),
    "import path": lambda d: set_config(d, "serving.app:build", "serving.app:builds"),
    "argument": lambda d: set_config(d, "max_adapters", "max_adapter"),
    "argument's value": lambda d: set_config(d, "max_adapters: 32", "max_adapters: 31"),
    "route": lambda d: set_config(d, "route_prefix: /", "route_prefix: /v1"),
    "Serve's field": lambda d: set_config(d, "proxy_location: EveryNode", "proxy_location: EveryWhere"),
    "served port": lambda d: set_config(d, "port: 8000", "port: 8001"),
    "Serve config": lambda d: only(d, "RayService")["spec"].update(serveConfigV2="applications: []"),
    "Ray's variable": lambda d: set_variable(d, "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_HAPROXY"),
    "Ray's C++ variable": lambda d: set_variable(d, "RAY_worker_niceness", "RAY_worker_nice"),
    "our variable": lambda d: set_variable(d, "UNDERSTUDY_KMS", "UNDERSTUDY_KMZ"),
    "secret": lambda d: set_secret(d, "name", "understudy-vault"),
    "secret's key": lambda d: set_secret(d, "key", "TOKEN"),
    "Ray's token": lambda d: cluster(d)["authOptions"].update(secretName="ray-token"),
    "Ray without a token": lambda d: cluster(d)["authOptions"].update(mode="disabled"),
    "Ray's version": lambda d: cluster(d).update(rayVersion="2.59.0"),
    "container's port": lambda d: set_port(d, "serve", 8001),
    "metrics port": lambda d: cluster(d)["headGroupSpec"]["rayStartParams"].update({"metrics-export-port": "8081"}),
    "probe's path": lambda d: worker(d)["readinessProbe"]["httpGet"].update(path="/health"),
    "probe's port": lambda d: worker(d)["readinessProbe"]["httpGet"].update(port="http"),
    "policy's port": lambda d: only(d, "NetworkPolicy", "agents")["spec"]["ingress"][0]["ports"][0].update(port=8001),
    "service's port": lambda d: only(d, "Service", "understudy-metrics")["spec"]["ports"][0].update(port=8081),
    "monitor's port": lambda d: only(d, "ServiceMonitor")["spec"]["endpoints"][0].update(port="metric"),
    "claim": lambda d: only(d, "PersistentVolumeClaim", "understudy-keys")["metadata"].update(name="understudy-key"),
    "mount of the keys": lambda d: worker(d)["volumeMounts"][1].update(mountPath="/shared/keys"),
    "mount of the store": lambda d: worker(d)["volumeMounts"].pop(0),
    "no place to write": lambda d: worker(d).update(
        volumeMounts=[one for one in worker(d)["volumeMounts"] if one["mountPath"] != "/tmp"]
    ),
    "option of ray start": lambda d: cluster(d)["headGroupSpec"]["rayStartParams"].update({"num-cpu": "0"}),
    "object store": lambda d: cluster(d)["workerGroupSpecs"][0]["rayStartParams"].update(
        {"object-store-memory": "3000000000"}
    ),
    "image's tag": lambda d: worker(d).update(image="understudy:latest"),
    "image's version": lambda d: worker(d).update(image="understudy:0.2.0-cpu"),
    "image's kind": lambda d: worker(d).update(image="understudy:0.1.0-tpu"),
    "user": lambda d: cluster(d)["headGroupSpec"]["template"]["spec"]["securityContext"].update(runAsUser=0),
    "root file system": lambda d: worker(d)["securityContext"].update(readOnlyRootFilesystem=False),
    "label of a policy": lambda d: only(d, "NetworkPolicy", "agents")["spec"]["podSelector"]["matchLabels"].update(
        {"understudy/part": "server"}
    ),
    "label of a budget": lambda d: only(d, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].update(
        {"understudy/part": "server"}
    ),
    "label of the pods": lambda d: cluster(d)["workerGroupSpecs"][0]["template"]["metadata"]["labels"].pop(
        "app.kubernetes.io/part-of"
    ),
    "too few GPUs": lambda d: cluster(d)["workerGroupSpecs"][1].update(maxReplicas=3),
    "too many gateways": lambda d: (
        set_recipe(d, "max_replicas = 8", "max_replicas = 99"),
        set_config(d, "max_replicas: 8", "max_replicas: 99"),
    ),
    "fewest above most": lambda d: cluster(d)["workerGroupSpecs"][0].update(minReplicas=5),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_found(mutation):
    documents = build("gpu-autoscaled")
    MUTATIONS[mutation](documents)
    assert code_problems(documents) != []


def test_the_served_bases_may_be_more_than_the_recipe_s():
    """How a release on another base is prepared (k8s/README.md)."""
    documents = build("gpu-one-node")
    set_config(documents, "  args:\n", "  args:\n    bases: [bases/other-0123456789ab]\n")
    assert code_problems(documents) == []
    assert recipe_of(documents).select.base.endswith("Qwen3-0.6B")
