"""Evaluation over tar sets made here: layouts, scores, bad images, clear errors."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_ray.config import ModelConfig, TextConfig, VisionConfig
from clip_ray.errors import DataError
from clip_ray.eval.datasets import open_dataset
from clip_ray.eval.evaluate import evaluate
from clip_ray.eval.report import confusion_figure, loss_figure, similarity_figure, table
from clip_ray.inference import Encoder
from clip_ray.model import build
from clip_ray.registry import ExportInfo, write_export
from clip_ray.storage import open_store
from clip_ray.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
NAMES = ["red", "green", "blue"]
TINY = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2),
    text=TextConfig(context_length=12, vocab_size=514, width=32, layers=1, heads=2),
)


def picture(color: int) -> bytes:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :, color] = 255
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pairs(start: int, stop: int, cls: bool = True, txt: bool = True) -> dict[str, bytes]:
    files = {}
    for i in range(start, stop):
        files[f"s{i:04d}.png"] = picture(i % 3)
        if cls:
            files[f"s{i:04d}.cls"] = str(i % 3).encode()
        if txt:
            files[f"s{i:04d}.txt"] = f"{NAMES[i % 3]}\n{NAMES[i % 3]} thing\n".encode()
    return files


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "colors"
    bad = {"bad.png": b"no image", "bad.cls": b"0"}
    write_tar(folder / "test" / "0.tar", pairs(0, 6) | bad)
    write_tar(folder / "test" / "1.tar", pairs(6, 9))
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n{c} thing\n")
    return folder


class Colors(Encoder):
    """Sees an image's colour and reads a text's, so that all scores are known."""

    def encode_pixels(self, pixels):
        return np.eye(3, dtype=np.float32)[pixels.mean(axis=(2, 3)).argmax(axis=1)]

    def encode_texts(self, texts):
        return np.stack([np.eye(3, dtype=np.float32)[NAMES.index(t.split()[0])] for t in texts])


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(["a cat"], 514, 12)


@pytest.fixture
def colors(tokenizer):
    return Colors(build(TINY, seed=0), tokenizer, ExportInfo(), device="cpu")


def test_scores_are_the_known_ones(dataset, colors):
    seen = []
    result = evaluate(colors, str(dataset), batch=4, progress=seen.append)
    assert sum(seen) == 10 and max(seen) <= 4
    assert result.samples == 9 and result.skipped == {"not-an-image": 1}
    metrics = result.metrics
    assert metrics["zero_shot.top1"] == metrics["zero_shot.mean_per_class"] == 1
    assert metrics["zero_shot.chance_top1"] == pytest.approx(1 / 3)
    assert metrics["zero_shot.top5"] == metrics["zero_shot.chance_top5"] == 1
    assert np.array_equal(result.confusion, 3 * np.eye(3))
    # Three images share each colour: a caption's own image is first with probability 1/3.
    assert metrics["retrieval.text_to_image.r1"] == pytest.approx(1 / 3)
    assert metrics["retrieval.text_to_image.r5"] == pytest.approx(1)
    # Six captions share each colour, two are the image's own.
    assert metrics["retrieval.image_to_text.r1"] == pytest.approx(1 / 3)
    assert metrics["retrieval.image_to_text.r5"] == pytest.approx(1)
    assert result.similarity.shape == (9, 9) and np.all(np.diag(result.similarity) == 1)
    assert set(result.to_dict()) == set(metrics) | {"samples", "skipped"}


def test_limit(dataset, colors):
    assert evaluate(colors, str(dataset), limit=3).samples == 3


def test_flat_layout_without_captions(tmp_path, colors):
    write_tar(tmp_path / "test-0000.tar", pairs(0, 3, txt=False))
    write_tar(tmp_path / "test-0001.tar", pairs(3, 6, txt=False))
    (tmp_path / "nshards-test.txt").write_text("2")
    (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
    # The default templates begin with "a": Colors reads the first word.
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{}")
    result = evaluate(colors, str(tmp_path))
    assert result.samples == 6 and result.metrics["zero_shot.top1"] == 1
    assert not any(key.startswith("retrieval") for key in result.metrics)


def test_retrieval_alone(tmp_path, colors):
    write_tar(tmp_path / "test" / "0.tar", pairs(0, 3, cls=False))
    (tmp_path / "test" / "nshards.txt").write_text("1")
    metrics = evaluate(colors, str(tmp_path)).metrics
    assert metrics["retrieval.text_to_image.r1"] == 1
    assert not any(key.startswith("zero_shot") for key in metrics)


def test_on_s3(s3, dataset, colors):
    store = open_store("s3://bucket/eval/colors", s3)
    for path in dataset.rglob("*.*"):
        store.write(str(path.relative_to(dataset)), path.read_bytes())
    result = evaluate(colors, store.uri, s3=s3)
    assert result.to_dict() == evaluate(colors, str(dataset)).to_dict()


def test_errors_name_what_is_missing(dataset, colors, tmp_path):
    with pytest.raises(DataError, match=r"nothing: neither test/nshards\.txt"):
        open_dataset(str(tmp_path / "nothing"))
    names = (dataset / "classnames.txt").read_text()
    (dataset / "classnames.txt").write_text("red\n")
    with pytest.raises(DataError, match=r"0\.tar: s0001\.cls is 1, but .* has 1 classes"):
        evaluate(colors, str(dataset))
    (dataset / "classnames.txt").write_text(names)
    (dataset / "test" / "nshards.txt").write_text("3")
    with pytest.raises(DataError, match=r"test/2\.tar: does not exist"):
        evaluate(colors, str(dataset))
    (dataset / "test" / "nshards.txt").write_text("x")
    with pytest.raises(DataError, match="expected the number of shards"):
        evaluate(colors, str(dataset))
    (dataset / "test" / "nshards.txt").write_text("1")
    shard = dataset / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"0\.tar: truncated"):
        evaluate(colors, str(dataset))
    write_tar(shard, pairs(0, 3, txt=False))
    (dataset / "classnames.txt").unlink()
    with pytest.raises(DataError, match=r"samples have \.cls, but classnames\.txt is missing"):
        evaluate(colors, str(dataset))
    write_tar(shard, {"a.png": b"x", "a.cls": b"0"})
    with pytest.raises(DataError, match=r"no usable image .*not-an-image"):
        evaluate(colors, str(dataset))


def test_report():
    result = {"zero_shot.top1": 0.5, "samples": 4, "skipped": {"corrupt": 2}}
    assert table({"colors": result}) == (
        "colors: 4 samples, skipped: 2 corrupt\n  zero_shot.top1    50.00%"
    )
    records = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": float("nan")}, {"step": 2, "loss": 2}]
    for data in (
        similarity_figure(np.eye(4, dtype=np.float32), list("abcd"), ["$" * 50] * 4),
        confusion_figure(np.eye(3, dtype=np.int64), ["a", "$b", "c"]),
        loss_figure(records),
    ):
        image = Image.open(io.BytesIO(data))
        assert image.format == "PNG" and np.asarray(image).std() > 0


def job(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *arguments],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=120,
    )  # fmt: skip


def test_evaluate_job(dataset, tmp_path, tokenizer):
    run = tmp_path / "run"
    digest = write_export(open_store(run / "export"), build(TINY, seed=0), tokenizer, {})
    done = job(
        "--model", str(run), "--dataset", str(dataset), "--json", "out.json", cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "colors: 9 samples, skipped: 1 not-an-image" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["digest"] == digest
    assert 0 <= found["evaluation"]["colors"]["zero_shot.top1"] <= 1
    failed = job("--model", str(run), "--dataset", "nowhere", cwd=tmp_path)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("evaluate: ")
