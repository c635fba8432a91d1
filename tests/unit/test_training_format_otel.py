"""OpenTelemetry: one bad span costs no other, and a client may stand in any attribute."""

from foreign_logs import PSEUDONYMS, SAMPLES, as_otel, otlp, read, read_records, span, what, write

from training.log_records import ReadRules


def test_a_bad_span_costs_that_span_alone(tmp_path):
    good = [as_otel(n, SAMPLES[2])["resourceSpans"][0]["scopeSpans"][0]["spans"][0] for n in (1, 2)]
    items = read_records(tmp_path, otlp(good[0], span(9, {"gen_ai.operation.name": "chat"}), good[1]))
    assert what(items) == ["call", "no messages", "call"]


def test_a_field_of_otel_is_looked_up_by_the_name_of_its_attribute(tmp_path):
    path = write(tmp_path, [as_otel(0, SAMPLES[0])])
    for field, client in (("user.id", "ann"), ("resource.service.name", "desk")):
        (call,) = read(path, rules=ReadRules(client_field=field))
        assert call.client_id == PSEUDONYMS.of("client", client)
