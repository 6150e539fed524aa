"""What a replica serves: a model named by value, copied once, and loaded without MLflow.

Promotion resolves a name to a `ServedModel` and copies its export to the model store; from then on
replicas need the store alone. The deployment's `user_config` is a `Target`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator

from clip_ray.config import S3Options
from clip_ray.config.schema import Section, without_credentials
from clip_ray.errors import RegistryError
from clip_ray.registry.export import CONFIG, FILES, ExportInfo, load_export, model_digest
from clip_ray.registry.versions import ResolvedModel, resolve
from clip_ray.storage import LocalStore, Store, open_store

if TYPE_CHECKING:
    from clip_ray.model import CLIP
    from clip_ray.tokenizer import Tokenizer

TARGET_FORMAT = 1
LOCK_S = 900.0  # for another process's download; a large model over a slow network takes minutes
_LAST_LINES = 8


class ServedModel(Section):
    """A model by value: nothing here has to be looked up, and nothing can move."""

    name: str = Field(
        pattern=r"^[^/@:\s][^/@:]*$", description="what `model` in a request calls it"
    )
    version: str = Field(
        pattern=r"^[A-Za-z0-9._-]+$",
        description="registered version; the digest's first 12 digits for a model in no registry",
    )
    uri: str = Field(description="absolute directory or s3:// prefix of the export")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="model digest")
    run_id: str | None = Field(None, description="MLflow run that made it, where known")

    @field_validator("uri")
    @classmethod
    def _resolved(cls, uri: str) -> str:
        if uri.startswith(("models:", "runs:")):
            raise ValueError(
                f"{uri} names a model that MLflow would have to be asked for; resolve it with "
                "jobs/deploy.py or jobs/promote.py"
            )
        if not uri.startswith(("/", "s3://")):
            raise ValueError(f"{uri}: expected an absolute directory or s3://")
        without_credentials(uri if "://" in uri else None)
        return uri.rstrip("/") or "/"

    @property
    def id(self) -> str:
        """NAME/VERSION, as requests and answers spell it."""
        return f"{self.name}/{self.version}"

    def plain(self) -> ServedModel:
        """Return the model alone, without what a `Target` has beside it."""
        return ServedModel(**{name: getattr(self, name) for name in ServedModel.model_fields})


class Target(ServedModel):
    """The whole `user_config` of a deployment: what is to be served now, and what still is."""

    format: Literal[1] = Field(1, description="of this document")
    previous: ServedModel | None = Field(None, description="what stays answerable beside it")

    @field_validator("format", mode="before")
    @classmethod
    def _not_newer(cls, value: Any) -> Any:
        if type(value) is int and value > TARGET_FORMAT:
            raise ValueError(
                f"format {value}, this version reads up to {TARGET_FORMAT}; deploy the newer code "
                "first"
            )
        return value


def store_model(
    uri: str | os.PathLike[str],
    model_store: str | os.PathLike[str],
    s3: S3Options | None = None,
    tracking_uri: str | None = None,
    name: str | None = None,
    copy: bool = True,
) -> ServedModel:
    """Resolve a model once and copy its export to `<model_store>/<digest>`.

    Doing it again changes nothing, and two that do it at once do no harm.

    Args:
        uri: whatever `resolve` takes.
        model_store: directory or s3:// prefix that every replica reads.
        s3: access to it, and to `uri`.
        tracking_uri: as in `resolve`.
        name: what to call a model that is in no registry; none = its directory's name.
        copy: False = only say what it would be called there; nothing is written.

    Raises:
        RegistryError: as `resolve`; its bytes are not the registered ones; the copy failed; or a
            registered model is to be called otherwise.
    """
    with _explained():
        resolved = resolve(uri, tracking_uri, s3)
        digest = model_digest(resolved.store)
        if resolved.digest is not None and digest != resolved.digest:
            raise RegistryError(
                f"{uri}: digest {digest} is not the registered {resolved.digest}; the files were "
                "changed or damaged: export and register the model again"
            )
        target = open_store(model_store, s3).child(digest)
        if copy and not _holds(target, digest):
            _copy(resolved.store, target)
            if not _holds(target, digest):
                raise RegistryError(
                    f"{target.uri}: the copied files do not have the digest {digest}; check the "
                    "store, delete the directory, and try again"
                )
        run_id = resolved.run_id or json.loads(resolved.store.read(CONFIG)).get("run_id")
    called = _name(resolved, str(os.fspath(uri)), name)
    try:
        return ServedModel(
            name=called,
            version=resolved.version or digest[:12],
            uri=target.uri,
            digest=digest,
            run_id=run_id,
        )
    except ValidationError as error:
        raise RegistryError(
            f"{uri}: cannot be served as {called!r}: {error.errors()[0]['msg']}; give a name "
            "without /, : and @"
        ) from error


def _name(resolved: ResolvedModel, uri: str, name: str | None) -> str:
    if resolved.name is not None:
        if name not in (None, resolved.name):
            raise RegistryError(
                f"{uri}: registered as {resolved.name}, and cannot be called {name}; leave the "
                "name out, or register the model under that name"
            )
        return resolved.name
    if name is not None:
        return name
    if uri.startswith("runs:/"):
        return f"run-{(resolved.run_id or '')[:8]}"
    parts = [part for part in os.path.abspath(uri).split("/") if part]
    if len(parts) > 1 and parts[-1] == "export":
        parts.pop()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1] if parts else "").strip("-.") or "model"


def _holds(store: Store, digest: str) -> bool:
    """Tell whether a directory holds the model with this digest, from its bytes."""
    return set(FILES) <= set(store.files()) and model_digest(store) == digest


def _copy(source: Store, target: Store) -> None:
    for file in FILES:
        # Each file appears whole, and any other writer here writes the same bytes.
        target.put(file, functools.partial(source.download, file))


def load_served(
    model: ServedModel, cache: Path, s3: S3Options | None = None
) -> tuple[CLIP, Tokenizer, ExportInfo]:
    """Load a served model; its digest is computed anew from the bytes that are loaded.

    A directory is read in place. From S3 it is downloaded once a node, into `cache`.

    Args:
        model: what to load.
        cache: directory of this node that its processes share.
        s3: access to the model store.

    Raises:
        RegistryError: it is not there, damaged, or cannot be fetched.
    """
    with _explained():
        if not model.uri.startswith("s3://"):
            loaded = load_export(open_store(model.uri), model.digest)
        else:
            loaded = _load_cached(model, cache, open_store(model.uri, s3))
    info = dataclasses.replace(
        loaded[2],
        name=model.name,
        version=model.version,
        run_id=model.run_id or loaded[2].run_id,
    )
    return loaded[0], loaded[1], info


def _load_cached(
    model: ServedModel, cache: Path, source: Store
) -> tuple[CLIP, Tokenizer, ExportInfo]:
    folder = cache / model.digest
    local = LocalStore(folder)
    with _lock(cache / f"{model.digest}.lock"):
        if not folder.is_dir():
            _download(source, folder, model.digest)
    try:
        return load_export(local, model.digest)
    except (RegistryError, OSError):
        # The disk's copy was damaged since: mend it, unless another process already has.
        with _lock(cache / f"{model.digest}.lock"):
            if not _holds(local, model.digest):
                shutil.rmtree(folder, ignore_errors=True)
                _download(source, folder, model.digest)
        return load_export(local, model.digest)


def _download(source: Store, folder: Path, digest: str) -> None:
    """Fetch an export; the directory appears whole and verified, or not at all."""
    for left in folder.parent.glob(f".{digest}.*"):  # of a killed process: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{digest}.", dir=folder.parent))
    try:
        for file in FILES:
            source.download(file, temporary / file)
        found = model_digest(LocalStore(temporary))
        if found != digest:
            raise RegistryError(
                f"{source.uri}: digest {found} is not the expected {digest}; the files were "
                "changed or damaged: promote the model again"
            )
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path, timeout_s: float = LOCK_S) -> Iterator[None]:
    """Hold a file's lock, among the threads and processes of a node; its holder's end frees it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        end = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RegistryError(
                        f"{path}: locked by another process for {timeout_s:.0f} s; end that "
                        "process if its download hangs"
                    ) from None
                time.sleep(0.05)
        yield


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn a file's or store's failure into ours."""
    try:
        yield
    except OSError as error:
        detail = error.strerror or str(error) or type(error).__name__
        where = f"{error.filename}: " if error.filename else ""
        raise RegistryError(f"{where}{detail}; check the directory, or the S3 settings") from error


def verify_in_process(model: ServedModel, s3: S3Options | None, timeout_s: float) -> None:
    """Load a served model in a process of its own, and encode one text and one image.

    What crashes or hangs there disturbs nobody; the process runs at low priority.

    Args:
        model: what to verify.
        s3: access to the model store.
        timeout_s: seconds after which the process is killed.

    Raises:
        RegistryError: the model is not usable, or the process ended without an answer.
    """
    import clip_ray

    task = {"model": model.plain().model_dump(), "s3": (s3 or S3Options()).model_dump()}
    # The child must find the code that this process runs, wherever it was started.
    root = str(Path(clip_ray.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "clip_ray.registry.check"],
            input=json.dumps(task),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RegistryError(
            f"{model.id}: the verifying process had not ended after {timeout_s:g} s; nothing was "
            "changed: raise the time, or look at the machine's load"
        ) from None
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()][-_LAST_LINES:]
        how = (
            f"was killed by signal {-done.returncode}"
            if done.returncode < 0
            else f"failed with code {done.returncode}"
        )
        said = "\n".join(lines) or "it said nothing"
        raise RegistryError(
            f"{model.id} at {model.uri}: the verifying process {how}; nothing was changed\n{said}"
        )
