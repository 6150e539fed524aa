"""Try a model: encode one text and one image, here or in a process of its own.

python -m clip_ray.registry.check < '{"model": ServedModel, "s3": S3Options}'
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from clip_ray.errors import ClipRayError, RegistryError

if TYPE_CHECKING:
    from clip_ray.model import CLIP
    from clip_ray.registry.export import ExportInfo
    from clip_ray.tokenizer import Tokenizer


def probe(model: CLIP, tokenizer: Tokenizer, info: ExportInfo, what: str) -> None:
    """Encode a text and an image on the CPU.

    Raises:
        RegistryError: the features of `what` are not finite and of unit length.
    """
    import numpy as np
    from PIL import Image

    from clip_ray.inference import Encoder

    encoder = Encoder(model, tokenizer, info, device="cpu")
    picture = io.BytesIO()
    ramp = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3) % 251
    Image.fromarray(ramp.astype(np.uint8)).save(picture, "PNG")
    features = {
        "text": encoder.encode_texts(["a photo"]),
        "image": encoder.encode_images([picture.getvalue()]),
    }
    for kind, feature_1E in features.items():
        norm = float(np.linalg.norm(feature_1E))
        if not math.isclose(norm, 1.0, abs_tol=1e-3):  # NaN is close to nothing
            raise RegistryError(
                f"{what}: {kind} features have norm {norm}, expected 1; the weights are not "
                "usable, nothing was promoted"
            )


def main() -> int:
    """Verify the model that standard input describes; return the exit code."""
    # It runs beside replicas under load, and takes what they leave.
    os.nice(10)
    import torch

    from clip_ray.config import S3Options
    from clip_ray.registry import ServedModel, load_served

    torch.set_num_threads(1)
    task = json.load(sys.stdin)
    served = ServedModel.model_validate(task["model"])
    try:
        with tempfile.TemporaryDirectory(prefix="clip-ray-check-") as cache:
            loaded = load_served(served, Path(cache), S3Options.model_validate(task["s3"]))
            probe(*loaded, served.id)
    except ClipRayError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
