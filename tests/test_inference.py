"""The encoder: unit features, one answer for every batch size, errors that name the image."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from clip_ray.config import ModelConfig, TextConfig, VisionConfig
from clip_ray.errors import ConfigError
from clip_ray.images import ImageError, decode, eval_crop, with_orientation
from clip_ray.inference import Encoder, choose_device
from clip_ray.model import build
from clip_ray.registry import ExportInfo, write_export
from clip_ray.storage import open_store
from clip_ray.tokenizer import Tokenizer

TINY = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2),
    text=TextConfig(context_length=12, vocab_size=514, width=32, layers=1, heads=2),
)


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a cat"], 514, 12)


@pytest.fixture
def encoder(tokenizer):
    return Encoder(build(TINY, seed=0), tokenizer, ExportInfo(digest="d"), device="cpu")


def test_features_are_unit_vectors_and_the_models_own(encoder, tokenizer):
    images, texts = [picture(0), picture(1, "JPEG")], ["a cat", "", "one " * 50]
    image_NE, text_NE = encoder.encode_images(images), encoder.encode_texts(texts)
    assert image_NE.shape == (2, 16) and text_NE.shape == (3, 16)
    assert image_NE.dtype == text_NE.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(image_NE, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(text_NE, axis=1), 1, rtol=1e-5)
    with torch.no_grad():
        direct = encoder.model.encode_text(torch.from_numpy(tokenizer(texts)[0]))
    np.testing.assert_allclose(text_NE, direct.numpy(), atol=1e-6)
    assert not encoder.model.training
    assert (encoder.embed_dim, encoder.image_size, encoder.digest) == (16, 32, "d")
    assert encoder.version is None and encoder.run_id is None


def test_batches_change_nothing(encoder, tokenizer):
    small = Encoder(encoder.model, tokenizer, ExportInfo(), device="cpu", batch=2)
    images, texts = [picture(i) for i in range(5)], [f"text {i}" for i in range(5)]
    np.testing.assert_allclose(
        small.encode_images(images), encoder.encode_images(images), atol=1e-6
    )
    np.testing.assert_allclose(small.encode_texts(texts), encoder.encode_texts(texts), atol=1e-6)


def test_nothing_gives_nothing(encoder):
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, 16)


def test_a_bad_image_is_named(tokenizer):
    encoder = Encoder(build(TINY, seed=0), tokenizer, ExportInfo(), device="cpu", batch=2)
    images = [picture(0), picture(1), picture(2), b"no image"]
    with pytest.raises(ImageError, match="image 3") as caught:
        encoder.encode_images(images)
    assert caught.value.reason == "not-an-image"


def test_load(tmp_path, encoder, tokenizer):
    store = open_store(tmp_path / "run" / "export")
    digest = write_export(store, encoder.model, tokenizer, {"run_id": "r"})
    loaded = Encoder.load(tmp_path / "run", device="cpu")
    assert (loaded.digest, loaded.run_id, loaded.version) == (digest, "r", None)
    assert np.array_equal(loaded.encode_images([picture(0)]), encoder.encode_images([picture(0)]))
    assert np.array_equal(loaded.encode_texts(["a cat"]), encoder.encode_texts(["a cat"]))


def test_a_model_that_saw_pictures_turned_sees_them_turned_everywhere(tmp_path, encoder, tokenizer):
    lies = with_orientation(picture(0, "JPEG"), 6)
    for name, turned in (("plain", False), ("turned", True)):
        store = open_store(tmp_path / name)
        write_export(store, encoder.model, tokenizer, {}, exif_orientation=turned)
        loaded = Encoder.load(tmp_path / name, device="cpu")
        expected = eval_crop(decode(lies, 10**6, turned), 32)
        assert np.array_equal(loaded.preprocess(lies), expected)
    assert not np.array_equal(expected, encoder.preprocess(lies))


def test_devices():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="expected auto, cpu"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(ConfigError, match="no CUDA device"):
            choose_device("cuda")
