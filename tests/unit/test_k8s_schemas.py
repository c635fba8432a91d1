"""Every overlay builds and is what the API server takes: KubeRay's CRD schemas, and our own for the other kinds."""

import shutil

import pytest
import yaml
from k8s_manifests import K8S, OVERLAYS, build, crd_schema, kustomize, need_crds, need_kubectl, only, schema_problems

OPTIONS = ("object-store", "kueue")
"""Components that are commented out in gpu-autoscaled."""


@pytest.fixture(scope="module")
def with_options(tmp_path_factory):
    """gpu-autoscaled with every option that it has commented out."""
    need_kubectl()
    folder = tmp_path_factory.mktemp("options")
    shutil.copytree(K8S, folder / "k8s")
    file = folder / "k8s/overlays/gpu-autoscaled/kustomization.yaml"
    text = file.read_text()
    for name in OPTIONS:
        assert f"# - ../../components/{name}\n" in text
        text = text.replace(f"# - ../../components/{name}\n", f"- ../../components/{name}\n")
    file.write_text(text)
    return kustomize(file.parent)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_match_their_schemas(overlay):
    documents = build(overlay)
    need_crds()
    assert schema_problems(documents) == []
    kinds = [one["kind"] for one in documents]
    assert {"RayCluster", "RayJob", "RayCronJob", "RayService", "NetworkPolicy", "PodDisruptionBudget"} <= set(kinds)


def test_options_match_their_schemas(with_options):
    need_crds()
    assert schema_problems(with_options) == []
    job = only(with_options, "RayJob")
    queue = only(with_options, "LocalQueue")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert only(with_options, "ClusterQueue")["metadata"]["name"] == queue["spec"]["clusterQueue"]
    # Kueue admits a RayJob only if it knows its size.
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    assert all(one["minReplicas"] == one["maxReplicas"] for one in job["spec"]["rayClusterSpec"]["workerGroupSpecs"])


def test_the_queue_holds_one_conversion(with_options):
    spec = only(with_options, "RayJob")["spec"]
    groups = [(1, spec["rayClusterSpec"]["headGroupSpec"]["template"]), (1, spec["submitterPodTemplate"])]
    groups += [(one["replicas"], one["template"]) for one in spec["rayClusterSpec"]["workerGroupSpecs"]]
    asked = {"cpu": 0.0, "memory": 0.0, "nvidia.com/gpu": 0.0}
    for number, template in groups:
        for name, amount in template["spec"]["containers"][0]["resources"]["requests"].items():
            asked[name] += number * quantity(amount)
    (flavor,) = only(with_options, "ClusterQueue")["spec"]["resourceGroups"][0]["flavors"]
    quota = {one["name"]: quantity(one["nominalQuota"]) for one in flavor["resources"]}
    assert all(asked[name] <= quota[name] for name in asked), (asked, quota)


def quantity(text: str) -> float:
    units = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30}
    unit = next((one for one in units if text.endswith(one)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)


def test_schemas_reject_what_they_do_not_name():
    need_crds()
    container = crd_schema("RayCluster")["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
    container = container["properties"]["spec"]["properties"]["containers"]["items"]
    assert container["additionalProperties"] is False and "image" in container["properties"]
    amounts = container["properties"]["resources"]["properties"]["limits"]
    # A map of quantities names no keys of its own, and takes numbers and texts.
    assert amounts["additionalProperties"]["anyOf"] == [{"type": "integer"}, {"type": "string"}]


def rename(value: dict, old: str, new: str) -> None:
    value[new] = value.pop(old)


def head(documents: list[dict]) -> dict:
    return only(documents, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]


def policy(documents: list[dict], name: str) -> dict:
    return only(documents, "NetworkPolicy", name)["spec"]


def metrics(documents: list[dict]) -> dict:
    return only(documents, "ServiceMonitor")["spec"]


MUTATIONS = {
    "a field of a RayService": lambda d: rename(only(d, "RayService")["spec"], "serveConfigV2", "serveConfigV3"),
    "a field of a RayJob": lambda d: rename(only(d, "RayJob")["spec"], "shutdownAfterJobFinishes", "shutdown"),
    "a field of a job template": lambda d: rename(
        only(d, "RayCronJob")["spec"]["jobTemplate"], "entrypoint", "command"
    ),
    "a group without a name": lambda d: only(d, "RayCluster")["spec"]["workerGroupSpecs"][0].pop("groupName"),
    "an unknown auth mode": lambda d: only(d, "RayCluster")["spec"]["authOptions"].update(mode="basic"),
    "a text for a number": lambda d: only(d, "RayCluster")["spec"]["workerGroupSpecs"][0].update(maxReplicas="2"),
    "a field of a pod": lambda d: rename(head(d), "containers", "container"),
    "a field of a container": lambda d: rename(head(d)["containers"][0], "image", "img"),
    "a quantity that is none": lambda d: head(d)["containers"][0]["resources"]["limits"].update(memory="6 GB"),
    "an API version": lambda d: only(d, "RayJob").update(apiVersion="ray.io/v2"),
    "another namespace": lambda d: only(d, "RayJob")["metadata"].update(namespace="default"),
    "a field of a policy": lambda d: rename(policy(d, "agents")["ingress"][0], "from", "source"),
    "a rule for everybody": lambda d: policy(d, "agents")["ingress"][0].pop("from"),
    "a port that is none": lambda d: policy(d, "agents")["ingress"][0]["ports"][0].update(port=0),
    "a budget Kubernetes cannot count": lambda d: rename(
        only(d, "PodDisruptionBudget", "understudy-serve-workers")["spec"], "minAvailable", "maxUnavailable"
    ),
    "a field of a claim": lambda d: rename(
        only(d, "PersistentVolumeClaim", "understudy-store")["spec"], "accessModes", "accessMode"
    ),
    "a field of a monitor": lambda d: rename(metrics(d)["endpoints"][0], "port", "targetPort"),
    "a field of an alert": lambda d: rename(
        only(d, "PrometheusRule")["spec"]["groups"][0]["rules"][0], "expr", "query"
    ),
    "a field of a StatefulSet": lambda d: rename(only(d, "StatefulSet")["spec"], "serviceName", "service"),
    "a root file system that can be written to": lambda d: only(d, "StatefulSet")["spec"]["template"]["spec"][
        "containers"
    ][0]["securityContext"].pop("readOnlyRootFilesystem"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_found(mutation):
    documents = build("gpu-autoscaled")
    need_crds()
    MUTATIONS[mutation](documents)
    assert schema_problems(documents) != []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_leave_room_for_what_kuberay_makes_of_them(overlay):
    """A RayCluster and a RayService of one name would share NAME-head-svc; longer names than these are refused."""
    most = {"RayCluster": 53, "RayService": 47, "RayJob": 47, "RayCronJob": 36}
    names = [(one["kind"], one["metadata"]["name"]) for one in build(overlay) if one["kind"] in most]
    assert all(len(name) <= most[kind] for kind, name in names)
    heads = [name for kind, name in names if kind in ("RayCluster", "RayService")]
    assert len(set(heads)) == len(heads)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_ray_cluster_is_the_one_that_is_described(overlay):
    """The component one-cluster-spec copied it: but for names of parts, numbers of workers and the probe they are equal."""
    documents = build(overlay)
    specs = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}
    described = only(documents, "RayCluster")["spec"]
    others = [only(documents, kind)["spec"][field] for kind, field in specs.items()]
    others.append(only(documents, "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"])
    for spec in [described, *others]:
        for template in [spec["headGroupSpec"]["template"], *(one["template"] for one in spec["workerGroupSpecs"])]:
            del template["metadata"]["labels"]["understudy/part"]
            template["spec"]["containers"][0].pop("readinessProbe", None)
            template["spec"].pop("topologySpreadConstraints", None)
        for group in spec["workerGroupSpecs"]:
            for field in ("replicas", "minReplicas", "maxReplicas"):
                del group[field]
    assert all(spec == described for spec in others)


def test_secrets_have_templates_without_values(tmp_path):
    """Filled in, they are the Secrets; as they are committed they hold nothing."""
    need_kubectl()
    templates = sorted((K8S / "secrets").glob("*.env.template"))
    assert templates and not list((K8S / "secrets").glob("*.env"))
    shutil.copytree(K8S / "secrets", tmp_path / "secrets")
    for template in templates:
        lines = [line for line in template.read_text().splitlines() if line and not line.startswith("#")]
        assert all(line.endswith("=") and line.count("=") == 1 for line in lines), template.name
        (tmp_path / "secrets" / template.stem).write_text("".join(f"{line}value\n" for line in lines))
    documents = kustomize(tmp_path / "secrets")
    assert len(documents) == len(templates)
    assert all(one["kind"] == "Secret" and one["metadata"]["namespace"] == "understudy" for one in documents)
    generated = yaml.safe_load((K8S / "secrets/kustomization.yaml").read_text())["secretGenerator"]
    assert [one["metadata"]["name"] for one in documents] == sorted(one["name"] for one in generated)
