"""Retrieval against a second, dumber implementation."""

import itertools

import numpy as np
import pytest

import clip_ray.eval.retrieval as module
from clip_ray.eval.ranks import hit_rate
from clip_ray.eval.retrieval import retrieve


def unit(features):
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def dumb(images, texts, image_of_text, k):
    similarity = images @ texts.T
    to_text = [
        any(image_of_text[t] == i for t in np.argsort(-similarity[i])[:k])
        for i in range(len(images))
    ]
    to_image = [image_of_text[t] in np.argsort(-similarity[:, t])[:k] for t in range(len(texts))]
    return np.mean(to_text), np.mean(to_image)


@pytest.mark.parametrize("block", [1, 7 * 53, 1 << 24])
def test_equals_the_dumb_one(monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(0)
    image_of_text = np.concatenate([np.arange(20), rng.integers(0, 20, 33)])  # 1 to several each
    rng.shuffle(image_of_text)
    images = unit(rng.normal(size=(20, 8)))
    texts = unit(images[image_of_text] + rng.normal(size=(53, 8)))
    found = retrieve(images, texts, image_of_text)
    for k in (1, 5, 10):
        to_text, to_image = dumb(images, texts, image_of_text, k)
        assert found.image_to_text[k] == pytest.approx(to_text)
        assert found.text_to_image[k] == pytest.approx(to_image)
    assert 0 < found.image_to_text[1] < 1


def test_a_constant_embedding_has_chance_level():
    rng = np.random.default_rng(0)
    one = unit(rng.normal(size=(1, 512)))
    images, texts = np.repeat(one, 100, axis=0), np.repeat(one, 100, axis=0)
    found = retrieve(images, texts, np.arange(100))
    for k in (1, 5, 10):
        assert found.image_to_text[k] == pytest.approx(k / 100)
        assert found.text_to_image[k] == pytest.approx(k / 100)


def test_hit_rate_is_the_mean_over_all_orders_of_the_tie():
    for above, tied, right, k in itertools.product(range(3), range(4), (1, 2, 3), (1, 2, 5)):
        order = ["above"] * above
        hits = [
            "right" in (order + list(rest))[:k]
            for rest in itertools.permutations(["right"] * right + ["tied"] * tied)
        ]
        found = hit_rate(np.array([above]), np.array([tied]), np.array([right]), k)
        assert found[0] == pytest.approx(np.mean(hits)), (above, tied, right, k)


def test_memory_stays_bounded_for_5k():
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(2000, 16)))
    found = retrieve(images, images[rng.permutation(2000)], np.arange(2000))
    assert found.text_to_image[10] < 0.05
    assert retrieve(images, images, np.arange(2000)).image_to_text[1] == 1
