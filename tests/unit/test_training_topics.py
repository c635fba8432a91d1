"""training/topics.py and training/encoders.py: the number of topics is found, radii are held out, floods do not count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.route_model import ENCODER
from training.encoders import HASHED, fit_encoder
from training.topics import cap_per_client, choose_num_topics, find_topics, fit_radii, nearest


def blobs(num_topics: int, num_each: int = 60, spread: float = 0.15, dimensions: int = 24) -> np.ndarray:
    """Unit vectors around orthogonal directions."""
    centres = np.repeat(np.eye(num_topics, dimensions), num_each, axis=0)
    vectors = centres + spread * np.random.default_rng(0).standard_normal(centres.shape) / np.sqrt(dimensions)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("num_topics", [3, 8, 15])
def test_the_number_of_topics_is_found_where_they_are_clear(num_topics) -> None:
    vectors = blobs(num_topics)
    assert num_topics <= choose_num_topics(vectors) <= 1.5 * num_topics
    labels = nearest(vectors, find_topics(vectors))
    gold = np.repeat(np.arange(num_topics), 60)
    assert all(len(set(gold[labels == topic])) == 1 for topic in set(labels.tolist())), "no topic spans two"


def test_vectors_without_structure_are_one_topic() -> None:
    noise = np.random.default_rng(0).standard_normal((600, 24)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    assert choose_num_topics(noise) == 1


def test_equal_and_few_vectors_are_topics_too() -> None:
    assert len(find_topics(np.tile(np.eye(1, 4, dtype=np.float32), (50, 1)))) == 1
    assert len(find_topics(np.eye(2, 4, dtype=np.float32))) == 1


def test_a_radius_reaches_the_quantile_of_held_out_texts() -> None:
    fitted, held_out = blobs(2, spread=0.1), blobs(2, spread=0.4)
    centroids = find_topics(fitted)
    radii = fit_radii(fitted, held_out, centroids, 0.9)
    distances = 1 - (held_out @ centroids.T).max(axis=1)
    assert (distances <= radii[nearest(held_out, centroids)]).mean() == pytest.approx(0.9, abs=0.02)
    assert (fit_radii(fitted, fitted[:0], centroids, 0.9) < radii).all(), "without held-out texts, from the fitted ones"


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 400)), max_size=200), st.floats(0.05, 0.5))
def test_no_client_gives_more_than_its_share_and_a_text_counts_once(rows, share) -> None:
    clients, texts = [client for client, _ in rows], [str(number) for _, number in rows]
    kept = cap_per_client(clients, texts, share)
    assert len({texts[i] for i in kept}) == len(kept)
    distinct = cap_per_client([""] * len(rows), texts, share)
    assert len(distinct) == len(set(texts))
    if len({clients[i] for i in distinct}) > 2:
        counts = [sum(clients[i] == client for i in kept) for client in set(clients)]
        assert max(counts) <= max(1, int(share * len(distinct)))


def test_the_hashed_encoder_is_named_and_a_missing_neural_one_is_an_error() -> None:
    assert fit_encoder(HASHED, ["play some music", "book a table"], 2).name == ENCODER
    with pytest.raises(ConfigError, match="discover.encoder=/no/such/folder.*allowed: hashed.*next: "):
        fit_encoder("/no/such/folder", ["x"], 2)
