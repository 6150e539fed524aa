"""What an export is: four files and nothing else, so that its digest means the same everywhere.

In the run's directory, as a registered version, in a model store and in a replica's cache. MLflow's
own model flavours are left out on purpose: they add an MLmodel file and load through pickle.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clip_ray.config import ModelConfig
from clip_ray.errors import RegistryError
from clip_ray.storage import Store

if TYPE_CHECKING:
    from clip_ray.model import CLIP
    from clip_ray.tokenizer import Tokenizer

FORMAT = 1
WEIGHTS, CONFIG, TOKENIZER, PREPROCESSING = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "preprocessing.json",
)
FILES = (CONFIG, WEIGHTS, PREPROCESSING, TOKENIZER)

_CHUNK = 64 << 20  # bytes of one read: an S3 request each, and not the whole of a large model


@dataclass(frozen=True)
class ExportInfo:
    """Where a model's weights come from.

    Attributes:
        digest: the model digest; None for a model that was never exported.
        name: registered model, where it came from the registry.
        version: registered version, likewise.
        run_id: MLflow run that made it.
        extra: what config.json holds beside format and model (step, manifest_digest, ...).
        exif_orientation: the model was trained on pictures turned as their EXIF data say.
    """

    digest: str | None = None
    name: str | None = None
    version: str | None = None
    run_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    exif_orientation: bool = False


def model_digest(store: Store) -> str:
    """Return the model digest of the export in `store`: 64 hex digits, from the bytes.

    Raises:
        RegistryError: the directory holds no export, or files that are not an export's.
    """
    _check_files(store)
    entries = {}
    for name in FILES:
        size = store.info(name).size
        content = hashlib.sha256()
        for start in range(0, size, _CHUNK):
            content.update(store.read(name, start, min(start + _CHUNK, size)))
        entries[name] = (size, content.hexdigest())
    return _digest(entries)


def _digest(entries: dict[str, tuple[int, str]]) -> str:
    lines = sorted(f"{name}, {size}, {sha256}\n" for name, (size, sha256) in entries.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_files(store: Store) -> None:
    found = set(store.files())
    missing, strange = sorted(set(FILES) - found), sorted(found - set(FILES))
    if missing:
        raise RegistryError(
            f"{store.uri}: not an export, {', '.join(missing)} missing; expected {', '.join(FILES)}"
        )
    if strange:
        raise RegistryError(
            f"{store.uri}: holds {', '.join(strange[:5])}, which is not part of an export; "
            f"expected exactly {', '.join(FILES)}: move the rest elsewhere"
        )


def write_export(
    store: Store,
    model: CLIP,
    tokenizer: Tokenizer,
    extra: dict[str, Any],
    exif_orientation: bool = False,
) -> str:
    """Write a model as an export and return its digest.

    The same model, tokenizer and extra give the same bytes.

    Args:
        store: the export's own directory; an earlier export there is replaced.
        model: its weights are written as fp32 under OpenAI's names.
        tokenizer: written as tokenizer.json.
        extra: more keys of config.json, such as run_id, step, manifest_digest.
        exif_orientation: turn pictures as their EXIF data say, as in training.

    Raises:
        RegistryError: the directory holds other files, or `extra` a key that is taken.
    """
    import safetensors.torch

    if taken := sorted({"format", "model"} & extra.keys()):
        raise RegistryError(f"export extra {', '.join(taken)}: the name is taken by the format")
    if strange := sorted(set(store.files()) - set(FILES)):
        raise RegistryError(
            f"{store.uri}: holds {', '.join(strange[:5])}; an export needs a directory of its own"
        )
    weights = {
        # A compiled module's parameters carry a prefix that no reader of the file should see.
        name.replace("_orig_mod.", ""): tensor.detach().to("cpu").float().contiguous()
        for name, tensor in model.state_dict().items()
    }
    config = {"format": FORMAT, "model": model.config.model_dump(mode="json"), **extra}
    files = {
        WEIGHTS: safetensors.torch.save(weights),
        CONFIG: _json(config),
        TOKENIZER: tokenizer.to_bytes(),
        PREPROCESSING: _json(_preprocessing(model, exif_orientation)),
    }
    for name, data in files.items():
        store.write(name, data)
    return _digest({n: (len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items()})


def _preprocessing(model: CLIP, exif_orientation: bool) -> dict[str, Any]:
    """Return the content of preprocessing.json, with the model's own mean and std."""
    import torch

    from clip_ray.images import preprocessing

    document = preprocessing(model.config.vision.image_size, exif_orientation)
    for name, constant in (("mean", model.pixel_mean), ("std", model.pixel_std)):
        value_3 = constant.detach().flatten().cpu()
        # Where they are the same in fp32 the usual digits stay: the digest counts them.
        if not torch.equal(value_3, torch.tensor(document[name], dtype=torch.float32)):
            document[name] = [float(str(value)) for value in value_3.numpy()]
    return document


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def load_export(
    store: Store, expected_digest: str | None = None
) -> tuple[CLIP, Tokenizer, ExportInfo]:
    """Load an export; what is loaded is what was hashed.

    Args:
        store: the export's directory.
        expected_digest: refuse any other bytes.

    Returns:
        The model (fp32, CPU, evaluation mode), its tokenizer, and where it comes from.

    Raises:
        RegistryError: no export, a newer format, other bytes, or weights that do not fit config.
    """
    from clip_ray.tokenizer import Tokenizer

    _check_files(store)
    # Read once: hashing and loading from two reads would let the file change in between.
    files = {name: store.read(name) for name in FILES}
    digest = _digest({n: (len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items()})
    if expected_digest is not None and digest != expected_digest:
        raise RegistryError(
            f"{store.uri}: digest {digest} is not the expected {expected_digest}; the files were "
            "changed or damaged: restore them, or export and register the model again"
        )
    try:
        config = json.loads(files[CONFIG])
        pixels = json.loads(files[PREPROCESSING])
    except ValueError as error:
        raise RegistryError(
            f"{store.uri}: {CONFIG} or {PREPROCESSING} is not JSON: {error}"
        ) from error
    if not isinstance(config.get("format"), int) or config["format"] > FORMAT:
        raise RegistryError(
            f"{store.uri}: export format {config.get('format')!r}, this version reads up to "
            f"{FORMAT}; update clip-ray"
        )
    model = _build(store, config, pixels, files[WEIGHTS])
    extra = {k: v for k, v in config.items() if k not in ("format", "model")}
    turned = bool(pixels.get("exif_orientation", False))
    info = ExportInfo(
        digest=digest, run_id=extra.get("run_id"), extra=extra, exif_orientation=turned
    )
    return model, Tokenizer.load(files[TOKENIZER]), info


def _build(store: Store, config: dict[str, Any], pixels: dict[str, Any], weights: bytes) -> CLIP:
    import safetensors.torch
    import torch
    from pydantic import ValidationError

    from clip_ray.model import CLIP

    try:
        architecture = ModelConfig.model_validate(config["model"])
        mean, std = tuple(pixels["mean"]), tuple(pixels["std"])
        size = pixels["size"]
    except (KeyError, ValidationError) as error:
        raise RegistryError(f"{store.uri}: {CONFIG} or {PREPROCESSING}: {error}") from error
    if size != architecture.vision.image_size:
        raise RegistryError(
            f"{store.uri}: {PREPROCESSING} says {size} pixels, the model takes "
            f"{architecture.vision.image_size}"
        )
    with torch.device("meta"):
        model = CLIP(architecture, mean, std)
    try:
        model.load_state_dict(safetensors.torch.load(weights), assign=True)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise RegistryError(f"{store.uri}: {WEIGHTS} does not fit {CONFIG}: {error}") from error
    return model.eval()
