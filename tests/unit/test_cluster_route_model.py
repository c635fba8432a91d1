"""cluster/route_model.py: a request goes to the task of its signature or of the nearest topic, else to none."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import StoreError
from cluster.route_model import ENCODER, NUM_BUCKETS, RouteModel, TextEncoder, TopicMap, hashed_features
from cluster.signature import signature_of, variable_text
from cluster.store import Store

ENCODE = TextEncoder(np.random.default_rng(0).standard_normal((NUM_BUCKETS, 16)).astype(np.float32))
WEATHER, MUSIC = "what is the weather in Paris", "play some quiet piano music"


def ask(user: str, system: str = "") -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": user}]}


def make_model() -> RouteModel:
    centroids = np.stack([ENCODE.encode(variable_text(ask(text))) for text in (WEATHER, MUSIC)])
    topics = TopicMap(ENCODE, centroids, np.array([0.1, 0.1]), ["weather-1", None])
    return RouteModel({signature_of(ask("x", "Sort mail.")): "mail-1"}, {signature_of(ask("x")): topics})


@given(st.text(max_size=300))
def test_features_are_distinct_buckets_with_positive_weights(text) -> None:
    buckets, values = hashed_features(text)
    assert (np.diff(buckets) > 0).all() and len(buckets) == len(values)
    assert ((buckets >= 0) & (buckets < NUM_BUCKETS)).all() and (values > 0).all()
    norm = np.linalg.norm(ENCODE.encode(text))
    assert norm == (pytest.approx(1, abs=1e-4) if len(buckets) else 0)


def test_literals_decide_no_feature() -> None:
    first, second = (hashed_features(f"order {number} is late")[0] for number in (17, 99_312))
    assert np.array_equal(first, second)


def test_text_without_known_feature_is_the_zero_vector() -> None:
    assert not TextEncoder(np.zeros((NUM_BUCKETS, 4))).encode("hello").any()


@pytest.mark.parametrize(
    ("request_", "task_id", "reason"),
    [
        (ask("anything", "Sort mail."), "mail-1", "signature"),
        (ask("anything", "Never seen."), None, "unknown signature"),
        (ask(WEATHER), "weather-1", "topic 0"),
        (ask(MUSIC), None, "topic 1 has no task"),
        (ask("Grundbuchauszug bitte per Post"), None, "out of task"),
    ],
)
def test_route(request_, task_id, reason) -> None:
    guess = make_model().task_of(request_)
    assert guess.task_id == task_id and guess.reason.startswith(reason)
    assert (guess.distance is None) == ("signature" in reason)


def test_saved_model_answers_the_same(tmp_path) -> None:
    model, store = make_model(), Store(str(tmp_path))
    sha = model.save(store, "route_model/x")
    loaded = RouteModel.load(store, "route_model/x")
    assert sha == store.manifest("route_model/x")["sha256"]
    assert model.content_sha() == loaded.content_sha()
    for request in (ask(WEATHER), ask(MUSIC), ask("x", "Sort mail."), ask("unheard of")):
        assert loaded.task_of(request) == model.task_of(request)


def test_altered_or_foreign_model_is_refused(tmp_path) -> None:
    store = Store(str(tmp_path))
    make_model().save(store, "route_model/x")
    manifest = store.manifest("route_model/x")
    assert manifest["encoder"] == ENCODER
    store.write_json("route_model/x/manifest.json", {**manifest, "encoder": "other"})
    with pytest.raises(StoreError, match="encoder 'other'.*understudy convert"):
        RouteModel.load(store, "route_model/x")
    store.write_json("route_model/x/manifest.json", manifest)
    store.write_bytes("route_model/x/route_model.json", json.dumps({"tasks": {}, "topics": {}}).encode())
    with pytest.raises(StoreError, match="differs from its manifest"):
        RouteModel.load(store, "route_model/x")


def test_signature_is_one_task_or_varied() -> None:
    model = make_model()
    with pytest.raises(AssertionError):
        RouteModel(dict.fromkeys(model.topics, "t"), model.topics)
