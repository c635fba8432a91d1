"""What the manifests say of this code, against the code: words, recipes, environment, ports, paths, images, labels.

Each check takes an overlay's documents and returns what is wrong, one line each. Names are looked up where they are read:
in our sources, and in the installed Ray, huggingface_hub and pyarrow.
"""

import ast
import contextlib
import functools
import importlib
import io
import mmap
import pathlib
import re
import shlex
import tempfile
import tomllib
import warnings
from collections.abc import Iterator
from typing import Any

import huggingface_hub.constants
import pyarrow
import ray
import yaml
from k8s_manifests import K8S, ROOT, Document, jobs, only, pods, ray_clusters
from ray._private import ray_constants
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.dashboard.consts import DASHBOARD_METRIC_PORT

from cluster.access import keys_folder
from cluster.config import validate
from cluster.errors import ConfigError
from jobs.__main__ import build_parser
from jobs.plan import plan_conversion, plan_serving
from jobs.recipe import Recipe, load_recipe
from jobs.serve import serve_args, serve_config
from serving.app import ServeArgs
from serving.passthrough import OWN_PATHS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY = pathlib.Path(ray.__file__).parent
OUTSIDE_PORTS = {53: "DNS", 443: "HTTPS", 6443: "the API server", 8200: "Vault", 6379: "GCS and Redis"}
KUBERAY_LABELS = [{"ray.io/node-type": "redis-cleanup"}]
"""Pods that KubeRay makes by itself, as the policies name them."""


def entrypoint_problems(documents: list[Document]) -> list[str]:
    """Words that `understudy` does not take, or whose recipe does not load."""
    problems = []
    for where, spec in jobs(documents):
        try:
            parse_entrypoint(spec["entrypoint"], documents)
        except (ConfigError, ValueError) as error:
            problems.append(f"{where} entrypoint: {error}")
    return problems


def parse_entrypoint(text: str, documents: list[Document]) -> Recipe:
    """The recipe that the words of a conversion give in its container.

    Raises:
        ValueError, ConfigError: they are no words of ours, or not of a conversion.
    """
    program, *words = shlex.split(text)
    if program not in PROJECT["scripts"]:
        raise ValueError(f"{program} is no script of this project")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = parser().parse_args(words)
    except SystemExit:
        raise ValueError(said.getvalue().strip().splitlines()[-1]) from None
    if options.verb not in ("convert", "refine"):
        raise ValueError(f"{options.verb} is neither a conversion nor a refinement")
    with mounted(documents) as folder:
        recipe = load_recipe([word.replace("recipe=/etc/understudy", f"recipe={folder}") for word in options.words])
        plan_conversion(with_known_base(recipe))
    return recipe


def with_known_base(recipe: Recipe) -> Recipe:
    """The recipe with a base of the catalog where its own is a folder of the cluster's store, which is not here."""
    if not (recipe.select.base or "").startswith(f"{recipe.store}/"):
        return recipe
    return recipe.model_copy(update={"select": recipe.select.model_copy(update={"base": "qwen3-0.6b"})})


parser = functools.cache(build_parser)


@contextlib.contextmanager
def mounted(documents: list[Document]) -> Iterator[pathlib.Path]:
    """The ConfigMap of the recipe as the folder that the containers have at /etc/understudy."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in only(documents, "ConfigMap", "understudy-config")["data"].items():
            (pathlib.Path(folder) / name).write_text(text)
        yield pathlib.Path(folder)


def recipe_of(documents: list[Document]) -> Recipe:
    with mounted(documents) as folder:
        return load_recipe([f"recipe={folder}/recipe.toml"])


def serve_problems(documents: list[Document]) -> list[str]:
    """serveConfigV2 against the recipe and Ray Serve's own schema. `args.bases` may name more than a recipe can."""
    spec, recipe = only(documents, "RayService")["spec"], recipe_of(documents)
    if spec["serveConfigV2"] != only(documents, "ConfigMap", "understudy-config")["data"]["serve-config.yaml"]:
        return ["serveConfigV2: is not the overlay's serve-config.yaml"]
    config = yaml.safe_load(spec["serveConfigV2"])
    try:
        serve_schema().model_validate(config)
        (application,) = config["applications"]
        module, name = application["import_path"].split(":")
        assert callable(getattr(importlib.import_module(module), name))
        args = validate(ServeArgs, application["args"])
    except (ConfigError, ValueError, ImportError, AttributeError) as error:
        return [f"serveConfigV2: {error}"]
    problems = [] if args.model_copy(update={"bases": ()}) == serve_args(recipe) else ["serveConfigV2: args differ"]
    application["args"].pop("bases", None)
    if config != serve_config(recipe):
        problems.append("serveConfigV2: is not what `understudy serve --print-config` says of the recipe")
    return problems


@functools.cache
def serve_schema() -> Any:
    """Ray Serve's own, whose import warns of a pydantic to come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve.schema import ServeDeploySchema
    return ServeDeploySchema


def size_problems(documents: list[Document]) -> list[str]:
    """Recipes that ask for more than their clusters come to, or say that these come to something else."""
    problems = []
    for (where, job), (_, spec) in zip(jobs(documents), job_clusters(documents), strict=True):
        recipe = parse_entrypoint(job["entrypoint"], documents)
        most = {kind: capacity(spec, kind, "maxReplicas") for kind in ("cpu", "nvidia.com/gpu")}
        if (recipe.limits.cpus, recipe.limits.gpus) != (most["cpu"], most["nvidia.com/gpu"]):
            problems.append(f"{where}: limits {recipe.limits} and the workers' {most}")
        for part in plan_conversion(with_known_base(recipe)):
            if part.total_cpus > most["cpu"] or part.total_gpus > most["nvidia.com/gpu"]:
                problems.append(f"{where}: {part.name} wants more than {most}")
    for where, spec in ray_clusters(documents):
        for group in spec["workerGroupSpecs"]:
            if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
                problems.append(f"{where} {group['groupName']}: replicas are not between least and most")
    service, recipe = only(documents, "RayService")["spec"]["rayClusterConfig"], recipe_of(documents)
    problems += [] if fits(recipe, service) else ["RayService: the recipe's most replicas do not fit its most workers"]
    return problems


def fits(recipe: Recipe, spec: Document) -> bool:
    gateway = recipe.gateway.model_copy(update={"min_replicas": recipe.gateway.max_replicas})
    specialists = recipe.specialists.model_copy(update={"min_replicas": recipe.specialists.max_replicas})
    most = recipe.model_copy(update={"gateway": gateway, "specialists": specialists})
    plan = plan_serving(most, num_bases=1)
    cpus, gpus = sum(part.total_cpus for part in plan), sum(part.total_gpus for part in plan)
    return cpus <= capacity(spec, "cpu", "maxReplicas") and gpus <= capacity(spec, "nvidia.com/gpu", "maxReplicas")


def capacity(spec: Document, kind: str, field: str) -> float:
    """CPUs or GPUs of all workers, at most or at least; the head offers Ray none."""
    amounts = [
        (one[field], one["template"]["spec"]["containers"][0]["resources"]["limits"])
        for one in spec["workerGroupSpecs"]
    ]
    return sum(number * float(limits.get(kind, 0)) for number, limits in amounts)


def job_clusters(documents: list[Document]) -> list[tuple[str, Document]]:
    return [(where, spec) for where, spec in ray_clusters(documents) if where.startswith(("RayJob", "RayCronJob"))]


def environment_problems(documents: list[Document]) -> list[str]:
    """Variables that nothing reads, and secrets that no template makes."""
    problems, secrets = [], secret_keys()
    for where, _, pod in pods(documents):
        for container in pod["containers"]:
            text = " ".join(container.get("args", ()))
            for one in container.get("env", ()):
                if not (is_read(one["name"]) or f"${one['name']}" in text):
                    problems.append(f"{where}: env {one['name']} is read by nothing")
                key = one.get("valueFrom", {}).get("secretKeyRef")
                if key and key["key"] not in secrets.get(key["name"], ()):
                    problems.append(f"{where}: env {one['name']}: no key {key['key']} in a template of {key['name']}")
    for where, spec in ray_clusters(documents):
        options = spec.get("authOptions", {})
        if options.get("mode") != "token" or "auth_token" not in secrets.get(options.get("secretName"), ()):
            problems.append(f"{where}: authOptions {options}: no token, or none that a template makes")
        if f"ray[serve,train,tune]=={spec['rayVersion']}" not in PROJECT["dependencies"]:
            problems.append(f"{where}: rayVersion {spec['rayVersion']} is not the one that is installed")
        password = spec.get("gcsFaultToleranceOptions", {}).get("redisPassword", {}).get("valueFrom", {})
        if password and password["secretKeyRef"]["key"] not in secrets.get(password["secretKeyRef"]["name"], ()):
            problems.append(f"{where}: redisPassword is in no template")
    return problems


def secret_keys() -> dict[str, set[str]]:
    """Secret -> keys, as the templates of k8s/secrets make them."""
    kustomization = yaml.safe_load((K8S / "secrets/kustomization.yaml").read_text())
    found = {}
    for one in kustomization["secretGenerator"]:
        lines = (K8S / "secrets" / f"{one['envs'][0]}.template").read_text().splitlines()
        found[one["name"]] = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    return found


@functools.cache
def is_read(name: str) -> bool:
    """Whether our code, or the library whose variable it is by its name, reads it."""
    if name in our_words():
        return True
    quoted = f'"{name}"'
    if name.startswith("RAY_") and name.upper() != name:  # Ray's own config, read by its C++ under the lower-case name
        return holds(RAY / "_raylet.so", name.removeprefix("RAY_"))
    sources = {
        "RAY_": ["serve/_private/constants.py", "_private/ray_constants.py", "_common/usage/usage_constants.py"],
        "OMP_": ["_private/utils.py"],
    }
    sources["RAY_"].append("_private/accelerators/accelerator.py")
    files = [RAY / path for path in sources.get(name[:4], ())]
    if name.startswith("HF_"):
        files = [pathlib.Path(huggingface_hub.constants.__file__)]
    if name.startswith("AWS_"):
        return any(holds(path, name) for path in pathlib.Path(pyarrow.__file__).parent.glob("libarrow.so.*"))
    return any(quoted in path.read_text() for path in files)


@functools.cache
def our_words() -> frozenset[str]:
    """Every string of our sources that is a word."""
    files = [path for package in ("cluster", "training", "serving", "jobs") for path in (ROOT / package).rglob("*.py")]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    return frozenset(one.value for one in nodes if isinstance(one, ast.Constant) and isinstance(one.value, str))


def holds(path: pathlib.Path, text: str) -> bool:
    """Whether a compiled library has this text as one of its strings."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(b"\0" + text.encode() + b"\0") >= 0


def port_problems(documents: list[Document]) -> list[str]:
    """Ports that are not those of the processes, and names of ports that no container has."""
    known = {
        "serve": recipe_of(documents).serve.http.port,
        "gcs-server": ray_constants.DEFAULT_PORT,
        "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT,
        "as-metrics": AUTOSCALER_METRIC_PORT,
        "dash-metrics": DASHBOARD_METRIC_PORT,
        "redis": 6379,
    }
    problems = []
    for where, spec in ray_clusters(documents):
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        ports = {one["rayStartParams"]["metrics-export-port"] for one in groups}
        head_ports = {one["name"] for one in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]}
        # KubeRay (controllers/ray/common/service.go) makes the endpoint's Service from the head's port of this name.
        problems += [] if "serve" in head_ports else [f"{where}: the head has no port named serve"]
        problems += [] if ports == {"8080"} else [f"{where}: metrics-export-port {ports}"]
    known["metrics"] = 8080
    labelled = []
    for where, labels, pod in pods(documents):
        named = {one["name"]: one["containerPort"] for one in pod["containers"][0].get("ports", ())}
        labelled.append((labels, named))
        problems += [f"{where}: port {name}={one}" for name, one in named.items() if known.get(name) != one]
        for probe in [one for key, one in pod["containers"][0].items() if key.endswith("Probe")]:
            target = probe.get("httpGet") or probe["tcpSocket"]
            if target["port"] not in named:
                problems.append(f"{where}: the probe's port {target['port']} is none of its ports")
            if "path" in target and target["path"] not in gateway_paths():
                problems.append(f"{where}: the probe's path {target['path']} is none of the gateway's")
    for document in documents:
        where, spec = f"{document['kind']}/{document['metadata']['name']}", document.get("spec", {})
        if document["kind"] == "Service":
            for port in spec["ports"]:
                pods_ports = [named for labels, named in labelled if spec["selector"].items() <= labels.items()]
                if not pods_ports or any(one.get(port["targetPort"]) != port["port"] for one in pods_ports):
                    problems.append(f"{where}: {port} is a port of no pod, or not of all")
        if document["kind"] == "NetworkPolicy":
            rules = [*spec.get("ingress", ()), *spec.get("egress", ())]
            numbers = {one["port"] for rule in rules for one in rule.get("ports", ())}
            problems += [f"{where}: port {one}" for one in numbers - {*known.values(), *OUTSIDE_PORTS}]
    return problems


@functools.cache
def gateway_paths() -> frozenset[str]:
    """Paths of the gateway's own."""
    words = {one for one in our_words() if re.fullmatch(r"/[a-z]+", one)}
    api = (ROOT / "serving/api.py").read_text()
    return frozenset({*OWN_PATHS, *(one for one in words if f'"{one}": (' in api)})


def mount_problems(documents: list[Document]) -> list[str]:
    """Paths of the recipe that are no volumes, volumes that nobody makes, and places that must be writable and are not."""
    problems, recipe = [], recipe_of(documents)
    claims = {one["metadata"]["name"] for one in documents if one["kind"] == "PersistentVolumeClaim"}
    maps = {one["metadata"]["name"] for one in documents if one["kind"] == "ConfigMap"}
    for where, labels, pod in pods(documents):
        volumes = {one["name"]: one for one in pod.get("volumes", ())}
        for container in pod["containers"]:
            mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
            problems += [f"{where}: no volume {name}" for name in set(mounts.values()) - {*volumes, "data"}]
            needed = {"/tmp"} | ({"/dev/shm"} if "ray.io/is-ray-node" in labels else set())
            if container["image"].startswith(PROJECT["name"]):
                needed.add(docker_home())
            if "ray.io/is-ray-node" in labels:
                needed |= {recipe.store, str(keys_folder(recipe.store)), "/etc/understudy"}
            problems += [f"{where}: nothing is mounted at {path}" for path in sorted(needed - mounts.keys())]
        for one in volumes.values():
            claim = one.get("persistentVolumeClaim", {}).get("claimName")
            if (claim and claim not in claims) or (one.get("configMap") and one["configMap"]["name"] not in maps):
                problems.append(f"{where}: volume {one} is made by nobody")
    return problems


def docker_home() -> str:
    found = re.search(r"^ENV HOME=(\S+)", (K8S / "docker/cpu.Dockerfile").read_text(), re.MULTILINE)
    assert found
    return found[1]


def start_problems(documents: list[Document]) -> list[str]:
    """Words that `ray start` does not take, and object stores that are larger than the memory they lie in."""
    problems, source = [], (RAY / "scripts/scripts.py").read_text()
    for where, spec in ray_clusters(documents):
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            words = group["rayStartParams"]
            problems += [f"{where}: ray start --{one}: no such option" for one in words if f'"--{one}"' not in source]
            pod = group["template"]["spec"]
            (shm,) = (one["emptyDir"]["sizeLimit"] for one in pod["volumes"] if one["name"] == "shm")
            most = int(shm.removesuffix("Gi")) * 2**30
            if not 0 < int(words["object-store-memory"]) < most:
                problems.append(f"{where}: object-store-memory={words['object-store-memory']} in {shm} of /dev/shm")
            if int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30 < 2 * most - 2**30:
                problems.append(f"{where}: {shm} of /dev/shm leave too little of the container's memory")
    return problems


def security_problems(documents: list[Document]) -> list[str]:
    """Pods with more rights than the restricted standard gives, another user than the image's, or an image of no file."""
    problems = []
    for where, _, pod in pods(documents):
        context = pod["securityContext"]
        if not context.get("runAsNonRoot") or context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            problems.append(f"{where}: pod securityContext {context}")
        locked = {"runAsNonRoot": True, "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False}
        for container in pod["containers"]:
            if container["securityContext"] != {**locked, "capabilities": {"drop": ["ALL"]}}:
                problems.append(f"{where}: container securityContext {container['securityContext']}")
            problems += image_problems(where, container["image"], context)
    for where, spec in ray_clusters(documents):
        if spec.get("autoscalerOptions", {}).get("securityContext", {"readOnlyRootFilesystem": True}) is None:
            problems.append(f"{where}: the autoscaler has no securityContext")
    return problems


def image_problems(where: str, image: str, context: dict[str, Any]) -> list[str]:
    name, _, tag = image.rpartition(":")
    if not name or tag in ("", "latest"):
        return [f"{where}: image {image} is not pinned"]
    if name != PROJECT["name"]:
        return []
    version, _, kind = tag.partition("-")
    file = K8S / f"docker/{kind}.Dockerfile"
    if version != PROJECT["version"] or not file.is_file():
        return [f"{where}: image {image} is built by no Dockerfile of version {PROJECT['version']}"]
    user = f"USER {context.get('runAsUser')}:{context.get('runAsGroup')}\n"
    return [] if user in file.read_text() else [f"{where}: {file.name} has another user than {context}"]


def selector_problems(documents: list[Document]) -> list[str]:
    """Policies, budgets, services and monitors that select nothing."""
    labelled = [labels for _, labels, _ in pods(documents)] + KUBERAY_LABELS
    services = [one["metadata"].get("labels", {}) for one in documents if one["kind"] == "Service"]
    ports = [port["name"] for one in documents if one["kind"] == "Service" for port in one["spec"]["ports"]]
    problems = []
    for document in documents:
        where, spec = f"{document['kind']}/{document['metadata']['name']}", document.get("spec", {})
        selectors: list[Document] = []
        if document["kind"] == "NetworkPolicy":
            rules = [*spec.get("ingress", ()), *spec.get("egress", ())]
            peers = [one for rule in rules for one in [*rule.get("from", ()), *rule.get("to", ())]]
            # Pods of other namespaces are not ours to know.
            selectors = [one["podSelector"] for one in peers if "podSelector" in one and "namespaceSelector" not in one]
            selectors.append(spec["podSelector"])
        elif document["kind"] == "PodDisruptionBudget":
            selectors = [spec["selector"]]
        elif document["kind"] == "Service":
            selectors = [{"matchLabels": spec["selector"]}]
        elif document["kind"] == "ServiceMonitor":
            if not any(matches(spec["selector"], one) for one in services):
                problems.append(f"{where}: selects no Service")
            problems += [f"{where}: no port {one['port']}" for one in spec["endpoints"] if one["port"] not in ports]
        problems += [
            f"{where}: {one} selects no pod" for one in selectors if not any(matches(one, x) for x in labelled)
        ]
    return problems + unseen_problems(documents)


def unseen_problems(documents: list[Document]) -> list[str]:
    """Ray's pods that Prometheus does not find, where there is one."""
    services = [one["spec"] for one in documents if one["kind"] == "Service"]
    scraped = [one["selector"] for one in services if any(port["name"] == "metrics" for port in one["ports"])]
    found = {where: labels for where, labels, _ in pods(documents) if "ray.io/is-ray-node" in labels}
    lost = [where for where, have in found.items() if not any(one.items() <= have.items() for one in scraped)]
    return [f"{where}: is not scraped" for where in lost if scraped]


def matches(selector: Document, labels: dict[str, str]) -> bool:
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    return all(labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", ()))


CHECKS = (
    entrypoint_problems, serve_problems, size_problems, environment_problems, port_problems, mount_problems, start_problems,
    security_problems, selector_problems,
)  # fmt: skip


def code_problems(documents: list[Document]) -> list[str]:
    """All that is wrong; a document without the place that a check looks at is wrong too."""
    problems = []
    for check in CHECKS:
        try:
            problems += check(documents)
        except (KeyError, ValueError, ConfigError, AssertionError) as error:
            problems.append(f"{check.__name__}: {type(error).__name__}: {error}")
    return problems
