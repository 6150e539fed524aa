"""The Slurm script: Ray and the job take its words; it stops a run and queues the job again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_ray.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster/slurm/pretrain.sbatch"
WAIT_S = 30
# In the place of Slurm: one node, and the words of each call written down.
SRUN = """#!/bin/bash
while [ "$1" != ray ]; do shift; done
exec "$@"
"""
RAY = """#!/bin/bash
printf '%s\\n' "$@" >"$TOLD/ray"
cp "$RAY_AUTH_TOKEN_PATH" "$TOLD/token"
stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$TOLD/mode"
while [ "$1" != -- ]; do shift; done
shift
"$@"
"""
PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then exec "$REAL_PYTHON" "$@"; fi
printf '%s\\n' "$@" >"$TOLD/job"
trap 'echo TERM >"$TOLD/signal"; exit 143' TERM
touch "$TOLD/started"
for _ in $(seq 300); do [ -e "$TOLD/finish" ] && exit "$(cat "$TOLD/finish")"; sleep 0.1; done
"""
SCONTROL = """#!/bin/bash
echo "$@" >"$TOLD/scontrol"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a job whose commands are stand-ins; TOLD is what they wrote."""
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    (tmp_path / "told").mkdir()
    stands = {"srun": SRUN, "ray": RAY, "python": PYTHON, "scontrol": SCONTROL}
    for name, text in (stands | {"hostname": "#!/bin/bash\necho '127.0.1.1 10.0.0.5 '\n"}).items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return os.environ | {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_GPUS_ON_NODE": "8",
        "TOLD": str(tmp_path / "told"),
        "REAL_PYTHON": sys.executable,
    }


def start(slurm: dict[str, str]) -> subprocess.Popen[bytes]:
    recipe = str(ROOT / "jobs/configs/vit-b-32-laion400m.yaml")
    job = subprocess.Popen(["bash", str(SCRIPT), "--config", recipe], env=slurm)
    deadline = time.monotonic() + WAIT_S
    while not (Path(slurm["TOLD"]) / "started").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    return job


def test_it_is_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=WAIT_S)
    broken = SCRIPT.read_text().replace("\nfi\n", "\n")
    done = subprocess.run(
        ["bash", "-n"], input=broken.encode(), capture_output=True, timeout=WAIT_S
    )
    assert done.returncode != 0


def shellcheck(script: Path) -> str:
    """Return what it says of a script."""
    # Of the test extra: it does not depend on the machine.
    command = [str(Path(sys.executable).with_name("shellcheck")), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode == 0) == (done.stdout == ""), done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "script",
    [
        "cluster/slurm/pretrain.sbatch",
        "cluster/ray-up/spot-notice.sh",
        ".ci/run",
        ".ci/make-venv.sh",
        ".ci/side-by-side.sh",
    ],
)
def test_shellcheck_has_nothing_to_say(script: str):
    assert shellcheck(ROOT / script) == ""


def test_shellcheck_sees_a_word_that_would_split(tmp_path: Path):
    changed = SCRIPT.read_text().replace('mkdir -p "$state"', "mkdir -p $state")
    assert changed != SCRIPT.read_text()
    (tmp_path / "script").write_text(changed)
    assert "SC2086" in shellcheck(tmp_path / "script")


def test_ray_and_the_job_take_the_words(slurm: dict[str, str]):
    from ray.scripts.scripts import cli

    job = start(slurm)
    told = Path(slurm["TOLD"])
    (told / "finish").write_text("0")
    assert job.wait(WAIT_S) == 0
    command, *words = (told / "ray").read_text().splitlines()
    known = {option for parameter in cli.commands[command].params for option in parameter.opts}
    start_options = {option for p in cli.commands["start"].params for option in p.opts}
    split = words.index("--")
    flags = [word for word in words[:split] if word.startswith("--")]
    assert {"--address", "--min-nodes"} <= set(flags)
    for flag in flags:
        assert flag in known | start_options, f"ray {command} takes no {flag}"
    # symmetric-run sets these itself, and refuses them.
    assert not {"--head", "--node-ip-address", "--port", "--block"} & set(flags)
    assert words[words.index("--address") + 1] == "10.0.0.5:6379"
    # Dashboard and job API stay where Ray puts them by itself: on loopback.
    (host,) = (p for p in cli.commands["start"].params if "--dashboard-host" in p.opts)
    assert host.default in ("127.0.0.1", "localhost") and not set(host.opts) & set(flags)
    script, *argv = (told / "job").read_text().splitlines()
    assert script == "jobs/pretrain.py"
    config = load_config(argv, default_recipe=None, program=script)
    assert config.cluster.num_workers == 16
    assert config.cluster.address == "10.0.0.5:6379"
    assert len((told / "token").read_text().strip()) == 64
    assert (told / "mode").read_text() == "600\n"
    assert not list(told.parent.glob(".slurm-*")), "the token outlives the job"
    assert not (told / "scontrol").exists()


def test_before_the_time_limit_the_run_is_told_and_the_job_queues_again(slurm: dict[str, str]):
    job = start(slurm)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(WAIT_S) == 143
    told = Path(slurm["TOLD"])
    assert (told / "signal").read_text() == "TERM\n"
    assert (told / "scontrol").read_text() == "requeue 77\n"


def test_a_failed_run_does_not_queue_again(slurm: dict[str, str]):
    job = start(slurm)
    told = Path(slurm["TOLD"])
    (told / "finish").write_text("2")
    assert job.wait(WAIT_S) == 2
    assert not (told / "scontrol").exists()
