from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from clip_ray import images
from clip_ray.images import ImageError
from tests.corpus import MAX_PIXELS, Case, corpus
from tests.pictures import photo

LIMIT = 1_000_000


def picture(height: int, width: int) -> np.ndarray:
    """A smooth picture: what bicubic filters agree on."""
    y, x = np.mgrid[:height, :width] / 40.0
    waves = [np.sin(y + k) * np.cos(x * (1 + 0.2 * k)) for k in range(3)]
    return np.ascontiguousarray(np.stack([127.5 + 110 * w for w in waves], -1).astype(np.uint8))


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    return simplejpeg.encode_jpeg(pixels, quality=quality)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


def reason(data: bytes, limit: int = LIMIT) -> str:
    with pytest.raises(ImageError) as caught:
        images.decode(data, limit)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_decodes_each_format(kind: str) -> None:
    expected = picture(60, 80)
    data = saved(Image.fromarray(expected), kind, **({"quality": 95} if kind != "PNG" else {}))
    pixels = images.decode(data, LIMIT)
    assert pixels.shape == (60, 80, 3) and pixels.dtype == np.uint8
    assert psnr(pixels, expected) > (20 if kind == "GIF" else 30)


def test_grey_jpeg_becomes_rgb() -> None:
    data = saved(Image.fromarray(picture(40, 40)[..., 0]), "JPEG")
    pixels = images.decode(data, LIMIT)
    assert pixels.shape == (40, 40, 3) and (pixels[..., 0] == pixels[..., 2]).all()


def test_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("RGB", (32, 32), (220, 30, 40)).convert("CMYK")
    pixels = images.decode(saved(red, "JPEG", quality=95), LIMIT)
    assert np.abs(pixels.reshape(-1, 3).mean(0) - (220, 30, 40)).max() < 6


def test_transparent_pixels_are_white_and_half_transparent_ones_half_white() -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[4:, :, 3] = 128
    pixels = images.decode(saved(Image.fromarray(rgba), "PNG"), LIMIT)
    assert (pixels[:4] == 255).all() and (pixels[4:] == 127).all()


def test_palette_transparency_is_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 0)
    pixels = images.decode(saved(image, "PNG", transparency=0), LIMIT)
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1].tolist() == [255, 0, 0]


def test_sixteen_bit_grey_is_rescaled() -> None:
    grey = np.full((8, 8), 65535 // 2, np.uint16)
    grey[0] = 65535
    pixels = images.decode(saved(Image.fromarray(grey), "PNG"), LIMIT)
    assert (pixels[0] == 255).all() and (np.abs(pixels[1].astype(int) - 127) <= 1).all()


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert images.decode(data, LIMIT)[0, 0].tolist() == [255, 0, 0]


def test_refuses_what_is_no_usable_image() -> None:
    whole = jpeg(picture(64, 64))
    png = saved(Image.fromarray(picture(64, 64)), "PNG")
    flipped = bytearray(whole)
    flipped[len(whole) // 2 : len(whole) // 2 + 2] = b"\xff\xd8"
    assert reason(b"") == "empty"
    assert reason(b"<html>404 not found</html>") == "not-an-image"
    assert reason(bytes(1000)) == "not-an-image"
    assert reason(saved(Image.fromarray(picture(9, 9)), "BMP")) == "unsupported-format"
    assert reason(saved(Image.fromarray(picture(9, 9)), "TIFF")) == "unsupported-format"
    assert reason(whole[: len(whole) // 2]) == "truncated"
    assert reason(whole[:-2]) == "truncated"
    assert reason(whole[:20]) == "truncated"
    assert reason(png[: len(png) // 2]) == "truncated"
    assert reason(bytes(flipped)) in ("truncated", "corrupt")
    assert reason(jpeg(picture(3, 9))) == "too-small"
    assert reason(jpeg(picture(8, 200))) == "aspect"


@pytest.mark.filterwarnings("ignore:Image size")
def test_the_pixel_limit_is_checked_on_the_header() -> None:
    # A header that promises 60000 x 60000, and a 100 kB bomb of 12000 x 12000 zeros.
    whole = bytearray(jpeg(picture(64, 64)))
    at = whole.index(b"\xff\xc0")
    whole[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    assert reason(bytes(whole)) == "too-many-pixels"
    header = struct.pack(">IIBBBBB", 12000, 12000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks
    )
    assert reason(bomb) == "too-many-pixels"
    assert reason(jpeg(picture(64, 64)), 4095) == "too-many-pixels"


def test_the_error_survives_pickling_and_prints_its_reason() -> None:
    error = pickle.loads(pickle.dumps(ImageError("truncated", "at byte 7")))
    assert (error.reason, error.detail, str(error)) == (
        "truncated",
        "at byte 7",
        "truncated: at byte 7",
    )


def test_measure_reads_the_header_alone() -> None:
    assert images.measure(jpeg(picture(60, 80))) == (80, 60)
    cmyk = Image.fromarray(picture(60, 80)).convert("CMYK")
    assert images.measure(saved(cmyk, "JPEG")) == (80, 60)
    assert images.measure(saved(Image.fromarray(picture(60, 80)), "PNG")) == (80, 60)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (256, 256), (500, 700), (100, 150)])
def test_train_crop_is_the_bicubic_resize_of_a_square(shape: tuple[int, int]) -> None:
    pixels = picture(*shape)
    crop = images.train_crop(pixels, 224, np.random.default_rng(5))
    side, extra = min(shape), max(shape) - min(shape)
    at = int(np.random.default_rng(5).integers(0, extra + 1))
    box = (0, at, side, at + side) if shape[0] > shape[1] else (at, 0, at + side, side)
    square = Image.fromarray(pixels).crop(box)
    expected = np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert crop.shape == (3, 224, 224) and crop.dtype == np.uint8
    assert crop.strides[0] == 1, "channels last"
    assert psnr(crop, expected) >= 45


@pytest.mark.parametrize("shape", [(300, 401), (401, 300), (224, 224), (500, 750), (100, 151)])
def test_eval_crop_is_resize_then_centre_crop(shape: tuple[int, int]) -> None:
    pixels = picture(*shape)
    side = min(shape)
    height, width = (int(224 * s / side) for s in shape)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    expected = np.asarray(resized)[top : top + 224, left : left + 224].transpose(2, 0, 1)
    crop = images.eval_crop(pixels, 224)
    assert crop.shape == (3, 224, 224) and crop.flags.c_contiguous
    assert psnr(crop, expected) >= 45


def test_a_seed_fixes_the_crop_and_seeds_differ() -> None:
    pixels = picture(256, 700)
    crops = [images.train_crop(pixels, 64, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (crops[0] == crops[1]).all() and (crops[0] != crops[2]).any()


def test_shrink_keeps_the_whole_picture() -> None:
    pixels = picture(300, 200)
    expected = Image.fromarray(pixels).resize((100, 150), Image.Resampling.BICUBIC)
    assert psnr(images.shrink(pixels, 150), np.asarray(expected)) >= 45
    assert images.shrink(pixels, 300) is pixels


def test_any_damage_of_a_jpeg_is_an_image_error_or_a_picture() -> None:
    whole = jpeg(picture(48, 64), 80)
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(whole)
        for at in rng.integers(3, len(whole), rng.integers(1, 20)):
            bad[at] = rng.integers(0, 256)
        try:
            pixels = images.decode(bytes(bad), LIMIT)
        except ImageError as error:
            assert error.reason in (
                "truncated",
                "corrupt",
                "too-many-pixels",
                "aspect",
                "too-small",
                "not-an-image",
            )
        else:
            assert pixels.ndim == 3 and pixels.shape[2] == 3


def test_preprocessing_names_what_eval_crop_does() -> None:
    described = images.preprocessing(224)
    assert described["size"] == 224 and len(described["mean"]) == len(described["std"]) == 3
    assert images.preprocessing(224, True) == {**described, "exif_orientation": True}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("number", range(1, 9))
def test_pictures_are_turned_as_exif_says_where_that_is_asked_for(kind: str, number: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = number
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "PNG": {}}[kind]
    data = saved(Image.fromarray(picture(30, 50)), kind, exif=exif, **options)
    assert images.orientation(data) == number
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    turned = images.decode(data, LIMIT, exif_orientation=True)
    assert turned.shape == upright.shape == ((30, 50, 3) if number < 5 else (50, 30, 3))
    assert psnr(turned, upright) > 40 and turned.flags.c_contiguous
    assert images.decode(data, LIMIT).shape == (30, 50, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_orientation_that_is_none_turns_nothing() -> None:
    plain = jpeg(picture(30, 50))
    assert images.orientation(plain) == 1 and images.with_orientation(plain, 1) is plain
    six = images.with_orientation(plain, 6)
    assert images.orientation(six) == 6
    assert (images.decode(six, LIMIT) == images.decode(plain, LIMIT)).all()
    rng = np.random.default_rng(0)
    at = six.index(b"Exif")
    for _ in range(500):
        bad = bytearray(six)
        for place in rng.integers(at + 6, at + 32, 3):
            bad[place] = rng.integers(0, 256)
        number = images.orientation(bytes(bad))
        turned = images.decode(bytes(bad), LIMIT, exif_orientation=True)
        assert turned.shape == ((30, 50, 3) if number < 5 else (50, 30, 3))


CORPUS = corpus()


@pytest.mark.parametrize("case", CORPUS, ids=[case.name for case in CORPUS])
def test_what_the_web_holds_is_a_picture_or_a_typed_error(case: Case) -> None:
    if case.colours is None:
        assert reason(case.data, MAX_PIXELS) in case.reasons
        return
    pixels = images.decode(case.data, MAX_PIXELS)
    height, width = pixels.shape[:2]
    assert pixels.dtype == np.uint8 and pixels.shape == (height, width, 3)
    for number, colour in enumerate(case.colours):
        row, column = divmod(number, 2)
        found = pixels[height // 4 + row * height // 2, width // 4 + column * width // 2]
        assert np.abs(found.astype(int) - colour).max() <= 8, (number, found, colour)


def test_the_corpus_is_decoded_within_bounds_of_memory_and_time() -> None:
    """Each input in a forked process: 100 MB above what the process had, and 5 seconds.

    Of 4 million pixels, three copies of four bytes are 48 MB. The control: a picture of 9000 x
    9000 with the limit of the pixels lifted goes far beyond.
    """
    root = Path(__file__).parents[1]
    child = subprocess.run(
        [sys.executable, "-c", "from tests.test_images import measure_corpus; measure_corpus()"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    grown: dict[str, list[float]] = json.loads(child.stdout)
    control = grown.pop("control")
    assert len(grown) == len(CORPUS) >= 40
    assert control[0] > 200
    for name, (megabytes, seconds) in grown.items():
        assert megabytes < 100 and seconds < 5, name
    bombs = [case.name for case in CORPUS if case.reasons == ("too-many-pixels",)]
    assert len(bombs) == 3 and all(grown[name][0] < 50 for name in bombs)


def measure_corpus() -> None:
    """Print how much memory (MB) and time (s) each input of the corpus takes, as JSON."""
    found = {case.name: _measured(case.data, MAX_PIXELS) for case in CORPUS}
    large = next(case for case in CORPUS if case.name == "jpeg of 9000 x 9000")
    print(json.dumps({**found, "control": _measured(large.data, 200_000_000)}))


def _measured(data: bytes, limit: int) -> tuple[float, float]:
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        signal.alarm(20)
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            images.decode(data, limit)
        except ImageError:
            pass
        seconds = time.monotonic() - begun
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(write, json.dumps((grown / 1024, seconds)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    assert os.waitpid(pid, 0)[1] == 0, "the decoder died"
    megabytes, seconds = json.loads(text)
    return megabytes, seconds


@pytest.mark.parametrize("side", [256, 768])
def test_the_resize_is_pillows_bicubic(side: int) -> None:
    """Median PSNR over photograph-like pictures; the control is a resize without antialiasing."""
    found, control = [], []
    for seed in range(9):
        pixels = images.decode(photo(seed, side), LIMIT * 4)
        crop = images.train_crop(pixels, 224, np.random.default_rng(seed))
        height, width = pixels.shape[:2]
        rng = np.random.default_rng(seed)
        top, left = (int(rng.integers(0, s - side + 1)) for s in (height, width))
        square = Image.fromarray(pixels).crop((left, top, left + side, top + side))
        expected = np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC))
        found.append(psnr(crop, expected.transpose(2, 0, 1)))
        plain = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float()
        rough = F.interpolate(plain, (224, 224), mode="bicubic")[0].clamp(0, 255).round()
        control.append(psnr(rough.numpy(), expected.transpose(2, 0, 1)))
    print(f"{side} px: median PSNR {np.median(found):.1f} dB, unfiltered {np.median(control):.1f}")
    assert np.median(found) >= 60 > np.median(control) + 15
