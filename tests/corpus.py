"""Images as the web has them: every kind that decoders have got wrong, made from scratch.

Each comes with what must become of it: a colour in each quarter of the picture, or the reasons
under which it may be refused.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Colours = tuple[tuple[int, int, int], ...]
RED, GREEN, BLUE, WHITE, GREY = (200, 40, 40), (40, 160, 60), (40, 60, 200), (255,) * 3, (128,) * 3
QUARTERS: Colours = (RED, GREEN, BLUE, GREY)  # top left, top right, bottom left, bottom right
LUMA: Colours = tuple((round(0.299 * r + 0.587 * g + 0.114 * b),) * 3 for r, g, b in QUARTERS)
HEIGHT, WIDTH = 48, 64
MAX_PIXELS = 4_000_000
CUT = ("truncated", "corrupt")


@dataclass(frozen=True)
class Case:
    """An input and its fate: the colours of the picture's quarters, or the allowed reasons."""

    name: str
    data: bytes
    colours: Colours | None = None
    reasons: tuple[str, ...] = ()


def pixels(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Four quarters of one colour each."""
    image = np.empty((height, width, 3), np.uint8)
    for number, colour in enumerate(QUARTERS):
        row, column = divmod(number, 2)
        image[
            row * height // 2 : (row + 1) * height // 2,
            column * width // 2 : (column + 1) * width // 2,
        ] = colour
    return image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return what Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunked(chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG of these chunks."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in chunks:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        parts.append(struct.pack(">I", len(content)) + kind + content + crc)
    return b"".join(parts)


def png(width: int, height: int, bits: int, colour: int, rows: bytes, interlaced: int = 0) -> bytes:
    """Return a PNG of filtered rows, whatever its header promises."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return chunked([(b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")])


def corpus() -> list[Case]:
    """Return all inputs."""
    return [*_jpegs(), *_pngs(), *_gifs_and_webps(), *_strangers()]


def _jpegs() -> Iterable[Case]:
    image = Image.fromarray(pixels())
    plain = simplejpeg.encode_jpeg(pixels(), quality=95, colorsubsampling="444")
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    noisy = simplejpeg.encode_jpeg(noise, quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield Case("jpeg 4:4:4", plain, QUARTERS)
    yield Case("jpeg 4:2:0", simplejpeg.encode_jpeg(pixels(), colorsubsampling="420"), QUARTERS)
    yield Case("jpeg 4:1:1", saved(image, "JPEG", quality=95, subsampling="4:1:1"), QUARTERS)
    yield Case("jpeg progressive", saved(image, "JPEG", quality=95, progressive=True), QUARTERS)
    yield Case("jpeg grey", saved(image.convert("L"), "JPEG", quality=95), LUMA)
    yield Case("jpeg cmyk", saved(image.convert("CMYK"), "JPEG", quality=95), QUARTERS)
    yield Case("jpeg exif 6, not turned", saved(image, "JPEG", quality=95, exif=exif), QUARTERS)
    profile = np.random.default_rng(1).bytes(3000)
    yield Case("jpeg broken profile", saved(image, "JPEG", icc_profile=profile), QUARTERS)
    comment = b"\xff\xfe\xff\xff" + bytes(65533)
    yield Case("jpeg with 6 MB of comments", plain[:2] + 100 * comment + plain[2:], QUARTERS)
    yield Case("jpeg restart markers", saved(image, "JPEG", restart_marker_rows=1), QUARTERS)
    yield Case("jpeg and what follows it", plain + b"<html>" * 100, QUARTERS)
    frames = {"save_all": True, "append_images": [image.rotate(180)]}
    yield Case("mpo", saved(image, "MPO", quality=95, **frames), QUARTERS)
    yield Case("jpeg after a newline", b"\n" + plain, reasons=("not-an-image",))
    yield Case("jpeg cut in half", noisy[: len(noisy) // 2], reasons=("truncated",))
    yield Case("jpeg without its end", noisy[:-2], reasons=("truncated",))
    yield Case("jpeg header alone", plain[: plain.index(b"\xff\xda")], reasons=("truncated",))
    flipped = np.frombuffer(noisy, np.uint8).copy()
    scan = noisy.index(b"\xff\xda") + 20
    flipped[np.random.default_rng(2).integers(scan, len(noisy) - 2, 40)] ^= 0xFF
    yield Case("jpeg 40 flipped bytes", flipped.tobytes(), reasons=CUT)
    size = plain.index(b"\xff\xc0") + 5
    huge = plain[:size] + struct.pack(">HH", 65000, 65000) + plain[size + 4 :]
    yield Case("jpeg header of 65000 x 65000", huge, reasons=("too-many-pixels",))
    flat = np.full((9000, 9000, 1), 128, np.uint8)
    real = simplejpeg.encode_jpeg(flat, colorspace="GRAY", colorsubsampling="Gray", quality=50)
    yield Case("jpeg of 9000 x 9000", real, reasons=("too-many-pixels",))
    yield Case("jpeg 3 x 3", simplejpeg.encode_jpeg(pixels(3, 3)), reasons=("too-small",))
    yield Case("jpeg banner", simplejpeg.encode_jpeg(pixels(8, 200)), reasons=("aspect",))


def _pngs() -> Iterable[Case]:
    image = Image.fromarray(pixels())
    plain = saved(image, "PNG")
    grey = np.asarray(image.convert("L"))
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, WIDTH // 2 :] = 0
    clear: Colours = (RED, WHITE, BLUE, WHITE)
    yield Case("png", plain, QUARTERS)
    yield Case("png palette", saved(image.quantize(8), "PNG"), QUARTERS)
    yield Case("png 1 bit", png(8, 8, 1, 0, b"\0\xff" * 8), (WHITE,) * 4)
    deep = grey.astype(np.uint16) * 257
    yield Case("png 16 bit grey", saved(Image.fromarray(deep), "PNG"), LUMA)
    rows = [
        b"\0" + (pixels()[y].astype(np.uint16) * 257).astype(">u2").tobytes() for y in range(48)
    ]
    yield Case("png 16 bit rgb", png(WIDTH, HEIGHT, 16, 2, b"".join(rows)), QUARTERS)
    rgba = Image.fromarray(np.dstack([pixels(), alpha]))
    yield Case("png rgba on white", saved(rgba, "PNG"), clear)
    faded = tuple((x[0] if n % 2 == 0 else 255,) * 3 for n, x in enumerate(LUMA))
    yield Case("png grey alpha on white", saved(rgba.convert("LA"), "PNG"), faded)
    palette = image.quantize(8)
    index = palette.getpixel((WIDTH - 1, 0))
    yield Case(
        "png palette transparency",
        saved(palette, "PNG", transparency=index),
        (RED, WHITE, BLUE, GREY),
    )
    passes = ((8, 8), (8, 8), (4, 8), (4, 4), (2, 4), (2, 2), (1, 2))  # Adam7's steps in x and y
    starts = ((0, 0), (4, 0), (0, 4), (2, 0), (0, 2), (1, 0), (0, 1))
    woven = b"".join(
        b"\0" + bytes([128]) * len(range(x, 16, dx))
        for (x, y), (dx, dy) in zip(starts, passes, strict=True)
        for _ in range(y, 16, dy)
    )
    yield Case("png interlaced", png(16, 16, 8, 0, woven, 1), (GREY,) * 4)
    yield Case("png cut in half", plain[: len(plain) // 2], reasons=("truncated",))
    broken = bytearray(plain)
    broken[plain.index(b"IDAT") + 8] ^= 0xFF
    yield Case("png of a wrong checksum", bytes(broken), reasons=CUT)
    bomb = png(30000, 30000, 8, 2, bytes(1000))
    yield Case("png bomb of 30000 x 30000", bomb, reasons=("too-many-pixels",))
    text = PngInfo()
    text.add_text("x", "0" * 8_000_000, zip=True)
    yield Case("png with 8 MB of zipped text", saved(image, "PNG", pnginfo=text), reasons=CUT)
    yield Case("png that lacks its pixels", png(64, 48, 8, 2, b"\0"), reasons=CUT)


def _gifs_and_webps() -> Iterable[Case]:
    image = Image.fromarray(pixels())
    frames = {"save_all": True, "append_images": [image.rotate(180)], "duration": 100}
    rgba = pixels()
    clear = Image.fromarray(
        np.dstack([rgba, np.where(rgba[..., 0] == RED[0], 0, 255)]).astype("u1")
    )
    webp = saved(image, "WEBP", quality=95)
    yield Case("gif, its first frame", saved(image, "GIF", **frames), QUARTERS)
    see_through: Colours = (WHITE, GREEN, BLUE, GREY)
    yield Case("gif transparent", saved(clear, "GIF"), see_through)
    yield Case("gif cut", saved(image, "GIF")[:-200], reasons=CUT)
    yield Case("webp", webp, QUARTERS)
    yield Case("webp lossless on white", saved(clear, "WEBP", lossless=True), see_through)
    yield Case("webp, its first frame", saved(image, "WEBP", lossless=True, **frames), QUARTERS)
    yield Case("webp cut", webp[: len(webp) // 2], reasons=CUT)


def _strangers() -> Iterable[Case]:
    image = Image.fromarray(pixels())
    yield Case("empty", b"", reasons=("empty",))
    yield Case("html", b"<!DOCTYPE html><html>404</html>", reasons=("not-an-image",))
    yield Case("zeros", bytes(10_000), reasons=("not-an-image",))
    yield Case("bmp", saved(image, "BMP"), reasons=("unsupported-format",))
    yield Case("tiff", saved(image, "TIFF"), reasons=("unsupported-format",))
    yield Case("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", reasons=("unsupported-format",))
    avif = b"\0\0\0\x1cftypavif" + bytes(100)
    yield Case("avif", avif, reasons=("unsupported-format",))
