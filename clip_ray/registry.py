"""Model versions: what an export is, how it is named in MLflow, and how it is proved.

An export is four files and nothing else, so that its digest means the same everywhere: in the
run's directory, as a registered version and in a replica's cache. MLflow's own model flavours are
left out on purpose: they add an MLmodel file and load through pickle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import getpass
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_ray.config import ModelConfig
from clip_ray.errors import ClipRayError, RegistryError
from clip_ray.storage import LocalStore, Store, open_store
from clip_ray.tracking import mask, mlflow_client, patient_timeouts, require_tracking_uri

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
ALIAS, PREVIOUS = "champion", "previous"

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
    """

    digest: str | None = None
    name: str | None = None
    version: str | None = None
    run_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ResolvedModel:
    """An immutable place to load a model from.

    Attributes:
        store: the directory that holds the export's files.
        digest: what the registry says the digest is; None where nothing says so.
        name: registered model, or None.
        version: registered version, or None.
        run_id: MLflow run, or None.
    """

    store: Store
    digest: str | None = None
    name: str | None = None
    version: str | None = None
    run_id: str | None = None
    # A downloaded copy lives as long as this object.
    _copy: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)


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


def write_export(store: Store, model: CLIP, tokenizer: Tokenizer, extra: dict[str, Any]) -> str:
    """Write a model as an export and return its digest.

    The same model, tokenizer and extra give the same bytes.

    Args:
        store: the export's own directory; an earlier export there is replaced.
        model: its weights are written as fp32 under OpenAI's names.
        tokenizer: written as tokenizer.json.
        extra: more keys of config.json, such as run_id, step, manifest_digest.

    Raises:
        RegistryError: the directory holds other files, or `extra` a key that is taken.
    """
    import safetensors.torch

    from clip_ray.images import preprocessing

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
        PREPROCESSING: _json(preprocessing(model.config.vision.image_size)),
    }
    for name, data in files.items():
        store.write(name, data)
    return _digest({n: (len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items()})


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
    info = ExportInfo(digest=digest, run_id=extra.get("run_id"), extra=extra)
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


def resolve(uri: str | os.PathLike[str], tracking_uri: str | None = None) -> ResolvedModel:
    """Find the export that a name means; an alias is resolved here, once.

    Args:
        uri: directory or s3:// prefix of an export or of a run, `runs:/<run id>`,
            `models:/<name>/<version>` or `models:/<name>@<alias>`.
        tracking_uri: MLflow's address for the last three; none = MLFLOW_TRACKING_URI, else
            runs/mlflow.db.

    Raises:
        RegistryError: nothing is there; the message lists what there is.
    """
    text = os.fspath(uri)
    if text.startswith("models:/"):
        return _resolve_version(text, tracking_uri)
    if text.startswith("runs:/"):
        return _resolve_run(text, tracking_uri)
    store = open_store(text)
    for candidate in (store, store.child("export")):
        if candidate.exists(WEIGHTS):
            return ResolvedModel(candidate)
    if store.child("checkpoints").directories():
        raise RegistryError(
            f"{store.uri}: a run without export/; it is written when the run finishes: resume it "
            "with the command that started it"
        )
    raise RegistryError(
        f"{store.uri}: no model there (looked for {WEIGHTS} and export/{WEIGHTS}); give a run's "
        "directory, an export, runs:/<id>, models:/<name>/<version> or models:/<name>@<alias>"
    )


def _resolve_run(text: str, tracking_uri: str | None) -> ResolvedModel:
    run_id = text.removeprefix("runs:/").strip("/").split("/")[0]
    where = require_tracking_uri(tracking_uri)
    with _explained(where):
        client = mlflow_client(where)
        run = _found(lambda: client.get_run(run_id))
        if run is None:
            raise RegistryError(f"{text}: MLflow at {where} has no run {run_id!r}")
        folder = run.data.tags.get("clip_ray.export")
        if folder is None:
            raise RegistryError(
                f"{text}: the run has logged no export (status {run.info.status}); it does when it "
                "finishes, with tracking.register_model"
            )
        digest = run.data.tags.get("clip_ray.digest")
        store, copy = _open_artifacts(f"{run.info.artifact_uri}/{folder}", where)
    return ResolvedModel(store, digest=digest, run_id=run_id, _copy=copy)


def _resolve_version(text: str, tracking_uri: str | None) -> ResolvedModel:
    path = text.removeprefix("models:/").strip("/")
    name, at, alias = path.partition("@")
    if not at:
        name, _, number = path.rpartition("/")
    if not name or not (alias if at else number.isdigit()):
        raise RegistryError(
            f"{text}: expected models:/<name>/<version> or models:/<name>@<alias>, such as "
            "models:/clip/3"
        )
    where = require_tracking_uri(tracking_uri)
    with _explained(where):
        client = mlflow_client(where)
        if at:
            found = _found(lambda: client.get_model_version_by_alias(name, alias))
        else:
            found = _found(lambda: client.get_model_version(name, number))
        if found is None:
            raise RegistryError(f"{text}: not in MLflow at {where}; {_what_exists(client, name)}")
        digest = found.tags.get("digest")
        if digest is None:
            raise RegistryError(
                f"{text}: the version has no tag 'digest', so it was not registered by CLIP-Ray "
                "and cannot be verified; register it with clip_ray.registry.register"
            )
        source = client.get_model_version_download_uri(name, found.version)
        store, copy = _open_artifacts(source, where)
    version = str(found.version)
    return ResolvedModel(store, digest, name, version, found.run_id or None, copy)


def _what_exists(client: Any, name: str) -> str:
    model = _found(lambda: client.get_registered_model(name))
    if model is not None:
        versions = ", ".join(str(v.version) for v in _versions(client, name)) or "none"
        aliases = ", ".join(f"@{a} -> {v}" for a, v in sorted(model.aliases.items())) or "none"
        return f"{name} has versions {versions}; aliases: {aliases}"
    names = sorted(m.name for m in client.search_registered_models(max_results=1000))
    near = difflib.get_close_matches(name, names, n=3) or names[:5]
    return "registered models: " + (", ".join(near) if near else "none yet")


def _versions(client: Any, name: str) -> list[Any]:
    """Return all versions of a registered model, oldest first."""
    found: list[Any] = []
    token = None
    quoted = name.replace("'", "''")
    while True:
        page = client.search_model_versions(f"name='{quoted}'", max_results=1000, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            return sorted(found, key=lambda v: int(v.version))


def _open_artifacts(
    source: str, tracking_uri: str
) -> tuple[Store, tempfile.TemporaryDirectory[str] | None]:
    """Return the files of an artifact URI: in place on this file system, else a copy."""
    local = source.removeprefix("file://")
    if local.startswith("/"):
        return LocalStore(Path(local)), None
    import mlflow.artifacts

    copy = tempfile.TemporaryDirectory(prefix="clip-ray-model-")
    path = mlflow.artifacts.download_artifacts(
        artifact_uri=source, dst_path=copy.name, tracking_uri=tracking_uri
    )
    return LocalStore(Path(path)), copy


def register(
    export: Store,
    name: str,
    run_id: str,
    tags: dict[str, str],
    tracking_uri: str | None = None,
) -> str:
    """Log an export to its run and register it as a model version; return the version.

    The same digest under the same name is registered once: a second call returns its version.

    Args:
        export: the export's directory.
        name: registered model.
        run_id: the MLflow run that made it.
        tags: more tags of the version (step, evaluation results, ...).
        tracking_uri: as in `resolve`.
    """
    digest = model_digest(export)
    config = json.loads(export.read(CONFIG))
    where = require_tracking_uri(tracking_uri)
    # By digest: a run that is extended exports again, and must not change the earlier version.
    folder = f"export-{digest[:12]}"
    with _explained(where), contextlib.ExitStack() as stack:
        client = mlflow_client(where)
        if _found(lambda: client.get_registered_model(name)) is None:
            _create_once(lambda: client.create_registered_model(name))
        for version in _versions(client, name):
            if version.tags.get("digest") == digest:
                return str(version.version)
        if isinstance(export, LocalStore):
            local = export.root
        else:
            local = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for file in FILES:
                export.download(file, local / file)
        client.log_artifacts(run_id, str(local), folder)
        client.set_tag(run_id, "clip_ray.export", folder)
        client.set_tag(run_id, "clip_ray.digest", digest)
        source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
        created = client.create_model_version(
            name,
            source=source,
            run_id=run_id,
            tags={
                "embed_dim": str(config["model"]["embed_dim"]),
                "step": str(config.get("step", "")),
                **tags,
                "run_id": run_id,
                "digest": digest,
            },
        )
    return str(created.version)


@dataclass(frozen=True)
class Promotion:
    """What `promote` did: `previous` is the version that `ALIAS` named before, or None."""

    name: str
    version: str
    digest: str
    previous: str | None


def latest_version(name: str, tracking_uri: str | None = None) -> str:
    """Return the newest version of a registered model.

    Raises:
        RegistryError: there is none; the message lists what there is.
    """
    where = require_tracking_uri(tracking_uri)
    with _explained(where):
        client = mlflow_client(where)
        versions = _versions(client, name)
        if not versions:
            raise RegistryError(
                f"models:/{name}: no version in MLflow at {where}; {_what_exists(client, name)}"
            )
    return str(versions[-1].version)


def promote(name: str, version: str, tracking_uri: str | None = None) -> Promotion:
    """Verify a model version, try it, then move the alias `champion` to it, last of all.

    The version that was champion becomes `previous`. Promoting the champion again changes nothing.

    Raises:
        RegistryError: no such version, other bytes than registered, or non-finite features.
    """
    where = require_tracking_uri(tracking_uri)
    resolved = resolve(f"models:/{name}/{version}", where)
    assert resolved.digest is not None and resolved.version is not None
    _try(resolved)
    with _explained(where):
        client = mlflow_client(where)
        champion = _found(lambda: client.get_model_version_by_alias(name, ALIAS))
        before = None if champion is None else str(champion.version)
        if before == resolved.version:
            return Promotion(name, resolved.version, resolved.digest, before)
        if before is not None:
            client.set_registered_model_alias(name, PREVIOUS, before)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        changes = {"by": _user(), "at": now, "from": before or "none", "to": resolved.version}
        for key, value in changes.items():
            client.set_model_version_tag(name, resolved.version, f"promoted.{key}", value)
        client.set_registered_model_alias(name, ALIAS, resolved.version)
    return Promotion(name, resolved.version, resolved.digest, before)


def _try(resolved: ResolvedModel) -> None:
    """Load the model from its stored bytes and encode one text and one image."""
    import numpy as np
    from PIL import Image

    from clip_ray.inference import Encoder

    model, tokenizer, info = load_export(resolved.store, resolved.digest)
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
                f"models:/{resolved.name}/{resolved.version}: {kind} features have norm {norm}, "
                "expected 1; the weights are not usable, nothing was promoted"
            )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a passwd entry
        return f"uid {os.getuid()}"


def with_origin(info: ExportInfo, resolved: ResolvedModel) -> ExportInfo:
    """Return `info` with the name, version and run that the registry knows."""
    return dataclasses.replace(
        info,
        name=resolved.name,
        version=resolved.version,
        run_id=resolved.run_id or info.run_id,
    )


def _found(ask: Any) -> Any:
    """Return what a registry call finds, None where MLflow says that it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        # An unknown alias is INVALID_PARAMETER_VALUE, and so is a malformed run id.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _create_once(create: Any) -> None:
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was first: fine
            raise


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn MLflow's failures into ours, naming the address; give it time to take weights."""
    from mlflow.exceptions import MlflowException

    try:
        with patient_timeouts():
            yield
    except ClipRayError:
        raise
    except (MlflowException, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RegistryError(mask(f"MLflow at {where}: {first}")) from error
