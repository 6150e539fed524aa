"""Exports and model versions: what is loaded is what was registered, or nothing is."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_ray.config import ModelConfig, TextConfig, VisionConfig
from clip_ray.errors import RegistryError
from clip_ray.inference import Encoder
from clip_ray.model import build
from clip_ray.registry import (
    aliased,
    latest_version,
    load_export,
    model_digest,
    move_alias,
    promote,
    register,
    resolve,
    store_model,
    write_export,
)
from clip_ray.storage import open_store
from clip_ray.tokenizer import Tokenizer
from clip_ray.tracking import mlflow_client

ROOT = Path(__file__).parents[1]
TINY = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2),
    text=TextConfig(context_length=12, vocab_size=514, width=32, layers=1, heads=2),
)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(["a cat", "a dog"], 514, TINY.text.context_length)


@pytest.fixture
def export(tmp_path, tokenizer):
    store = open_store(tmp_path / "runs" / "r" / "export")
    write_export(store, build(TINY, seed=0), tokenizer, {"run_id": "abc", "step": 7})
    return store


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_uri(tmp_path, empty_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir(exist_ok=True)
    shutil.copy(empty_database, tmp_path / "runs" / "mlflow.db")
    return f"sqlite:///{tmp_path}/runs/mlflow.db"


@pytest.fixture
def run_id(mlflow_uri, tmp_path):
    client = mlflow_client(mlflow_uri)
    experiment = client.create_experiment("e", f"{tmp_path}/runs/mlartifacts")
    return client.create_run(experiment).info.run_id


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_digest_by_hand(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    for name, content in {
        "tokenizer.json": b"t", "model.safetensors": b"mm", "config.json": b"",
        "preprocessing.json": b"ppp",
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    # $ printf mm | sha256sum, and so on
    lines = (
        "config.json, 0, e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n"
        "model.safetensors, 2, " + hashlib.sha256(b"mm").hexdigest() + "\n"
        "preprocessing.json, 3, " + hashlib.sha256(b"ppp").hexdigest() + "\n"
        "tokenizer.json, 1, " + hashlib.sha256(b"t").hexdigest() + "\n"
    )
    assert model_digest(open_store(folder)) == hashlib.sha256(lines.encode()).hexdigest()


def test_export_and_back(tmp_path, tokenizer):
    model = build(TINY, seed=0)
    store = open_store(tmp_path / "export")
    digest = write_export(store, model, tokenizer, {"run_id": "abc", "step": 7})
    assert digest == model_digest(store)
    assert store.files() == [
        "config.json", "model.safetensors", "preprocessing.json", "tokenizer.json",
    ]  # fmt: skip
    loaded, loaded_tokenizer, info = load_export(store, digest)
    assert (info.digest, info.run_id, info.extra["step"]) == (digest, "abc", 7)
    for (name, a), (_, b) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert loaded.config == TINY and not loaded.training
    assert np.array_equal(loaded_tokenizer(["a cat"])[0], tokenizer(["a cat"])[0])
    # The same model gives the same bytes; half precision is exported as fp32.
    again = open_store(tmp_path / "again")
    assert write_export(again, model, tokenizer, {"run_id": "abc", "step": 7}) == digest
    assert write_export(again, loaded, loaded_tokenizer, {"run_id": "abc", "step": 7}) == digest


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "preprocessing.json"]
)
def test_a_changed_byte_is_refused(export, name):
    digest = model_digest(export)
    flip(export.root / name)
    with pytest.raises(RegistryError, match=f"not the expected {digest}"):
        load_export(export, digest)


def test_what_is_not_an_export_is_refused(export):
    with pytest.raises(RegistryError, match=r"'?format'? ?.*up to 1; update"):
        config = json.loads(export.read("config.json"))
        export.write("config.json", json.dumps({**config, "format": 2}).encode())
        load_export(export)
    export.write("config.json", json.dumps({**config, "model": {"embed_dim": 8}}).encode())
    with pytest.raises(RegistryError):
        load_export(export)
    export.write("config.json", json.dumps(config).encode())
    load_export(export)
    export.write("MLmodel", b"")
    with pytest.raises(RegistryError, match=r"holds MLmodel"):
        model_digest(export)
    export.delete("MLmodel")
    export.delete("tokenizer.json")
    with pytest.raises(RegistryError, match=r"tokenizer\.json missing"):
        load_export(export)


def test_resolve_directories(export, tmp_path):
    assert resolve(export.root).store.uri == export.uri
    assert resolve(export.root.parent).store.uri == export.uri
    with pytest.raises(RegistryError, match="no model there"):
        resolve(tmp_path / "nothing")
    unfinished = tmp_path / "runs" / "u"
    (unfinished / "checkpoints" / "step-00000001.a0").mkdir(parents=True)
    with pytest.raises(RegistryError, match="a run without export/"):
        resolve(unfinished)


def test_register_resolve_and_promote(export, mlflow_uri, run_id, tokenizer):
    digest = model_digest(export)
    assert register(export, "clip", run_id, {"top1": "0.5"}, mlflow_uri) == "1"
    # Registering the same bytes again gives the same version.
    assert register(export, "clip", run_id, {}, mlflow_uri) == "1"
    found = resolve("models:/clip/1", mlflow_uri)
    assert (found.digest, found.name, found.version, found.run_id) == (digest, "clip", "1", run_id)
    assert found.store.files() == export.files()
    version = mlflow_client(mlflow_uri).get_model_version("clip", "1")
    assert version.tags == {
        "digest": digest, "embed_dim": "16", "step": "7", "run_id": run_id, "top1": "0.5",
    }  # fmt: skip
    # The run is extended and exports again: version 1 keeps its bytes.
    write_export(export, build(TINY, seed=1), tokenizer, {"run_id": "abc", "step": 9})
    assert register(export, "clip", run_id, {}, mlflow_uri) == "2"
    assert model_digest(resolve("models:/clip/1", mlflow_uri).store) == digest
    assert resolve(f"runs:/{run_id}", mlflow_uri).digest == model_digest(export)
    assert latest_version("clip", mlflow_uri) == "2"

    with pytest.raises(RegistryError, match="aliases: none"):
        resolve("models:/clip@champion", mlflow_uri)
    assert promote("clip", "1", mlflow_uri).previous is None
    done = promote("clip", "2", mlflow_uri)
    assert (done.version, done.previous, done.digest) == ("2", "1", model_digest(export))
    assert resolve("models:/clip@champion", mlflow_uri).version == "2"
    assert resolve("models:/clip@previous", mlflow_uri).version == "1"
    promote("clip", "2", mlflow_uri)  # changes nothing
    assert resolve("models:/clip@previous", mlflow_uri).version == "1"
    promote("clip", "1", mlflow_uri)  # the way back
    assert resolve("models:/clip@champion", mlflow_uri).version == "1"
    tags = mlflow_client(mlflow_uri).get_model_version("clip", "1").tags
    assert (tags["promoted.from"], tags["promoted.to"]) == ("2", "1")
    assert tags["promoted.by"] and tags["promoted.at"]

    encoder = Encoder.load("models:/clip@champion", "cpu", mlflow_uri)
    assert (encoder.version, encoder.digest, encoder.run_id) == ("1", digest, run_id)


def test_the_alias_moves_by_itself_and_only_to_what_was_verified(
    export, mlflow_uri, run_id, tokenizer
):
    first = model_digest(export)
    register(export, "clip", run_id, {}, mlflow_uri)
    second = write_export(export, build(TINY, seed=1), tokenizer, {})
    register(export, "clip", run_id, {}, mlflow_uri)
    assert aliased("clip", tracking_uri=mlflow_uri) is None
    move_alias("clip", "1", first, mlflow_uri)
    with pytest.raises(RegistryError, match="registered with digest .*was not moved"):
        move_alias("clip", "2", first, mlflow_uri)
    with pytest.raises(RegistryError, match="clip has versions 1, 2"):
        move_alias("clip", "7", first, mlflow_uri)
    assert aliased("clip", tracking_uri=mlflow_uri) == ("1", first)
    done = move_alias("clip", "2", second, mlflow_uri, {"target": "serve"}, by="ci")
    assert (done.version, done.previous) == ("2", "1")
    assert aliased("clip", tracking_uri=mlflow_uri) == ("2", second)
    assert aliased("clip", "previous", mlflow_uri) == ("1", first)
    tags = mlflow_client(mlflow_uri).get_model_version("clip", "2").tags
    assert {key: tags[f"promoted.{key}"] for key in ("by", "from", "to", "target")} == {
        "by": "ci", "from": "1", "to": "2", "target": "serve",
    }  # fmt: skip


def test_a_version_is_stored_for_serving(export, mlflow_uri, run_id, tokenizer, tmp_path):
    digest = model_digest(export)
    register(export, "clip", run_id, {}, mlflow_uri)
    promote("clip", "1", mlflow_uri)
    models = tmp_path / "models"
    stored = store_model("models:/clip@champion", models, tracking_uri=mlflow_uri)
    assert (stored.id, stored.digest, stored.run_id) == ("clip/1", digest, run_id)
    assert stored.uri == str(models / digest) and model_digest(open_store(stored.uri)) == digest
    by_run = store_model(f"runs:/{run_id}", models, tracking_uri=mlflow_uri)
    assert by_run.id == f"run-{run_id[:8]}/{digest[:12]}" and by_run.uri == stored.uri
    with pytest.raises(RegistryError, match="registered as clip, and cannot be called other"):
        store_model("models:/clip/1", models, tracking_uri=mlflow_uri, name="other")
    # The tag counts, not what lies at the artifact's place by now.
    flip(Path(resolve("models:/clip/1", mlflow_uri).store.uri) / "tokenizer.json")
    with pytest.raises(RegistryError, match=f"is not the registered {digest}"):
        store_model("models:/clip/1", models, tracking_uri=mlflow_uri)


def test_a_damaged_version_is_not_promoted(export, mlflow_uri, run_id):
    register(export, "clip", run_id, {}, mlflow_uri)
    flip(Path(resolve("models:/clip/1", mlflow_uri).store.uri) / "model.safetensors")
    with pytest.raises(RegistryError, match="is not the expected"):
        promote("clip", "1", mlflow_uri)
    with pytest.raises(RegistryError, match="aliases: none"):
        resolve("models:/clip@champion", mlflow_uri)


def test_a_model_that_gives_nan_is_not_promoted(export, mlflow_uri, run_id, tokenizer):
    model = build(TINY, seed=0)
    with torch.no_grad():
        model.visual.proj.fill_(float("nan"))
    write_export(export, model, tokenizer, {})
    register(export, "clip", run_id, {}, mlflow_uri)
    with pytest.raises(RegistryError, match="image features have norm nan"):
        promote("clip", "1", mlflow_uri)


def test_errors_say_what_exists(export, mlflow_uri, run_id):
    with pytest.raises(RegistryError, match="registered models: none yet"):
        resolve("models:/clip/1", mlflow_uri)
    register(export, "clip-small", run_id, {}, mlflow_uri)
    mlflow_client(mlflow_uri).create_registered_model("other")
    mlflow_client(mlflow_uri).create_model_version("other", "s3://b/x")
    with pytest.raises(RegistryError, match="registered models: clip-small"):
        resolve("models:/clip-smal/1", mlflow_uri)
    with pytest.raises(RegistryError, match="clip-small has versions 1; aliases: none"):
        resolve("models:/clip-small/2", mlflow_uri)
    with pytest.raises(RegistryError, match="no version in MLflow"):
        latest_version("clip", mlflow_uri)
    with pytest.raises(RegistryError, match="no tag 'digest'"):
        resolve("models:/other/1", mlflow_uri)
    with pytest.raises(RegistryError, match="has no run"):
        resolve("runs:/" + "0" * 32, mlflow_uri)
    for bad in ("models:/clip", "models:/clip/x", "models:/clip@", "models:/"):
        with pytest.raises(RegistryError, match="expected models:/<name>/<version>"):
            resolve(bad, mlflow_uri)


def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match="MLflow at http://127.0.0.1:9"):
        resolve("models:/clip/1", "http://127.0.0.1:9")


def test_exports_on_s3(s3, tokenizer, mlflow_uri, run_id):
    store = open_store("s3://bucket/registry/export", s3)
    digest = write_export(store, build(TINY, seed=0), tokenizer, {})
    assert model_digest(store) == digest
    assert load_export(store, digest)[2].digest == digest
    assert register(store, "clip", run_id, {}, mlflow_uri) == "1"


def promote_job(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "promote.py"), *arguments],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=120,
    )  # fmt: skip


def test_promote_job(export, mlflow_uri, run_id, tmp_path):
    register(export, "clip", run_id, {}, mlflow_uri)
    done = promote_job("--model", "clip", cwd=tmp_path)  # runs/mlflow.db is the default
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "version 1" in done.stdout and model_digest(export) in done.stdout
    failed = promote_job("--model", "clap", "--storage", str(tmp_path / "runs"), cwd=ROOT)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert "registered models: clip" in failed.stderr


@pytest.mark.slow
def test_through_a_real_server(export, mlflow_uri, tmp_path, monkeypatch):
    for name in ("TIMEOUT", "MAX_RETRIES"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
         "--backend-store-uri", mlflow_uri, "--artifacts-destination", str(tmp_path / "served")],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 180
        while True:
            try:
                assert urllib.request.urlopen(f"{uri}/health", timeout=2).status == 200
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.2)
        client = mlflow_client(uri)
        run = client.create_run(client.create_experiment("served")).info
        assert run.artifact_uri.startswith("mlflow-artifacts:/")
        assert register(export, "clip", run.run_id, {}, uri) == "1"
        assert register(export, "clip", run.run_id, {}, uri) == "1"
        assert promote("clip", "1", uri).digest == model_digest(export)
        for name in ("models:/clip@champion", "models:/clip/1", f"runs:/{run.run_id}"):
            assert Encoder.load(name, "cpu", uri).digest == model_digest(export)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
