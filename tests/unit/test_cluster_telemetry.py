"""cluster/telemetry.py: what Ray's metrics are given."""

from cluster.telemetry import Meter


class Counter:
    """As ray.util.metrics.Counter: refuses to add 0."""

    def __init__(self) -> None:
        self.total = 0.0

    def inc(self, value: float, tags: dict[str, str]) -> None:
        if value <= 0:
            raise ValueError(f"value must be >0, got {value}")
        self.total += value


def test_what_costs_nothing_is_counted_and_not_exported(monkeypatch) -> None:
    counter, meter = Counter(), Meter(export=True)
    monkeypatch.setattr(meter, "_metric", lambda name: counter)
    for usd in (0.0, 0.25, 0.0):
        meter.count("understudy_llm_spend_usd_total", usd, endpoint="0", basis="reported")
    assert meter.total("understudy_llm_spend_usd_total") == counter.total == 0.25
