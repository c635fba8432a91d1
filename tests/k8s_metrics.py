"""PromQL of dashboards and alert rules against what is exported: names, labels, and values of labels that the code fixes."""

import functools
import pathlib
import re
from typing import Any, get_args

import ray
from prometheus_client import REGISTRY
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

from cluster.records import Action
from cluster.telemetry import METRICS

RAY = pathlib.Path(ray.__file__).parent
RAY_SOURCES = ("serve/_private/*.py", "dashboard/modules/reporter/reporter_agent.py")
RAY_LABELS = frozenset({"deployment", "instance", "GpuIndex"})
"""Of Ray's own metrics, as far as they are used here; `instance` is Prometheus's."""
VALUES = {
    "action": set(get_args(Action)),
    "agrees": {"true", "false"},
    "basis": {"reported", "estimated"},
    "deployment": {"gateway"},
}
"""Labels whose values stand in the code."""
_WORDS = ("and", "or", "unless")
_SELECTOR = re.compile(r"(?<!\w)([A-Za-z_:][\w:]*)\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


@functools.cache
def exported() -> dict[str, frozenset[str]]:
    """Name that Prometheus sees -> labels, of every metric of METRICS: recorded as Ray's agent does, and read back."""
    recorder = OpenTelemetryMetricRecorder(gauge_metric_ttl_seconds=60.0)
    for name, spec in METRICS.items():
        if spec.kind == "counter":
            recorder.register_counter_metric(name, spec.description)
        elif spec.kind == "gauge":
            recorder.register_gauge_metric(name, spec.description)
        else:
            recorder.register_histogram_metric(name, spec.description, [1.0, 2.0])
        recorder.set_metric_value(name, dict.fromkeys(spec.tags, "x"), 1.0)
    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    found: dict[str, set[str]] = {}
    for sample in samples:
        if "understudy_" in sample.name:
            found.setdefault(sample.name, set()).update(one for one in sample.labels if not one.startswith("otel_"))
    return {name: frozenset(labels) for name, labels in found.items()}


def promql_problems(where: str, text: str) -> list[str]:
    """Metrics, labels and values in a query that nobody exports."""
    problems, labels = [], set()
    bare = re.sub(r'"[^"]*"', '""', text)
    grouped = {
        one.strip() for group in re.findall(r"\b(?:by|without|on)\s*\(([^)]*)\)", bare) for one in group.split(",")
    }
    # Without groups, ranges and offsets, what is left of words are functions, operators and metrics.
    text = re.sub(r"\b(?:by|without|on)\s*\([^)]*\)|\[[^\]]*\]|\boffset \d+[smhdw]", "", text)
    functions = set(re.findall(r"([a-z_0-9]+)\s*\(", text))
    for name, body in _SELECTOR.findall(text):
        if name in functions or name in _WORDS:
            continue
        known = labels_of(name)
        if known is None:
            problems.append(f"{where}: {name} is exported by nobody")
            continue
        labels |= known
        for label, _, value in _MATCHER.findall(body):
            if label not in known:
                problems.append(f"{where}: {name} has no label {label}")
            wrong = set(value.split("|")) - {""} - VALUES.get(label, set(value.split("|")))
            problems += [f"{where}: {name}: {label} is never {one}" for one in sorted(wrong)]
    return problems + [f"{where}: no metric of it has the label {one}" for one in sorted(grouped - labels)]


@functools.cache
def labels_of(name: str) -> frozenset[str] | None:
    """Labels of an exported metric; None where there is no such."""
    if name in exported():
        return exported()[name]
    if not name.startswith("ray_") or "understudy" in name:
        return None
    quoted = f'"{name.removeprefix("ray_")}"'
    files = [path for pattern in RAY_SOURCES for path in RAY.glob(pattern)]
    return RAY_LABELS if any(quoted in path.read_text() for path in files) else None


def rule_problems(rule: dict[str, Any]) -> list[str]:
    """What is wrong with one alert rule of a PrometheusRule."""
    summary = rule["annotations"]["summary"]
    named = {one for one in re.findall(r"\$labels\.(\w+)", summary)}
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\bby\s*\(([^)]*)\)", rule["expr"]))))
    lost = [f"{rule['alert']}: the summary's label {one} is not kept by the query" for one in sorted(named - grouped)]
    return promql_problems(rule["alert"], rule["expr"]) + lost


def dashboard_problems(dashboard: dict[str, Any]) -> list[str]:
    """What is wrong with a Grafana dashboard: panels without a query, over one another, or of metrics that nobody exports."""
    problems, taken, ids = [], set(), []
    for panel in dashboard["panels"]:
        where, place = panel["title"], panel["gridPos"]
        cells = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
        problems += [f"{where}: lies over another panel"] if cells & taken else []
        problems += [f"{where}: is wider than the page"] if place["x"] + place["w"] > 24 else []
        problems += [] if panel["targets"] else [f"{where}: has no query"]
        taken |= cells
        ids.append(panel["id"])
        if panel["datasource"] != {"type": "prometheus", "uid": "${source}"}:
            problems.append(f"{where}: asks another data source")
        for target in panel["targets"]:
            problems += promql_problems(where, target["expr"])
    variables = {one["name"] for one in dashboard["templating"]["list"] if one["type"] == "datasource"}
    problems += [] if "source" in variables else ["no variable source"]
    return problems + (["two panels have one id"] if len(set(ids)) < len(ids) else [])
