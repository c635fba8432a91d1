"""The encoder that topics are found with: hashed n-grams fitted to the texts at hand, or a neural one named by the recipe.

Knows nothing of tasks; what encodes at request time is cluster/route_model.py and cluster/neural_encoder.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.neural_encoder import neural_encoder
from cluster.route_model import NUM_BUCKETS, Encoder, TextEncoder, hashed_features

HASHED = "hashed"


def fit_encoder(name: str, texts: Sequence[str], num_dimensions: int) -> Encoder:
    """The encoder called `name`; the hashed one is fitted to `texts`, a neural one is used as it is.

    Raises:
        ConfigError: a neural encoder that cannot be loaded.
    """
    return fit_hashed(texts, num_dimensions) if name == HASHED else neural_encoder(name)


def fit_hashed(texts: Sequence[str], num_dimensions: int) -> TextEncoder:
    """Inverse document frequencies and a truncated SVD of the hashed features, folded into one matrix."""
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    features = [hashed_features(text) for text in texts]
    ends = np.cumsum([0, *(len(buckets) for buckets, _ in features)])
    buckets, values = (np.concatenate(part) for part in zip(*features, strict=True))
    idf = np.log((1 + len(texts)) / (1 + np.bincount(buckets, minlength=NUM_BUCKETS))) + 1
    weighted = csr_matrix((values * idf[buckets], buckets, ends), shape=(len(texts), NUM_BUCKETS))
    svd = TruncatedSVD(min(num_dimensions, len(texts)), random_state=0)
    with np.errstate(invalid="ignore"):  # Equal texts have no variance to explain.
        svd.fit(normalize(weighted))
    return TextEncoder((idf[:, None] * svd.components_.T).astype(np.float32))
