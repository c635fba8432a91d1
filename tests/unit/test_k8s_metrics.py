"""Dashboard and alert rules ask for metrics that are exported, by labels and values they have."""

import json

import k8s_metrics
import pytest
import yaml
from k8s_manifests import K8S, build, only
from k8s_metrics import dashboard_problems, exported, promql_problems, rule_problems

from cluster.telemetry import METRICS

MONITORING = K8S / "components/monitoring"


@pytest.fixture
def dashboard():
    return json.loads((MONITORING / "understudy.json").read_text())


@pytest.fixture
def rules():
    return yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"][0]["rules"]


def test_ray_s_agent_exports_every_metric_under_these_names():
    names = exported()
    for name, spec in METRICS.items():
        forms = [name] if spec.kind != "histogram" else [f"{name}_{part}" for part in ("bucket", "sum", "count")]
        for form in forms:
            extra = {"le"} if form.endswith("_bucket") else set()
            assert names[f"ray_{form}"] == {*spec.tags, *extra}


def test_the_dashboard_asks_for_what_is_exported(dashboard):
    assert dashboard_problems(dashboard) == []


def test_the_dashboard_shows_every_metric(dashboard):
    text = json.dumps(dashboard)
    assert [name for name in METRICS if f"ray_{name}" not in text] == []


def test_alert_rules_ask_for_what_is_exported(rules):
    assert [problem for rule in rules for problem in rule_problems(rule)] == []
    assert len({rule["alert"] for rule in rules}) == len(rules)


def test_the_runbook_says_what_to_do_about_every_alert(rules):
    text = (K8S / "README.md").read_text()
    assert [rule["alert"] for rule in rules if f"`{rule['alert']}`" not in text] == []


def test_grafana_finds_the_dashboard(dashboard):
    found = only(build("gpu-autoscaled"), "ConfigMap", "understudy-dashboard")
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(found["data"]["understudy.json"]) == dashboard


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ("sum(rate(ray_understudy_call_total[5m]))", "ray_understudy_call_total is exported by nobody"),
        ("sum(rate(understudy_calls_total[5m]))", "understudy_calls_total is exported by nobody"),
        ("ray_understudy_call_latency_ms", "exported by nobody"),
        ("ray_serve_replica_healthy", "exported by nobody"),
        ('rate(ray_understudy_calls_total{actions="llm"}[5m])', "has no label actions"),
        ('rate(ray_understudy_calls_total{action="accepted"}[5m])', "action is never accepted"),
        ('rate(ray_understudy_calls_total{action=~"accept|fallback"}[5m])', "action is never fallback"),
        ("sum by (task) (rate(ray_understudy_calls_total[5m]))", "has the label task"),
        ("sum by (le) (rate(ray_understudy_call_latency_ms_sum[5m]))", "has the label le"),
        ('ray_serve_deployment_replica_healthy{deployment="gateways"}', "deployment is never gateways"),
    ],
)
def test_a_renamed_metric_label_or_value_is_found(query, part):
    (problem,) = promql_problems("here", query)
    assert part in problem


def test_a_query_that_is_right_has_no_problems():
    query = (
        'histogram_quantile(0.99, sum by (le, action) (rate(ray_understudy_call_latency_ms_bucket{action!="audit"}[5m])))'
        " > 5000 and scalar(sum(ray_node_mem_used)) > 0"
    )
    assert promql_problems("here", query) == []


@pytest.mark.parametrize("name", sorted(METRICS))
def test_renaming_a_metric_of_the_code_is_found(name, dashboard, monkeypatch):
    """As if METRICS had another name for it: what the dashboard asks for is then exported by nobody."""
    known = {key: labels for key, labels in exported().items() if not key.startswith(f"ray_{name}")}
    monkeypatch.setattr(k8s_metrics, "exported", lambda: known)
    monkeypatch.setattr(k8s_metrics, "labels_of", k8s_metrics.labels_of.__wrapped__)
    assert any(f"ray_{name}" in problem for problem in dashboard_problems(dashboard))


def test_an_alert_whose_summary_names_a_lost_label_is_found(rules):
    rule = next(one for one in rules if one["alert"] == "UnderstudyTaskDisagrees")
    assert rule_problems({**rule, "expr": rule["expr"].replace("by (task_id)", "")}) != []


def test_panels_that_cannot_be_seen_are_found(dashboard):
    dashboard["panels"][1]["gridPos"] = dashboard["panels"][0]["gridPos"]
    dashboard["panels"][2]["targets"] = []
    assert len(dashboard_problems(dashboard)) == 2
