"""`jobs/plan.py` from outside the repository, and what its report says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from clip_ray.config.load import load_config
from clip_ray.errors import ConfigError
from clip_ray.sizing import Answer, Question, answer, report
from clip_ray.sizing.calibration import SPREAD
from clip_ray.sizing.gpus import GPUS

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "jobs/configs/vit-b-32-laion400m.yaml")


def run(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/plan.py"), *arguments],
        # No path of ours: the job finds its package itself.
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_job_from_anywhere(tmp_path: Path) -> None:
    done = run(
        tmp_path, "--model", "ViT-L-14", "--gpus", "64xH100", "--samples", "12.8e9",
        "--price_per_gpu_hour", "2", "--json", "plan.json",
    )  # fmt: skip
    assert done.stderr == ""
    shown = ("427.6 M", "64 x H100", "32,768 = 512 a GPU", "gradient all-reduce", "1.2 ms")
    for words in (*shown, "12,800,000,000 samples", "days", "cost ", "to run it:"):
        assert words in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    plan = written["plan"]
    assert plan["steps"] == 390_625 and plan["gpus"] == 64 and written["warnings"] == []
    assert plan["memory"]["needed"] < plan["memory"]["available"] == 80e9
    assert plan["cost"] == pytest.approx(2 * 64 * plan["hours"])
    assert written["command"] in done.stdout


def test_an_error_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = run(tmp_path, "--gpus", "8xTPU", "--samples", "1e9", code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: --gpus 8xTPU: ") and done.stderr.count("\n") == 1
    assert "H100" in done.stderr


def test_help_explains_each_flag(tmp_path: Path) -> None:
    text = run(tmp_path, "--help").stdout
    own = [f"--{field.name}" for field in fields(Question)]
    for flag in (*own, "--json", "--anchors", "--types"):
        assert re.search(rf"^  {flag}( [A-Z_]+)?\s+\S", text, re.MULTILINE), flag
    assert "default" in text and "--section.key" in text


def test_tables(tmp_path: Path) -> None:
    anchors = run(tmp_path, "--anchors").stdout
    assert anchors == report.anchor_table() + "\n"
    assert "NeMo g/14" in anchors and f"factor of {SPREAD:g}" in anchors
    assert all(name in report.gpu_table() for name in GPUS)


def asked(*settings: str, gpus: str = "64xH100", **flags) -> Answer:
    return answer(Question(gpus=gpus, **flags), settings)


def command_config(command: str):
    """Return the config that the printed command would train."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["ray", "job", "submit"] and words[8:10] == ["python", "jobs/pretrain.py"]
    return load_config(words[10:], default_recipe=None, program="")


def test_the_command_trains_what_was_planned() -> None:
    answered = asked(model="ViT-L-14", samples=12.8e9)
    config = command_config(answered.command)
    assert config.model.name == "ViT-L-14" and config.cluster.num_workers == 64
    assert config.train.samples == 12_800_000_000 and config.train.global_batch == 32768
    assert config.train.precision == "bf16" and config.train.device == "cuda"
    assert answered.plan.batch.micro_batches > 1
    assert config.train.micro_batch == answered.plan.batch.micro_batch
    assert config.data.sources[0].path == "s3://BUCKET/SHARDS"


def test_a_recipe_and_overrides() -> None:
    answered = asked(
        "--config", RECIPE, "--train.global_batch=8192", "--train.grad_checkpointing", "true",
        gpus="16xA100-80", samples=1e9,
    )  # fmt: skip
    assert (answered.plan.model, answered.plan.gpus, answered.plan.nodes) == ("ViT-B-32", 16, 2)
    assert answered.plan.global_batch == 8192 and answered.plan.steps == 122_071
    config = command_config(answered.command)
    assert config.train.global_batch == 8192 and config.train.grad_checkpointing
    assert config.cluster.num_workers == 16  # not the recipe's 64
    assert config.data.sources[0].path.startswith("s3://bucket/laion400m")
    assert config.checkpoint.every_steps == 500
    assert "BUCKET" not in answered.command


def test_a_recipe_in_passes_needs_samples() -> None:
    with pytest.raises(ConfigError, match="train.passes 32.*--samples"):
        asked("--config", RECIPE)


def test_no_length_is_assumed() -> None:
    with pytest.raises(ConfigError, match="how long"):
        asked()
    assert asked("--train.steps", "10").plan.steps == 10


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"samples": -1.0}, "--samples -1: expected a number above 0"),
        ({"samples": float("nan")}, "--samples nan"),
        ({"utilization": 35.0}, "expected a share of the peak"),
        ({"decode_ms": 0.0}, "--decode_ms 0"),
        ({"gpus_per_node": 0}, "--gpus_per_node 0"),
        ({"price_per_gpu_hour": 1.0, "price_per_node_hour": 8.0}, "not both"),
        ({"model": "ViT-L-13"}, "no architecture is called 'ViT-L-13'; nearest: ViT-L-14"),
        ({"gpus": None}, "give --gpus"),
    ],
)
def test_flags_that_cannot_be_used(flags: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        asked(**{"samples": 1e9, **flags})


def test_an_unknown_setting_names_its_nearest() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch"):
        asked("--train.globalbatch", "5", samples=1e9)


def test_machines_and_prices() -> None:
    answered = asked(
        gpus="10xA100-40", samples=1e8, gpus_per_node=4, cpus_per_node=32, memory_per_node=256.0,
        network_gbit=100.0, price_per_node_hour=12.0,
    )  # fmt: skip
    assert answered.plan.nodes == 3 and answered.plan.speed.data_cpus == 3 * 32 - 10
    assert answered.plan.node.available == 256e9
    assert answered.plan.cost == pytest.approx(3 * 12 * answered.plan.hours)  # whole machines
    assert "AWS p4d.24xlarge, changed" in answered.text


def test_a_given_utilization_has_no_band() -> None:
    assert " to " in asked(samples=1e9).text.split("time ")[1].split(";")[0]
    text = asked(samples=1e9, utilization=0.4).text
    assert (
        " to " not in text.split("time ")[1].split(";")[0] and "40.0% of the peak, as given" in text
    )


def test_the_band_is_of_the_gpus_alone() -> None:
    """Where decoding sets the pace, faster GPUs would change nothing."""
    text = asked("--cluster.data_cpus", "4", samples=1e9).text
    assert re.search(r"time +3\.5 days; ", text)  # 1e9 images of 1.2 ms on 4 CPUs
    text = asked("--cluster.data_cpus", "64", samples=12.8e9, model="ViT-L-14").text
    days, low, high = map(
        float, re.search(r"([\d.]+) days \(([\d.]+) to ([\d.]+)\)", text).groups()
    )
    assert high / days == pytest.approx(SPREAD, rel=0.02)
    assert days / low == pytest.approx(SPREAD, rel=0.02)


def test_warnings_are_printed() -> None:
    answered = asked(gpus="64xH100", samples=1e9, decode_ms=100.0)
    assert any("decode-bound" in line for line in answered.warnings)
    assert all(f"WARNING {line}" in answered.text for line in answered.warnings)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--json .*cannot write"):
        report.write(str(tmp_path / "none" / "plan.json"), asked(samples=1e9))


def test_the_readme_shows_what_is_printed() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "jobs/plan.py --model ViT-L-14 --gpus 64xH100 --samples 12.8e9\n" in readme
    assert asked(model="ViT-L-14", samples=12.8e9).text in readme


def test_the_job_is_thin() -> None:
    assert len((ROOT / "jobs/plan.py").read_text().splitlines()) < 60
