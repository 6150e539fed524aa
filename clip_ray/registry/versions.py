"""Model versions: how an export is named in MLflow, found there, and made the champion.

Serving does without this module: it is given a `clip_ray.registry.ServedModel`, resolved once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_ray.config import S3Options
from clip_ray.errors import ClipRayError, RegistryError
from clip_ray.registry.export import CONFIG, FILES, WEIGHTS, ExportInfo, load_export, model_digest
from clip_ray.registry.foreign import convert, is_foreign
from clip_ray.storage import LocalStore, Store, open_store
from clip_ray.tracking import mask, mlflow_client, patient_timeouts, require_tracking_uri, user

ALIAS, PREVIOUS = "champion", "previous"


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


def resolve(
    uri: str | os.PathLike[str], tracking_uri: str | None = None, s3: S3Options | None = None
) -> ResolvedModel:
    """Find the export that a name means; an alias is resolved here, once.

    A model in open_clip's or Hugging Face's layout is converted into a temporary export.

    Args:
        uri: directory or s3:// prefix of an export, of a run or of a foreign model,
            `runs:/<run id>`, `models:/<name>/<version>` or `models:/<name>@<alias>`.
        tracking_uri: MLflow's address for the last three; none = MLFLOW_TRACKING_URI, else
            runs/mlflow.db.
        s3: access to a prefix on s3://.

    Raises:
        RegistryError: nothing is there (the message lists what there is), or a foreign model
            that this model code cannot reproduce.
    """
    text = os.fspath(uri)
    if text.startswith("models:/"):
        return _resolve_version(text, tracking_uri)
    if text.startswith("runs:/"):
        return _resolve_run(text, tracking_uri)
    store = open_store(text, s3)
    if is_foreign(store):
        copy = tempfile.TemporaryDirectory(prefix="clip-ray-model-")
        converted = LocalStore(Path(copy.name))
        return ResolvedModel(converted, digest=convert(store, converted), _copy=copy)
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
        "directory, an export, a CLIP of open_clip or Hugging Face, runs:/<id>, "
        "models:/<name>/<version> or models:/<name>@<alias>"
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
    with _explained(where):
        client = mlflow_client(where)
        if _found(lambda: client.get_registered_model(name)) is None:
            _create_once(lambda: client.create_registered_model(name))
        for version in _versions(client, name):
            if version.tags.get("digest") == digest:
                return str(version.version)
        upload(client, export, run_id, folder)
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


def upload(client: Any, export: Store, run_id: str, folder: str) -> None:
    """Log an export's files to a run's artefacts, in a folder."""
    with contextlib.ExitStack() as stack:
        if isinstance(export, LocalStore):
            local = export.root
        else:
            local = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for file in FILES:
                export.download(file, local / file)
        client.log_artifacts(run_id, str(local), folder)


@dataclass(frozen=True)
class Promotion:
    """What `move_alias` did: `previous` is the version that `ALIAS` named before, or None."""

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
    """Verify a model version, then move the alias `champion` to it: both steps, no rollout.

    Raises:
        RegistryError: as `verify` and `move_alias`.
    """
    resolved = verify(name, version, tracking_uri)
    assert resolved.digest is not None and resolved.version is not None
    return move_alias(name, resolved.version, resolved.digest, tracking_uri)


def verify(name: str, version: str, tracking_uri: str | None = None) -> ResolvedModel:
    """Load a model version from its stored bytes and encode one text and one image.

    In this process: `verify_in_process` stands a crash.

    Raises:
        RegistryError: no such version, other bytes than registered, or non-finite features.
    """
    from clip_ray.registry.check import probe

    resolved = resolve(f"models:/{name}/{version}", tracking_uri)
    model, tokenizer, info = load_export(resolved.store, resolved.digest)
    probe(model, tokenizer, info, f"models:/{name}/{resolved.version}")
    return resolved


def move_alias(
    name: str,
    version: str,
    digest: str,
    tracking_uri: str | None = None,
    tags: Mapping[str, str] | None = None,
    by: str | None = None,
) -> Promotion:
    """Move the alias `champion` to a verified version, last of all.

    The version that was champion becomes `previous`; who, when, from and to are tags of the new
    one. Moving it to the champion again changes nothing.

    Args:
        name: registered model.
        version: its version.
        digest: of what was verified; the version must still be that.
        tracking_uri: as in `resolve`.
        tags: more tags of the version, written as promoted.<key>.
        by: who moves it; none = this process's user.

    Raises:
        RegistryError: no such version, or one with another digest.
    """
    where = require_tracking_uri(tracking_uri)
    with _explained(where):
        client = mlflow_client(where)
        found = _found(lambda: client.get_model_version(name, version))
        if found is None:
            what = _what_exists(client, name)
            raise RegistryError(f"models:/{name}/{version}: not in MLflow at {where}; {what}")
        if found.tags.get("digest") != digest:
            raise RegistryError(
                f"models:/{name}/{version}: registered with digest {found.tags.get('digest')}, "
                f"verified was {digest}; the alias {ALIAS} was not moved: promote the version again"
            )
        champion = _found(lambda: client.get_model_version_by_alias(name, ALIAS))
        before = None if champion is None else str(champion.version)
        if before == version:
            return Promotion(name, version, digest, before)
        if before is not None:
            client.set_registered_model_alias(name, PREVIOUS, before)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        changes = {**(tags or {}), "by": by or user(), "at": now, "from": before or "none"}
        for key, value in {**changes, "to": version}.items():
            client.set_model_version_tag(name, version, f"promoted.{key}", value)
        client.set_registered_model_alias(name, ALIAS, version)
    return Promotion(name, version, digest, before)


def aliased(
    name: str, alias: str = ALIAS, tracking_uri: str | None = None
) -> tuple[str, str | None] | None:
    """Return (version, digest) that an alias names, None where it is not set; fetches no model."""
    where = require_tracking_uri(tracking_uri)
    with _explained(where):
        client = mlflow_client(where)
        found = _found(lambda: client.get_model_version_by_alias(name, alias))
    return None if found is None else (str(found.version), found.tags.get("digest"))


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
