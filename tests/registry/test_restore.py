"""The restore drill: MLflow's store is lost, wholly or in part, and the exports are there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clip_ray.config import ModelConfig, S3Options, TextConfig, VisionConfig
from clip_ray.errors import RegistryError
from clip_ray.model import build
from clip_ray.registry import aliased, load_export, move_alias, promote, register, resolve
from clip_ray.registry import write_export as write
from clip_ray.registry.restore import restore
from clip_ray.storage import open_store
from clip_ray.tokenizer import Tokenizer
from clip_ray.tracking import mlflow_client

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2),
    text=TextConfig(context_length=12, vocab_size=514, width=32, layers=1, heads=2),
)


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def uri(storage: Path) -> str:
    return f"sqlite:///{storage}/mlflow.db"


def trained(storage: Path, run: str, seed: int = 0) -> dict[str, Any]:
    """Do as the end of a training: export, register with its tags, sum up."""
    client = mlflow_client(uri(storage))
    home = client.get_experiment_by_name("clip-ray")
    home_id = (
        home.experiment_id
        if home
        else client.create_experiment("clip-ray", f"{storage}/mlartifacts")
    )
    run_id = client.create_run(home_id).info.run_id
    store = open_store(storage / run / "export")
    tokenizer = Tokenizer.train(["a cat", "a dog"], 514, TINY.text.context_length)
    extra = {"run": run, "run_id": run_id, "step": 7, "plan_digest": "ab" * 32}
    digest = write(store, build(TINY, seed=seed), tokenizer, extra)
    version = register(store, "clip", run_id, {"step": "7", "run": run}, uri(storage))
    summary = {"status": "finished", "steps": 7, "digest": digest}
    (storage / run / "summary.json").write_text(json.dumps(summary))
    return {"run_id": run_id, "digest": digest, "version": version}


def lose(storage: Path) -> Path:
    """Return a copy of a storage with its runs and nothing of MLflow's.

    At another place: this process holds the old database open, and would go on to see it.
    """
    new = storage.with_name("restored")
    for run in ("one", "two"):
        shutil.copytree(storage / run, new / run)
    return new


def tags(storage: Path, version: str) -> dict[str, str]:
    return dict(mlflow_client(uri(storage)).get_model_version("clip", version).tags)


def drill(storage: Path, *flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs/register.py"), "--model", "clip", *flags]
    return subprocess.run(
        [*command, "--storage", str(storage)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_the_drill_everything_of_mlflow_is_lost(storage: Path, tmp_path: Path) -> None:
    one, two = trained(storage, "one", seed=1), trained(storage, "two", seed=2)
    move_alias("clip", two["version"], two["digest"], uri(storage))
    before = tags(storage, one["version"])
    storage = lose(storage)

    for number, run in enumerate(("one", "two"), 1):  # as cluster/BACKUP.md says: oldest first
        done = drill(storage, "--from", str(storage / run), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"clip version {number} registered" in done.stdout
    again = drill(storage, "--from", str(storage / "one/export"), cwd=tmp_path)
    assert "clip version 1 was registered already" in again.stdout

    after = tags(storage, "1")
    assert after.keys() == before.keys()
    assert {k for k in after if after[k] != before[k]} == {"run_id"}  # that run is lost
    made = mlflow_client(uri(storage)).get_run(after["run_id"])
    assert made.data.tags["clip_ray.restored.run_id"] == one["run_id"]
    assert made.info.status == "FINISHED"
    # Exactly the export, byte for byte, and it can be promoted; the alias is not restored.
    found = resolve("models:/clip/2", uri(storage))
    assert load_export(found.store)[2].digest == two["digest"] == found.digest
    assert aliased("clip", tracking_uri=uri(storage)) is None
    assert promote("clip", "2", uri(storage)).version == "2"
    assert not (tmp_path / "mlruns").exists()  # nothing beside the storage


def test_a_backup_that_lacks_the_last_model(storage: Path) -> None:
    trained(storage, "one", seed=1)
    shutil.copy(storage / "mlflow.db", storage / "backup.db")
    two = trained(storage, "two", seed=2)
    storage = lose(storage)
    shutil.copy(storage.parent / "runs/backup.db", storage / "mlflow.db")
    done = restore(str(storage / "two"), "clip", storage=str(storage))
    assert (done.version, done.how) == ("2", "registered")
    assert tags(storage, "2")["digest"] == two["digest"]


def test_the_database_is_there_and_the_files_are_not(storage: Path) -> None:
    one = trained(storage, "one")
    with pytest.raises(RegistryError):
        shutil.rmtree(storage / "mlartifacts")
        promote("clip", one["version"], uri(storage))
    done = restore(str(storage / "one"), "clip", storage=str(storage))
    assert done.how == "was registered, its files were restored" and done.version == "1"
    assert tags(storage, "1")["run_id"] == one["run_id"]
    assert promote("clip", "1", uri(storage)).digest == one["digest"]


def test_the_run_is_there_and_the_version_is_not(storage: Path) -> None:
    one = trained(storage, "one")
    before = tags(storage, "1")
    mlflow_client(uri(storage)).delete_registered_model("clip")
    restore(str(storage / "one"), "clip", storage=str(storage))
    assert tags(storage, "1") == before and before["run_id"] == one["run_id"]


def test_a_damaged_export_does_not_become_a_version(storage: Path) -> None:
    trained(storage, "one")
    mlflow_client(uri(storage)).delete_registered_model("clip")
    tokenizer = storage / "one/export/preprocessing.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")  # loads, and is another model
    for given in (str(storage / "one"), str(storage / "one/export/")):
        with pytest.raises(RegistryError, match="is not the expected"):
            restore(given, "clip", storage=str(storage))
    (storage / "one/summary.json").unlink()  # without it nothing says what it was
    with pytest.raises(RegistryError, match="is not the expected"):
        restore(str(storage / "one"), "clip", storage=str(storage), digest="0" * 64)
    assert restore(str(storage / "one"), "clip", storage=str(storage)).how == "registered"


def test_a_name_in_mlflow_is_no_directory(storage: Path) -> None:
    with pytest.raises(RegistryError, match="give the directory of an export"):
        restore("models:/clip/1", "clip", storage=str(storage))


def test_from_s3(storage: Path, s3: S3Options, tmp_path: Path) -> None:
    one = trained(storage, "one")
    bucket = open_store(f"s3://bucket/{tmp_path.name}/one", s3)
    for file in open_store(storage / "one").files():
        bucket.write(file, (storage / "one" / file).read_bytes())
    done = restore(bucket.uri, "clip", storage=str(tmp_path / "new"), s3=s3)
    assert (done.how, done.digest) == ("registered", one["digest"])
    found = resolve("models:/clip/1", uri(tmp_path / "new"))
    assert load_export(found.store)[2].digest == one["digest"]
