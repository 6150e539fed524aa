"""From the bytes of an image file to the uint8 pixels that a model takes.

Training, evaluation, batch embedding and the endpoints all decode and crop here and nowhere
else, so that an index and a query can never differ. Pixels stay uint8: the device normalises,
and a quarter of the bytes travel. EXIF orientation is applied only where it is asked for: the
field's loaders do not, and released models saw such pictures as they lie.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

from clip_ray.errors import DataError

Pixels = NDArray[np.uint8]

MIN_SIDE = 4  # pixels; tracking pixels and spacers carry no picture
MAX_ASPECT = 20.0  # longer side / shorter side; a square crop of a banner shows nothing of it

_ORIENTATION = 0x0112  # its tag in EXIF
_PILLOW_FORMATS = ("PNG", "WEBP", "GIF")
_JPEG_FORMATS = ("JPEG", "MPO")
_JPEG_MAGIC = b"\xff\xd8\xff"
_OTHER_MAGICS = (  # images all the same: the reason should say so
    (0, b"BM"),
    (0, b"II*\0"),
    (0, b"MM\0*"),
    (0, b"8BPS"),
    (0, b"\0\0\1\0"),
    (0, b"\0\0\0\x0cjP  "),
    (4, b"ftyp"),
    (0, b"<svg"),
)


class ImageError(DataError):
    """An image that cannot be used; `reason` is the short name it is counted under.

    Reasons: empty, not-an-image, unsupported-format, truncated, corrupt, too-many-pixels,
    too-small, aspect.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def decode(data: bytes, max_pixels: int, exif_orientation: bool = False) -> Pixels:
    """Return the pixels of an image file, (H, W, 3) uint8 RGB.

    JPEG goes through libjpeg-turbo, strictly: a damaged file is refused, where Pillow would show
    garbage or grey. PNG, WebP and GIF (its first frame) go through Pillow; transparency is
    composited on white, 16-bit grey is rescaled.

    Args:
        data: the whole file.
        max_pixels: the limit of H x W, checked on the header before memory is taken.
        exif_orientation: turn the picture as its EXIF data say.

    Raises:
        ImageError: the file is no usable image.
    """
    pixels = _decode(data, max_pixels)
    return turn(pixels, orientation(data)) if exif_orientation else pixels


def orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image file, 1 to 8; 1 where it says none."""
    if not any(mark in data for mark in (b"Exif\0\0", b"eXIf", b"EXIF", b"Orientation")):
        return 1  # most files: Pillow's parser costs a tenth of decoding
    formats = _JPEG_FORMATS if data[:3] == _JPEG_MAGIC else _PILLOW_FORMATS
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            found = image.getexif().get(_ORIENTATION)
    except Exception:  # a parser fed with hostile bytes raises anything; the picture is whole
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def turn(pixels: Pixels, orientation: int) -> Pixels:
    """Return pixels (H, W, 3) of an EXIF orientation upright, (H, W, 3) or (W, H, 3)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """Return a JPEG file without EXIF data with this orientation in it."""
    if orientation == 1:
        return jpeg
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    content = exif.tobytes()
    segment = b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content
    return jpeg[:2] + segment + jpeg[2:]


def _decode(data: bytes, max_pixels: int) -> Pixels:
    if data[:3] != _JPEG_MAGIC:
        return _decode_pillow(data, max_pixels, _PILLOW_FORMATS)
    header = _jpeg_header(data)
    if header is None:
        return _decode_pillow(data, max_pixels, _JPEG_FORMATS)
    _check_size(*header, max_pixels)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError as error:
        raise _jpeg_error(error) from error
    return pixels


def measure(data: bytes) -> tuple[int, int]:
    """Return (width, height) from an image file's header, without decoding it.

    Raises:
        ImageError: the header is no image's.
    """
    if data[:3] != _JPEG_MAGIC:
        return _open_pillow(data, _PILLOW_FORMATS).size
    return _jpeg_header(data) or _open_pillow(data, _JPEG_FORMATS).size


def train_crop(pixels: Pixels, size: int, rng: np.random.Generator, margin: float = 0.0) -> Pixels:
    """Return a random square of an image, (3, size, size) uint8 over channels-last memory.

    "A random square crop from resized images is the only data augmentation" (Radford et al.
    2021, section 2.3): the shorter side is resized to (1 + margin) times `size`, then a square is
    cropped at random. The paper does not say how large the resized image is.
    Here the square is cut first and only it is resized: the same picture (but for the place
    rounded to source pixels), without resizing what is thrown away.

    Args:
        pixels: (H, W, 3) uint8.
        size: side of the result in pixels.
        rng: where the place comes from; two draws.
        margin: how much larger than the crop the resized image's shorter side is.
    """
    height, width = pixels.shape[:2]
    side = max(round(min(height, width) / (1 + margin)), 1)
    top = int(rng.integers(0, height - side + 1))
    left = int(rng.integers(0, width - side + 1))
    return _resize(pixels[top : top + side, left : left + side], size, size)


def eval_crop(pixels: Pixels, size: int) -> Pixels:
    """Return the centre square of an image, (3, size, size) uint8.

    Resized first and cropped after, unlike in training: then released models see the very pixels
    that their own preprocessing (torchvision's Resize and CenterCrop) makes.

    Args:
        pixels: (H, W, 3) uint8.
        size: side of the result in pixels.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    resized = _resize(pixels, int(size * height / side), int(size * width / side))
    top = round((resized.shape[1] - size) / 2)
    left = round((resized.shape[2] - size) / 2)
    return np.ascontiguousarray(resized[:, top : top + size, left : left + size])


def shrink(pixels: Pixels, longest: int) -> Pixels:
    """Return the whole image, (h, w, 3) uint8, with its longer side at most `longest` pixels."""
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return pixels
    resized = _resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
    return np.ascontiguousarray(resized.transpose(1, 2, 0))


def preprocessing(size: int, exif_orientation: bool = False) -> dict[str, Any]:
    """Return the content of export/preprocessing.json for images of side `size`."""
    from clip_ray.model.clip import IMAGE_MEAN, IMAGE_STD

    turned = {"exif_orientation": True} if exif_orientation else {}
    return {
        **turned,
        "size": size,
        "mean": list(IMAGE_MEAN),
        "std": list(IMAGE_STD),
        "resize": "shorter side, antialiased bicubic",
        "crop": "centre",
    }


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize (H, W, 3) to a view (3, height, width) of channels-last memory.

    Antialiased bicubic on uint8.
    """
    # The HWC buffer seen as NCHW is torch's channels_last: its fast uint8 path. torch tells it by
    # all four strides, that of the batch of one too; else it takes the result apart into planes,
    # which costs a fifth of the resize.
    source = torch.from_numpy(pixels)
    rows, columns, channels = source.stride()
    image_1CHW = source.as_strided(
        (1, 3, *source.shape[:2]), (len(source) * rows, channels, rows, columns)
    )
    if image_1CHW.shape[2:] != (height, width):
        image_1CHW = F.interpolate(image_1CHW, (height, width), mode="bicubic", antialias=True)
    return image_1CHW[0].numpy()


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError("too-many-pixels", f"{width}x{height}, limit {max_pixels} pixels")
    if min(width, height) < MIN_SIDE:
        raise ImageError("too-small", f"{width}x{height}, shortest side allowed {MIN_SIDE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError("aspect", f"{width}x{height}, sides may differ {MAX_ASPECT:g}-fold")


def _jpeg_header(data: bytes) -> tuple[int, int] | None:
    """Return (width, height); None for a kind of JPEG that simplejpeg does not decode rightly."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        if b"\xff\xda" not in data:
            raise ImageError("truncated", "ends before the first scan") from error
        # TurboJPEG's answer to sampling factors that it has no name for.
        if "subsampling" in str(error):
            return None
        raise _jpeg_error(error) from error
    return None if colorspace in ("CMYK", "YCCK") else (width, height)


def _jpeg_error(error: ValueError) -> ImageError:
    text = str(error)
    return ImageError("truncated" if "premature end" in text.lower() else "corrupt", text)


def _open_pillow(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    if not data:
        raise ImageError("empty", "0 bytes")
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        if any(data[at : at + len(magic)] == magic for at, magic in _OTHER_MAGICS):
            raise ImageError(
                "unsupported-format", f"begins with {data[:12]!r}; expected JPEG, PNG, WebP or GIF"
            ) from error
        raise ImageError("not-an-image", f"begins with {data[:12]!r}") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too-many-pixels", str(error)) from error
    except Exception as error:  # a parser fed with hostile bytes raises anything
        raise ImageError("corrupt", f"{type(error).__name__}: {error}") from error


def _decode_pillow(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> Pixels:
    image = _open_pillow(data, formats)
    _check_size(*image.size, max_pixels)
    try:
        image.load()
        return _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # as above; a bad image must never end a run
        cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
        raise ImageError(
            "truncated" if cut else "corrupt", f"{type(error).__name__}: {error}"
        ) from error


def _to_rgb(image: Image.Image) -> Pixels:
    """Return (H, W, 3) uint8; no step holds more than three copies of four bytes a pixel."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255 and shows white.
        grey = np.array(image, dtype=np.int32)
        np.clip(grey, 0, 65535, out=grey)
        grey += 128
        grey //= 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
        del rgba, white
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)
