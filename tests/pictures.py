"""Pictures that cost a decoder what photographs cost, made from a seed.

The spectrum of natural scenes falls as one over the frequency (Field 1987), objects have edges,
and sensors add white noise: the three together fix the bytes a pixel. No camera took these; what
they are matched to is the size of web photographs (facts: about 38 kB at 256 px of the shorter
side, about 200 kB at 768 px, JPEG quality 85 to 95, 85 % of them 4:2:0).
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_SHAPES = 12
# By the shorter side: sensor noise in steps of 1/255, and the frequency (cycles a pixel) at which
# the lens passes 1/e. A shrunk photograph keeps less noise and more detail a pixel.
_SIDES = (256, 768)
_NOISE = (3.7, 2.3)
_LENS = (0.37, 0.17)


def photo(seed: int, shorter_side: int) -> bytes:
    """Return a JPEG file of a scene, about 38 kB at 256 px and about 200 kB at 768 px."""
    rng = np.random.default_rng([seed, shorter_side])
    chroma = "420" if rng.random() < 0.85 else "444"
    quality = int(rng.integers(85, 96))
    return simplejpeg.encode_jpeg(
        scene(seed, shorter_side), quality=quality, colorsubsampling=chroma
    )


def scene(seed: int, shorter_side: int) -> NDArray[np.uint8]:
    """Return the pixels of a scene, (H, W, 3) uint8; sides differ by a factor of up to 1.8."""
    rng = np.random.default_rng([seed, shorter_side, 1])
    longer = int(shorter_side * rng.uniform(1.0, 1.8))
    size = (shorter_side, longer) if rng.random() < 0.7 else (longer, shorter_side)
    lens = float(np.interp(shorter_side, _SIDES, _LENS))
    light = 128 + rng.uniform(25, 50) * _cloud(size, lens, rng)
    image = np.stack([light + rng.uniform(3, 15) * _cloud(size, lens, rng) for _ in range(3)], -1)
    for _ in range(_SHAPES):
        _draw(image, rng)
    sigma = float(np.interp(shorter_side, _SIDES, _NOISE))
    image += rng.normal(0, sigma * rng.uniform(0.5, 1.5), size).astype(np.float32)[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)


def _cloud(size: tuple[int, int], lens: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a field of mean 0 and deviation 1, of amplitude 1/frequency, seen through a lens."""
    height, width = size
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    frequency = np.hypot(y, x).astype(np.float32)
    frequency[0, 0] = np.inf  # no mean
    passed = np.exp(-((frequency / lens) ** 2)) / frequency
    spectrum = np.fft.rfft2(rng.standard_normal(size, np.float32)) * passed
    field = np.fft.irfft2(spectrum, size).astype(np.float32)
    return field / field.std()


def _draw(image: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Paint an ellipse or a box with a shade across it; the picture shows through it."""
    height, width = image.shape[:2]
    side = min(height, width)
    half = rng.uniform(0.03, 0.3, 2) * side
    centre = rng.uniform(0, 1, 2) * (height, width)
    rows = slice(max(int(centre[0] - half[0]), 0), int(centre[0] + half[0]) + 1)
    columns = slice(max(int(centre[1] - half[1]), 0), int(centre[1] + half[1]) + 1)
    part = image[rows, columns]
    y = (np.arange(part.shape[0])[:, None] + rows.start - centre[0]) / half[0]
    x = (np.arange(part.shape[1])[None, :] + columns.start - centre[1]) / half[1]
    inside = np.ones(part.shape[:2], bool) if rng.random() < 0.4 else y * y + x * x < 1
    shade = rng.uniform(20, 235, 3) + 40 * rng.uniform(-1, 1) * (x + y)[..., None]
    part[inside] = (0.75 * shade + 0.25 * part)[inside]
