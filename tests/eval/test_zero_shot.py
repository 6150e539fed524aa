"""Zero-shot scores on features made by hand."""

import numpy as np
import pytest

from clip_ray.errors import ConfigError
from clip_ray.eval.prompts import DEFAULT_TEMPLATES, fill, prompts
from clip_ray.eval.zero_shot import classifier, score


class Words:
    """Encodes a text as a fixed vector, and counts the texts."""

    digest = "d"
    embed_dim = 2

    def __init__(self, vectors):
        self.vectors, self.count = vectors, 0

    def encode_texts(self, texts):
        self.count += len(texts)
        return np.array([self.vectors[text] for text in texts], np.float32)


def test_fill():
    assert fill("a {c}.", "cat") == "a cat."
    assert fill("a {}, {d}", "{x}") == "a {x}, {d}"
    with pytest.raises(ConfigError, match="expected"):
        fill("a photo", "cat")
    with pytest.raises(ConfigError, match="no prompt templates"):
        prompts(["cat"], [])
    assert prompts(["a", "b"], ["{c}1", "{c}2"]) == ["a1", "a2", "b1", "b2"]
    assert all("{c}" in template for template in DEFAULT_TEMPLATES)


def test_classifier_is_the_normalised_mean():
    encoder = Words({"a1": (1, 0), "a2": (0, 1), "b1": (1, 0), "b2": (0.6, 0.8)})
    half = 0.5**0.5
    np.testing.assert_allclose(
        classifier(encoder, ["a", "b"], ["{c}1", "{c}2"]),
        [[half, half], [1.6 / 3.2**0.5, 0.8 / 3.2**0.5]],
        rtol=1e-6,
    )


def test_score_by_hand():
    weights = np.eye(6, dtype=np.float32)
    images = np.array(
        [
            [0.9, 0.1, 0, 0, 0, 0],  # class 0: right
            [0.1, 0.9, 0, 0, 0, 0],  # class 0: second
            [0.5, 0.4, 0.3, 0.2, 0.1, 0],  # class 5: sixth
            [0, 0, 0, 1, 0, 0],  # class 3: right
        ],
        np.float32,
    )
    scores = score(images, np.array([0, 0, 5, 3]), weights)
    assert scores.top1 == 2 / 4 and scores.top5 == 3 / 4
    assert scores.mean_per_class == pytest.approx((1 / 2 + 0 + 1) / 3)  # classes 0, 5 and 3
    expected = np.zeros((6, 6), int)
    expected[0, 0] = expected[0, 1] = expected[5, 0] = expected[3, 3] = 1
    assert np.array_equal(scores.confusion, expected)


def test_a_constant_model_has_chance_level():
    rng = np.random.default_rng(0)
    one = rng.normal(size=64).astype(np.float32)
    one /= np.linalg.norm(one)
    labels = rng.integers(0, 20, 100)
    scores = score(np.tile(one, (100, 1)), labels, np.tile(one, (20, 1)))
    assert scores.top1 == pytest.approx(1 / 20) and scores.top5 == pytest.approx(5 / 20)
    assert scores.mean_per_class == pytest.approx(1 / 20)


def test_fewer_than_five_classes():
    scores = score(np.eye(3, dtype=np.float32), np.array([1, 2, 0]), np.eye(3, dtype=np.float32))
    assert scores.top1 == 0 and scores.top5 == 1
