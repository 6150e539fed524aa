"""What a replica serves: by value, copied once, loaded from its bytes, without MLflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from clip_ray.config import ModelConfig, S3Options, TextConfig, VisionConfig
from clip_ray.errors import RegistryError
from clip_ray.inference import Encoder
from clip_ray.model import build
from clip_ray.registry import (
    FILES,
    ExportInfo,
    ServedModel,
    Target,
    load_served,
    model_digest,
    served,
    store_model,
    verify_in_process,
    write_export,
)
from clip_ray.storage import LocalStore, S3Store, open_store
from clip_ray.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
FIXTURE = Path(__file__).parent / "fixtures" / "target-1.json"
TINY = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2),
    text=TextConfig(context_length=12, vocab_size=514, width=32, layers=1, heads=2),
)
TOKENIZER = Tokenizer.train(["a cat", "a dog"], 514, TINY.text.context_length)


def export(folder: Path, seed: int = 0) -> LocalStore:
    store = LocalStore(folder / "export")
    write_export(store, build(TINY, seed=seed), TOKENIZER, {"run_id": "abc"})
    return store


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's directory with an export."""
    return Path(export(tmp_path / "runs" / "first run").uri).parent


@pytest.fixture
def on_s3(s3, run, request) -> tuple[ServedModel, S3Options]:
    prefix = f"s3://bucket/{request.node.name.replace('[', '-').strip(']')}"
    return store_model(run, prefix, s3), s3


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------------- the schema


def test_format_1_is_read():
    target = Target.model_validate_json(FIXTURE.read_text())
    assert (target.id, target.format, target.run_id) == ("clip/3", 1, "0123456789abcdef" * 2)
    assert target.previous is not None and target.previous.id == "clip/2"
    assert target.model_dump(mode="json") == json.loads(FIXTURE.read_text())


GOOD = {"name": "clip", "version": "3", "uri": "/models/x", "digest": "0" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uri": "models:/clip@champion"}, "resolve it with jobs/deploy.py or jobs/promote.py"),
        ({"uri": "models:/clip/3"}, "resolve it with jobs/deploy.py or jobs/promote.py"),
        ({"uri": "runs:/abc"}, "resolve it with jobs/deploy.py or jobs/promote.py"),
        ({"uri": "models/x"}, "expected an absolute directory or s3://"),
        ({"uri": "file:///models/x"}, "expected an absolute directory or s3://"),
        ({"uri": "s3://me:secret@bucket/x"}, "holds credentials"),
        ({"digest": "0" * 63}, "digest"),
        ({"name": "clip@champion"}, "name"),
        ({"name": "clip/3"}, "name"),
        ({"version": ""}, "version"),
        ({"format": 2}, "format 2, this version reads up to 1; deploy the newer code"),
        ({"format": "1.5"}, "format"),
        ({"alias": "champion"}, "Extra inputs"),
        ({"previous": {**GOOD, "uri": "models:/clip@previous"}}, "resolve it with"),
    ],
)
def test_a_target_that_could_move_is_refused(change, message):
    Target.model_validate(GOOD)
    with pytest.raises(ValidationError, match=message):
        Target.model_validate({**GOOD, **change})


# ---------------------------------------------------------------------- store_model


def test_a_run_is_stored_and_loaded(run, tmp_path):
    stored = store_model(run, tmp_path / "models")
    digest = model_digest(open_store(run / "export"))
    assert stored == ServedModel(
        name="first-run", version=digest[:12], uri=str(tmp_path / "models" / digest),
        digest=digest, run_id="abc",
    )  # fmt: skip
    shutil.rmtree(run)
    model, tokenizer, info = load_served(stored, tmp_path / "cache")
    assert (info.name, info.version, info.run_id) == ("first-run", digest[:12], "abc")
    own = Encoder(build(TINY, seed=0), TOKENIZER, info, device="cpu").encode_texts(["a cat"])
    assert np.array_equal(
        Encoder(model, tokenizer, info, device="cpu").encode_texts(["a cat"]), own
    )
    assert not (tmp_path / "cache").exists()  # a directory is read in place


def test_storing_again_writes_nothing_and_mends_what_is_broken(run, tmp_path):
    stored = store_model(run, tmp_path / "models", name="clip")
    folder = Path(stored.uri)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert store_model(run / "export", tmp_path / "models", name="clip") == stored
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    # A writer that died, and a disk that did.
    (folder / "tokenizer.json").unlink()
    flip(folder / "model.safetensors")
    with pytest.raises(RegistryError, match="tokenizer.json missing"):
        load_served(stored, tmp_path)
    assert store_model(run, tmp_path / "models", name="clip") == stored
    load_served(stored, tmp_path)


def test_two_writers_at_once(run, tmp_path):
    gate = threading.Barrier(4)

    def write(_: int) -> ServedModel:
        gate.wait()
        return store_model(run, tmp_path / "models")

    with ThreadPoolExecutor(4) as pool:
        (stored,) = set(pool.map(write, range(4)))
    assert sorted(os.listdir(stored.uri)) == sorted(FILES)
    assert model_digest(open_store(stored.uri)) == stored.digest


def test_other_bytes_in_the_store_are_refused(run, tmp_path, monkeypatch):
    copy = LocalStore.download

    def torn(self: LocalStore, name: str, local: Path) -> None:
        copy(self, name, local)
        if name == "model.safetensors":
            flip(local)

    monkeypatch.setattr(LocalStore, "download", torn)
    with pytest.raises(RegistryError, match="the copied files do not have the digest"):
        store_model(run, tmp_path / "models")


def test_names_of_models_in_no_registry(run, tmp_path):
    models = tmp_path / "models"
    assert store_model(run / "export", models).name == "first-run"
    assert store_model(f"{run}/", models, name="my clip").id.startswith("my clip/")
    with pytest.raises(RegistryError, match="cannot be served as 'clip@new'.*without /, : and @"):
        store_model(run, models, name="clip@new")
    moved = run.rename(tmp_path / "…")
    assert store_model(moved, models).name == "model"


def test_errors_of_the_store_are_ours(run, tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(RegistryError, match="Not a directory|File exists"):
        store_model(run, tmp_path / "models")
    missing = ServedModel(**{**GOOD, "uri": str(tmp_path / "no")})
    with pytest.raises(RegistryError, match="not an export, config.json"):
        load_served(missing, tmp_path)


# ---------------------------------------------------------------------- loading from S3

CHILD = """
import json, sys, time
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlflow", "ray"):
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Block())
from clip_ray.config import S3Options
from clip_ray.inference import Encoder
from clip_ray.registry import ServedModel, load_served
from clip_ray.storage import S3Store

fetched = []
download = S3Store.download

def slow(self, name, local):
    fetched.append(name)
    time.sleep(0.2)
    download(self, name, local)

S3Store.download = slow
task = json.loads(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
model = ServedModel.model_validate(task["model"])
loaded = load_served(model, Path(task["cache"]), S3Options.model_validate(task["s3"]))
features = Encoder(*loaded, device="cpu").encode_texts(["a cat"])
print(json.dumps([fetched, loaded[2].digest, features.tolist()]), flush=True)
"""


def test_two_processes_download_once_and_need_no_mlflow(on_s3, tmp_path):
    stored, s3 = on_s3
    cache = tmp_path / "cache"
    task = {"model": stored.model_dump(), "s3": s3.model_dump(), "cache": str(cache)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(task)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        said = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    fetched, digests, features = zip(*(json.loads(text) for text in said), strict=True)
    assert sorted(fetched[0] + fetched[1]) == sorted(FILES)
    assert set(digests) == {stored.digest}
    own = Encoder(build(TINY, seed=0), TOKENIZER, ExportInfo(), device="cpu")
    for feature in features:
        np.testing.assert_allclose(feature, own.encode_texts(["a cat"]), atol=1e-6)
    assert sorted(os.listdir(cache)) == [stored.digest, f"{stored.digest}.lock"]


def test_a_damaged_cache_is_mended_and_a_damaged_store_refused(on_s3, tmp_path, monkeypatch):
    stored, s3 = on_s3
    load_served(stored, tmp_path, s3)
    folder = tmp_path / stored.digest
    flip(folder / "model.safetensors")
    # What a killed download left behind goes with the next one.
    (tmp_path / f".{stored.digest}.left").mkdir()
    assert load_served(stored, tmp_path, s3)[2].digest == stored.digest
    assert model_digest(open_store(folder)) == stored.digest
    assert not list(tmp_path.glob(".*"))

    store = open_store(stored.uri, s3)
    store.write("config.json", store.read("config.json") + b" ")
    load_served(stored, tmp_path, s3)  # the node's own copy is good
    shutil.rmtree(folder)
    with pytest.raises(RegistryError, match=f"is not the expected {stored.digest}"):
        load_served(stored, tmp_path, s3)
    assert not folder.exists() and not list(tmp_path.glob(".*"))
    store.delete("config.json")
    with pytest.raises(RegistryError, match="check the directory, or the S3 settings"):
        load_served(stored, tmp_path, s3)


def test_a_download_that_hangs_is_not_waited_for_for_ever(on_s3, tmp_path, monkeypatch):
    stored, s3 = on_s3
    inside, free = threading.Event(), threading.Event()

    def stuck(self: S3Store, name: str, local: Path) -> None:
        inside.set()
        free.wait(60)
        raise OSError("the network is gone")

    monkeypatch.setattr(S3Store, "download", stuck)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(load_served, stored, tmp_path, s3)
        assert inside.wait(60)
        with pytest.raises(RegistryError, match="locked by another process for 0 s"):
            with served._lock(tmp_path / f"{stored.digest}.lock", timeout_s=0.2):
                pass
        free.set()
        with pytest.raises(RegistryError, match="the network is gone"):
            first.result()


# ---------------------------------------------------------------------- a process of its own


def test_a_model_is_verified_in_a_process_of_its_own(on_s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # wherever it is started
    stored, s3 = on_s3
    target = Target(**stored.model_dump(), previous=stored)
    begin, ended = subprocess.run, []

    def run(*command, **options):
        done = begin(*command, **options)
        ended.append(done.returncode)
        return done

    monkeypatch.setattr(subprocess, "run", run)
    verify_in_process(target, s3, 300)
    assert ended == [0]


def test_a_bad_model_fails_there_and_says_why(run, tmp_path):
    model = build(TINY, seed=0)
    with torch.no_grad():
        model.visual.proj.fill_(float("nan"))
    write_export(LocalStore(run / "export"), model, TOKENIZER, {})
    stored = store_model(run, tmp_path / "models", name="clip")
    with pytest.raises(
        RegistryError, match=r"(?s)clip/.* failed with code 2.*features have norm n"
    ):
        verify_in_process(stored, None, 300)


def test_crashes_and_hangs_there_are_errors(run, tmp_path, monkeypatch):
    stored = store_model(run, tmp_path / "models", name="clip")
    crash = tmp_path / "crash"
    crash.write_text("#!/bin/sh\necho a last line\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    with pytest.raises(RegistryError, match="(?s)was killed by signal 11.*a last line"):
        verify_in_process(stored, None, 60)
    crash.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(RegistryError, match="had not ended after 0.3 s; nothing was changed"):
        verify_in_process(stored, None, 0.3)
