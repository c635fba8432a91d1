"""The manifests below k8s/ as documents, and what they must look like: KubeRay's CRD schemas, made strict, and our own.

Where kubectl or the CRD schemas are absent, tests are skipped with a reason that says what is missing.
"""

import copy
import functools
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml
from shared_data import DATA, NO_DATA

ROOT = pathlib.Path(__file__).parents[1]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
CRDS = DATA.parent / "kuberay"
KUBECTL = (1, 27)
"""kubectl that carries kustomize 5: replacements of whole objects, keys in brackets, JSON patches that copy."""
Document = dict[str, Any]


@functools.cache
def kubectl_version() -> tuple[int, int] | None:
    path = shutil.which("kubectl")
    if path is None:
        return None
    text = subprocess.run([path, "version", "--client"], capture_output=True, text=True).stdout
    found = re.search(r"v(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def need_kubectl() -> None:
    found = kubectl_version()
    if found is None or found < KUBECTL:
        pytest.skip(f"kubectl {'.'.join(map(str, KUBECTL))} or later is needed (found {found})")


def need_crds() -> None:
    if not (CRDS / "ray.io_rayclusters.yaml").is_file():
        pytest.skip(f"{NO_DATA}: KubeRay's CRD schemas, in {CRDS}")


def kustomize(folder: pathlib.Path) -> list[Document]:
    run = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return list(yaml.safe_load_all(run.stdout))


@functools.cache
def _built(overlay: str) -> list[Document]:
    return kustomize(K8S / "overlays" / overlay)


def build(overlay: str) -> list[Document]:
    """The documents of an overlay; the caller may change them."""
    need_kubectl()
    return copy.deepcopy(_built(overlay))


@functools.cache
def crd_schema(kind: str) -> Document:
    """The stored version's schema, with unknown fields rejected wherever the API server would drop them."""
    crd = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(one for one in crd["spec"]["versions"] if one["storage"])
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["apiVersion"] = {"const": f"{crd['spec']['group']}/{version['name']}"}
    schema["properties"]["kind"] = {"const": crd["spec"]["names"]["kind"]}
    schema["properties"]["metadata"] = METADATA
    del schema["properties"]["status"]
    return {**schema, "required": ["apiVersion", "kind", "metadata", "spec"]}


def strict(schema: Any) -> Any:
    """A structural OpenAPI v3 schema as a JSON Schema: what it does not name is an error, unless it keeps unknown fields."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: strict(one) for name, one in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-") and key not in ("default", "description")
    }
    if schema.get("x-kubernetes-int-or-string") and "anyOf" not in schema:
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not keeps:
        made["additionalProperties"] = False
    return made


def obj(required: str = "", /, **properties: Any) -> Document:
    """An object of these fields and no others; `required` are names with spaces between."""
    fields = {name.rstrip("_"): value for name, value in properties.items()}
    return {"type": "object", "properties": fields, "additionalProperties": False, "required": required.split()}


def many(item: Document) -> Document:
    return {"type": "array", "items": item, "minItems": 1}


TEXT: Document = {"type": "string", "minLength": 1}
NUMBER: Document = {"type": "integer"}
YES: Document = {"type": "boolean"}
NAME: Document = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 63}
LABELS: Document = {
    "type": "object",
    "propertyNames": {"pattern": r"^([a-z0-9.-]+/)?[A-Za-z0-9]([-\w.]*[A-Za-z0-9])?$"},
    "additionalProperties": {"type": "string", "pattern": r"^([A-Za-z0-9]([-\w.]*[A-Za-z0-9])?)?$", "maxLength": 63},
}
ANNOTATIONS: Document = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = obj("name", name=NAME, namespace=NAME, labels=LABELS, annotations=ANNOTATIONS)
QUANTITY: Document = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
PORT: Document = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 65535}, NAME]}
EXPRESSION = obj(
    "key operator", key=TEXT, operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]}, values=many(TEXT)
)
SELECTOR = obj(matchLabels=LABELS, matchExpressions=many(EXPRESSION))
PEER = obj(podSelector=SELECTOR, namespaceSelector=SELECTOR, ipBlock=obj("cidr", cidr=TEXT, except_=many(TEXT)))
PORTS = many(obj("port", port=PORT, protocol={"enum": ["TCP", "UDP"]}, endPort=NUMBER))
SECRET_KEY = obj("name key", name=NAME, key=TEXT, optional=YES)
LOCKED = obj(
    "runAsNonRoot readOnlyRootFilesystem allowPrivilegeEscalation capabilities",
    runAsNonRoot=YES, readOnlyRootFilesystem=YES, allowPrivilegeEscalation=YES, capabilities=obj("drop", drop=many(TEXT)),
)  # fmt: skip
AMOUNTS: Document = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = obj(
    "name image resources securityContext",
    name=NAME, image=TEXT, command=many(TEXT), args=many(TEXT), securityContext=LOCKED,
    env=many(obj("name", name=TEXT, value={"type": "string"}, valueFrom=obj(secretKeyRef=SECRET_KEY))),
    ports=many(obj("name containerPort", name=NAME, containerPort=NUMBER)),
    readinessProbe=obj("tcpSocket", tcpSocket=obj("port", port=PORT)),
    resources=obj("requests limits", requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts=many(obj("name mountPath", name=NAME, mountPath=TEXT, readOnly=YES)),
)  # fmt: skip
POD = obj(
    "containers securityContext",
    automountServiceAccountToken=YES, containers=many(CONTAINER),
    securityContext=obj("runAsNonRoot seccompProfile", runAsNonRoot=YES, runAsUser=NUMBER, runAsGroup=NUMBER,
                        fsGroup=NUMBER, seccompProfile=obj("type", type=TEXT)),
    volumes=many(obj("name", name=NAME, emptyDir=obj(medium=TEXT, sizeLimit=QUANTITY))),
)  # fmt: skip
CLAIM = obj(
    "accessModes resources",
    accessModes=many({"enum": ["ReadWriteMany", "ReadWriteOnce"]}),
    resources=obj("requests", requests=obj("storage", storage=QUANTITY)),
    storageClassName=NAME,
)
RULE = obj(
    "alert expr labels annotations",
    alert={"type": "string", "pattern": "^Understudy[A-Z][A-Za-z]+$"}, expr=TEXT, for_={"type": "string", "pattern": r"^\d+[smhd]$"},
    labels=obj("severity", severity={"enum": ["page", "ticket"]}), annotations=obj("summary", summary=TEXT),
)  # fmt: skip
FLAVOR = obj("name resources", name=NAME, resources=many(obj("name nominalQuota", name=TEXT, nominalQuota=QUANTITY)))
OURS: dict[str, tuple[str, Document | None]] = {
    "Namespace": ("v1", None),
    "PersistentVolumeClaim": ("v1", CLAIM),
    "Service": ("v1", obj(
        "selector ports", clusterIP={"const": "None"}, publishNotReadyAddresses=YES, selector=LABELS,
        ports=many(obj("name port targetPort", name=NAME, port=NUMBER, targetPort=PORT)),
    )),
    "StatefulSet": ("apps/v1", obj(
        "serviceName replicas selector template volumeClaimTemplates", serviceName=NAME, replicas=NUMBER, selector=SELECTOR,
        template=obj("metadata spec", metadata=obj("labels", labels=LABELS), spec=POD),
        volumeClaimTemplates=many(obj("metadata spec", metadata=METADATA, spec=CLAIM)),
    )),
    # Ray's pods have no scale subresource: only minAvailable, as a number, is defined for them.
    "PodDisruptionBudget": ("policy/v1", obj("minAvailable selector", minAvailable=NUMBER, selector=SELECTOR)),
    "NetworkPolicy": ("networking.k8s.io/v1", obj(
        "podSelector policyTypes", podSelector=SELECTOR, policyTypes=many({"enum": ["Ingress", "Egress"]}),
        ingress=many(obj("from", from_=many(PEER), ports=PORTS)), egress=many(obj("to", to=many(PEER), ports=PORTS)),
    )),
    "ServiceMonitor": ("monitoring.coreos.com/v1", obj(
        "selector endpoints", selector=SELECTOR, podTargetLabels=many(TEXT),
        endpoints=many(obj("port interval", port=NAME, interval={"type": "string", "pattern": r"^\d+s$"})),
    )),
    "PrometheusRule": ("monitoring.coreos.com/v1", obj("groups", groups=many(obj("name rules", name=NAME, rules=many(RULE))))),
    "ResourceFlavor": ("kueue.x-k8s.io/v1beta1", None),
    "ClusterQueue": ("kueue.x-k8s.io/v1beta1", obj(
        "namespaceSelector resourceGroups", namespaceSelector=SELECTOR,
        resourceGroups=many(obj("coveredResources flavors", coveredResources=many(TEXT), flavors=many(FLAVOR))),
    )),
    "LocalQueue": ("kueue.x-k8s.io/v1beta1", obj("clusterQueue", clusterQueue=NAME)),
}  # fmt: skip
"""API version and spec of the kinds whose schemas are not at hand, as far as these manifests use them."""
CLUSTER_WIDE = ("Namespace", "ResourceFlavor", "ClusterQueue")
CONFIG_MAP = obj(
    "apiVersion kind metadata data", apiVersion={"const": "v1"}, kind=TEXT, metadata=METADATA, data=ANNOTATIONS
)


def schema_of(kind: str) -> Document:
    """The schema that a document of this kind must match; a kind that nobody knows is a KeyError."""
    if kind.startswith("Ray"):
        return crd_schema(kind)
    if kind == "ConfigMap":
        return CONFIG_MAP
    version, spec = OURS[kind]
    fields = {} if spec is None else {"spec": spec}
    return obj(
        " ".join(["apiVersion kind metadata", *fields]),
        apiVersion={"const": version}, kind={"const": kind}, metadata=METADATA, **fields,
    )  # fmt: skip


def schema_problems(documents: list[Document]) -> list[str]:
    """What the API server would refuse or drop, one line each."""
    problems = []
    for document in documents:
        where = f"{document['kind']}/{document['metadata']['name']}"
        for error in jsonschema.Draft202012Validator(schema_of(document["kind"])).iter_errors(document):
            problems.append(f"{where} {error.json_path}: {error.message[:200]}")
        wanted = None if document["kind"] in CLUSTER_WIDE else "understudy"
        if document["metadata"].get("namespace") != wanted:
            problems.append(f"{where}: namespace {document['metadata'].get('namespace')}, not {wanted}")
    return problems


def only(documents: list[Document], kind: str, name: str = "") -> Document:
    (found,) = (one for one in documents if one["kind"] == kind and name in ("", one["metadata"]["name"]))
    return found


def ray_clusters(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """(kind/name, RayClusterSpec) of every Ray cluster that is described."""
    places = {
        "RayCluster": ("spec",),
        "RayService": ("spec", "rayClusterConfig"),
        "RayJob": ("spec", "rayClusterSpec"),
        "RayCronJob": ("spec", "jobTemplate", "rayClusterSpec"),
    }
    for document in documents:
        if document["kind"] in places:
            spec = functools.reduce(lambda value, key: value[key], places[document["kind"]], document)
            yield f"{document['kind']}/{document['metadata']['name']}", spec


def jobs(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """(kind/name, RayJobSpec) of every conversion."""
    for document in documents:
        if document["kind"] in ("RayJob", "RayCronJob"):
            spec = document["spec"]
            yield f"{document['kind']}/{document['metadata']['name']}", spec.get("jobTemplate", spec)


def pods(documents: list[Document]) -> Iterator[tuple[str, dict[str, str], Document]]:
    """(where, labels with those that KubeRay adds, PodSpec) of every pod that comes of the documents."""
    for where, spec in ray_clusters(documents):
        groups = [("head", "headgroup", spec["headGroupSpec"]["template"])]
        groups += [("worker", one["groupName"], one["template"]) for one in spec["workerGroupSpecs"]]
        for node, group, template in groups:
            ray = {"ray.io/is-ray-node": "yes", "ray.io/node-type": node, "ray.io/group": group}
            yield f"{where} {group}", {**template["metadata"]["labels"], **ray}, template["spec"]
    for where, spec in jobs(documents):
        template = spec["submitterPodTemplate"]
        yield f"{where} submitter", template["metadata"]["labels"], template["spec"]
    for document in documents:
        if document["kind"] == "StatefulSet":
            template = document["spec"]["template"]
            yield f"StatefulSet/{document['metadata']['name']}", template["metadata"]["labels"], template["spec"]
