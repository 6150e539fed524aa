"""The one way from bytes and strings to features: evaluation, batch embedding and endpoints.

Left out: batching across callers (Serve's), reading data sets (eval's), and fp16 or bf16 weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from clip_ray.errors import ConfigError
from clip_ray.images import ImageError, decode, eval_crop
from clip_ray.registry import ExportInfo, load_export, resolve, with_origin

if TYPE_CHECKING:
    from clip_ray.model import CLIP
    from clip_ray.tokenizer import Tokenizer

MAX_PIXELS = 64_000_000  # as data.max_pixels' default: training and serving accept the same images


class Encoder:
    """A model that is ready to encode; thread-safe as far as torch's forward is.

    Args:
        model: put into evaluation mode and moved to `device`, in place.
        tokenizer: the model's own.
        info: where the weights come from.
        device: auto (cuda where there is one), cpu, cuda or cuda:N.
        batch: images or texts of one forward pass; bounds memory for any length of input.
        max_pixels: pixels above which an image is refused, on its header.

    Attributes:
        model: the CLIP model.
        version: registered version, None outside the registry.
        digest: model digest, None for a model that was never exported.
        run_id: MLflow run that made the model, where known.
        embed_dim: E.
        image_size: S, in pixels.
    """

    def __init__(
        self,
        model: CLIP,
        tokenizer: Tokenizer,
        info: ExportInfo,
        *,
        device: str = "auto",
        batch: int = 256,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch {batch}: expected at least 1")
        self.device = choose_device(device)
        self.model = model.eval().to(self.device)
        self.tokenizer = tokenizer
        self.info = info
        self.batch = batch
        self.max_pixels = max_pixels
        self.version = info.version
        self.digest = info.digest
        self.run_id = info.run_id
        self.embed_dim = model.config.embed_dim
        self.image_size = model.config.vision.image_size

    @classmethod
    def load(
        cls,
        uri: str | os.PathLike[str],
        device: str = "auto",
        tracking_uri: str | None = None,
        batch: int = 256,
    ) -> Encoder:
        """Return the encoder of a directory, run, or registered model (`registry.resolve`).

        A directory may hold a CLIP ViT of open_clip or Hugging Face.

        Raises:
            RegistryError: no such model, or its bytes are not the registered ones; or a foreign
                model that ours cannot reproduce.
        """
        resolved = resolve(uri, tracking_uri)
        model, tokenizer, info = load_export(resolved.store, resolved.digest)
        return cls(model, tokenizer, with_origin(info, resolved), device=device, batch=batch)

    def preprocess(self, image: bytes) -> NDArray[np.uint8]:
        """Return the pixels of an image file, (3, S, S) uint8, as the model takes them.

        Raises:
            ImageError: the file is no usable image.
        """
        pixels = decode(image, self.max_pixels, self.info.exif_orientation)
        return eval_crop(pixels, self.image_size)

    def encode_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return image features of preprocessed pixels.

        Args:
            pixels: (N, 3, S, S) uint8.

        Returns:
            (N, E) float32 of unit length.
        """
        parts = [np.empty((0, self.embed_dim), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(pixels), self.batch):
                chunk = torch.from_numpy(pixels[start : start + self.batch]).to(self.device)
                parts.append(self.model.encode_image(chunk).float().cpu().numpy())
        return np.concatenate(parts)

    def encode_images(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """Return image features of image files: (N, E) float32 of unit length.

        Raises:
            ImageError: an image is not usable; `detail` names its index, from 0.
        """
        parts = [np.empty((0, self.embed_dim), np.float32)]
        for start in range(0, len(images), self.batch):
            pixels = []
            for index, image in enumerate(images[start : start + self.batch], start):
                try:
                    pixels.append(self.preprocess(image))
                except ImageError as error:
                    raise ImageError(error.reason, f"image {index}: {error.detail}") from error
            parts.append(self.encode_pixels(np.stack(pixels)))
        return np.concatenate(parts)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return text features: (N, E) float32 of unit length; long texts are truncated."""
        parts = [np.empty((0, self.embed_dim), np.float32)]
        for start in range(0, len(texts), self.batch):
            ids, _ = self.tokenizer(list(texts[start : start + self.batch]))
            parts.append(self.encode_ids(ids))
        return np.concatenate(parts)

    def encode_ids(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return text features of token ids.

        Args:
            ids: (N, L), as the tokenizer makes them.

        Returns:
            (N, E) float32 of unit length.
        """
        parts = [np.empty((0, self.embed_dim), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(ids), self.batch):
                chunk = ids[start : start + self.batch]
                # A causal tower never shows the end token what follows it: padding is not computed.
                chunk = chunk[:, : int(chunk.argmax(axis=1).max()) + 1]
                ids_BL = torch.as_tensor(chunk).to(self.device)
                parts.append(self.model.encode_text(ids_BL).float().cpu().numpy())
        return np.concatenate(parts)


def choose_device(device: str) -> torch.device:
    """Return the torch device of a setting: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError: the device is not there, or not known.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}: expected auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch sees no CUDA device; use cpu or auto")
    return chosen
