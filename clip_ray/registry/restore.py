"""Making a registry's entry anew from an export: after a loss of MLflow's store, or beside it.

What a backup of MLflow misses is not lost: exports lie in the runs' directories, and an entry is
an export with tags that follow from it. Curves are not rebuilt: they are in `metrics.jsonl`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clip_ray.config import S3Options
from clip_ray.errors import RegistryError
from clip_ray.registry.export import CONFIG, load_export, model_digest
from clip_ray.registry.versions import _explained, _found, _versions, register, resolve, upload
from clip_ray.storage import Store, open_store
from clip_ray.tracking import default_tracking_uri, mlflow_client, user

_DIGEST = "clip_ray.restored.digest"
How = Literal["registered", "was registered already", "was registered, its files were restored"]


@dataclass(frozen=True)
class Restored:
    """A version that holds an export, and what was done for it."""

    version: str
    digest: str
    how: How


def restore(
    uri: str,
    name: str,
    tracking_uri: str | None = None,
    storage: str = "runs",
    digest: str | None = None,
    experiment: str = "clip-ray",
    s3: S3Options | None = None,
) -> Restored:
    """Register an export as training does; the same one twice is one version.

    The version belongs to the MLflow run that made the export; where MLflow has that one no more,
    to a run that says so in its tags. A version whose files are lost or damaged gets them again.

    Args:
        uri: directory or s3:// prefix of an export, or of a run that holds one.
        name: registered model.
        tracking_uri: MLflow's address; none = MLFLOW_TRACKING_URI, else mlflow.db in `storage`,
            which is made where there is none.
        storage: directory of mlflow.db, and of the artefacts where no server places them.
        digest: refuse any other bytes; none = the one in the run's summary, if it is there.
        experiment: of the run that is made.
        s3: access to a prefix on s3://.

    Raises:
        RegistryError: no export there, a damaged one, or MLflow's refusal.
    """
    if uri.startswith(("models:", "runs:")):
        raise RegistryError(
            f"{uri}: a name in MLflow; give the directory of an export, such as "
            "runs/<run name>/export"
        )
    export = resolve(uri, s3=s3).store
    # Read whole, and built: a damaged backup is not to become a version.
    _, _, info = load_export(export, digest or _recorded_digest(uri, s3))
    assert info.digest is not None
    where = default_tracking_uri(tracking_uri, storage)
    with _explained(where):
        client = mlflow_client(where)
        for version in _versions(client, name):
            if version.tags.get("digest") == info.digest:
                return _whole(client, export, name, version, info.digest, where)
        run_id = _run_of(client, export, info.digest, where, storage, experiment)
    known: dict[str, str] = {
        key: str(info.extra[key]) for key in ("step", "run") if key in info.extra
    }
    version = register(export, name, run_id, known, where)
    return Restored(version, info.digest, "registered")


def _recorded_digest(uri: str, s3: S3Options | None) -> str | None:
    """Return what the run's summary says that the digest of its export is."""
    for folder in (uri, uri.rstrip("/").rpartition("/")[0]):
        if folder:
            store = open_store(folder, s3)
            if store.exists("summary.json"):
                recorded: str | None = json.loads(store.read("summary.json")).get("digest")
                return recorded
    return None


def _whole(
    client: Any, export: Store, name: str, version: Any, digest: str, where: str
) -> Restored:
    """Give a version that is there its files, where they are not what was registered."""
    number = str(version.version)
    try:
        found = resolve(f"models:/{name}/{number}", where)
        if model_digest(found.store) == digest:
            return Restored(number, digest, "was registered already")
    except (RegistryError, OSError):
        pass  # MLflow says in many ways that files are not there
    folder = str(version.source).rstrip("/").rpartition("/")[2]
    if _found(lambda: client.get_run(version.run_id)) is None:
        raise RegistryError(
            f"models:/{name}/{number}: its files are lost or damaged, and so is its run "
            f"{version.run_id}; delete the version and register the export again"
        )
    upload(client, export, version.run_id, folder)
    return Restored(number, digest, "was registered, its files were restored")


def _run_of(
    client: Any, export: Store, digest: str, where: str, storage: str, experiment: str
) -> str:
    """Return the MLflow run that an export belongs to: its own, else one made in its place."""
    config = json.loads(export.read(CONFIG))
    origin = config.get("run_id")
    run = _found(lambda: client.get_run(origin)) if origin else None
    if run is not None and run.info.lifecycle_stage == "active":
        return str(run.info.run_id)
    home = _experiment(client, where, storage, experiment)
    made = client.search_runs([home], f"tags.`{_DIGEST}` = '{digest}'", max_results=1)
    if made:  # an earlier call got so far and no further
        return str(made[0].info.run_id)
    tags = {
        _DIGEST: digest,
        "clip_ray.restored.run_id": origin or "",
        "clip_ray.restored.from": export.uri,
        "clip_ray.plan_digest": config.get("plan_digest", ""),
        "mlflow.source.name": "clip_ray",
        "mlflow.user": user(),
    }
    run = client.create_run(home, tags=tags, run_name=config.get("run"))
    client.set_terminated(run.info.run_id, "FINISHED")
    return str(run.info.run_id)


def _experiment(client: Any, where: str, storage: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # As training places them: MLflow's default without a server is below the current directory.
    server = where.startswith(("http://", "https://"))
    location = storage if "://" in storage else str(Path(storage).absolute())
    return str(client.create_experiment(name, None if server else f"{location}/mlartifacts"))
