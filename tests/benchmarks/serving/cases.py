"""What the serving benchmarks send: pictures, a model to answer with, and the requests."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_ray.config import ModelConfig, TextConfig, VisionConfig
from clip_ray.model import build
from clip_ray.registry import Target, write_export
from clip_ray.storage import LocalStore
from clip_ray.tokenizer import Tokenizer
from tests.benchmarks.serving.load import Request

# So small that what is around the model shows; its answers are as long as ViT-B/32's.
MODEL = ModelConfig(
    embed_dim=512,
    vision=VisionConfig(image_size=224, patch_size=32, width=64, layers=1, heads=2),
    text=TextConfig(context_length=77, vocab_size=514, width=64, layers=1, heads=2),
)
PICTURES, SIDE, BYTES = 16, 256, 17_000
IMAGES = 32  # of a multipart request
LABELS = tuple(f"thing number {n}" for n in range(1000))
CLASSIFIER = "thousand"
_JSON = {"content-type": "application/json"}


def write_model(directory: Path) -> Target:
    """Write the random model as an export and return what a deployment is told of it."""
    tokenizer = Tokenizer.train(["a photo of a thing"], 514, 77)
    digest = write_export(LocalStore(directory), build(MODEL, seed=0), tokenizer, {})
    return Target(name="bench", version="1", uri=str(directory), digest=digest)


def pictures(count: int = PICTURES, side: int = SIDE, size: int = BYTES) -> list[bytes]:
    """Return JPEG files of `size` bytes, give or take 3 %: soft shapes with noise."""
    return [_picture(seed, side, size) for seed in range(count)]


def _picture(seed: int, side: int, size: int) -> bytes:
    generator = np.random.default_rng(seed)
    low = generator.integers(0, 256, (8, 8, 3), np.uint8)
    soft = np.asarray(Image.fromarray(low).resize((side, side), Image.Resampling.BICUBIC), float)
    noise = generator.normal(0, 1, (side, side, 1))
    weakest, strongest = 0.0, 100.0
    for _ in range(12):
        strength = (weakest + strongest) / 2
        data = io.BytesIO()
        pixels = np.clip(soft + strength * noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(data, "JPEG", quality=85)
        if abs(len(data.getvalue()) - size) < 0.03 * size:
            break
        if len(data.getvalue()) < size:
            weakest = strength
        else:
            strongest = strength
    return data.getvalue()


def embed_json(images: list[bytes]) -> Request:
    """One image as a data URI, base64 answer: what the OpenAI client sends."""
    return _json("/v1/embeddings", images, {"encoding_format": "base64"})


def embed_raw(images: list[bytes]) -> Request:
    """One image as the body, float32 as the answer."""
    headers = {"content-type": "image/jpeg", "accept": "application/octet-stream"}
    return Request("/v1/embeddings", images, headers)


def embed_form(images: list[bytes], count: int = IMAGES) -> Request:
    """`count` images a request as multipart/form-data, base64 answer."""
    boundary = "benchmark-boundary-0123456789"
    bodies = []
    for start in range(4):
        parts = [_part(boundary, "encoding_format", b"base64")]
        for index in range(count):
            image = images[(start + index) % len(images)]
            parts.append(_part(boundary, "image", image, f"{index}.jpg"))
        bodies.append(b"".join(parts) + f"--{boundary}--\r\n".encode())
    kind = f"multipart/form-data; boundary={boundary}"
    return Request("/v1/embeddings", bodies, {"content-type": kind})


def classify_inline(images: list[bytes]) -> Request:
    """One image and 1,000 labels, which are the same every time."""
    return _json("/v1/classify", images, {"labels": LABELS, "top_k": 5})


def classify_stored(images: list[bytes]) -> Request:
    """One image and a stored classifier of 1,000 labels; `store_classifier` first."""
    return _json("/v1/classify", images, {"classifier": CLASSIFIER, "top_k": 5})


def classifier_definition() -> bytes:
    """Return the body of PUT /v1/classifiers/thousand."""
    return json.dumps({"labels": LABELS}).encode()


def _json(path: str, images: list[bytes], more: dict[str, Any]) -> Request:
    bodies = []
    for image in images:
        uri = "data:image/jpeg;base64," + base64.b64encode(image).decode()
        bodies.append(json.dumps({"input": [{"image": uri}], **more}).encode())
    return Request(path, bodies, _JSON)


def _part(boundary: str, name: str, data: bytes, file: str | None = None) -> bytes:
    head = f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"'
    if file is not None:
        head += f'; filename="{file}"\r\ncontent-type: image/jpeg'
    return head.encode() + b"\r\n\r\n" + data + b"\r\n"
