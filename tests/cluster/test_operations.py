"""The pages for operators: what they say to type works, and what they promise is so."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from clip_ray.config import ModelConfig, TextConfig, VisionConfig
from clip_ray.model import build
from clip_ray.registry import Target, aliased, resolve, write_export
from clip_ray.runtime.owner import read_config, replace_target
from clip_ray.storage import open_store
from clip_ray.tokenizer import Tokenizer
from tests.cluster.manifests import KUBERAY, ROOT, faults, manifests, named, pods, ray_spec

CLUSTER = ROOT / "cluster"
TINY = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2),
    text=TextConfig(context_length=12, vocab_size=514, width=32, layers=1, heads=2),
)
_UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", str(text)).groups()
    return float(number) * _UNITS[unit]


def blocks(page: str, kind: str) -> list[str]:
    """Return the fenced blocks of a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", (CLUSTER / page).read_text(), re.M | re.S)


# ---------------------------------------------------------------------- the restore drill


@pytest.mark.slow
def test_the_drill_as_the_page_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    digests = []
    for age, name in ((200, "one"), (100, "two")):
        store = open_store(tmp_path / "runs" / name / "export")
        tokenizer = Tokenizer.train(["a cat", "a dog"], 514, TINY.text.context_length)
        extra = {"run": name, "run_id": "0" * 32, "step": age}
        digests.append(write_export(store, build(TINY, seed=age), tokenizer, extra))
        export = tmp_path / "runs" / name / "export"
        os.utime(export, (export.stat().st_atime, export.stat().st_mtime - age))
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    (script,) = blocks("BACKUP.md", "sh drill")
    done = subprocess.run(
        ["bash", "-eu", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "clip version 1 registered" in done.stdout
    assert "clip version 2 registered" in done.stdout
    assert digests[1][:12] in done.stdout.splitlines()[-1]
    where = f"sqlite:///{tmp_path}/drill/mlflow.db"
    assert aliased("clip", tracking_uri=where) == ("2", digests[1])
    assert resolve("models:/clip/1", where).digest == digests[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drill", "jobs", "runs"]


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="sqlite3 is not installed")
def test_a_backup_of_sqlite_is_taken_while_it_is_written(tmp_path: Path):
    import sqlite3

    (tmp_path / "runs").mkdir()
    writer = sqlite3.connect(tmp_path / "runs/mlflow.db")
    writer.execute("create table t (x)")
    writer.executemany("insert into t values (?)", [(i,) for i in range(1000)])
    writer.commit()
    writer.execute("insert into t values (1000)")  # not committed: in the middle of a write
    (line,) = [
        line
        for block in blocks("BACKUP.md", "sh")
        for line in block.splitlines()
        if "sqlite3" in line
    ]
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True, timeout=60)
    copy = sqlite3.connect(tmp_path / "backup.db")
    assert copy.execute("select count(*) from t").fetchone() == (1000,)
    writer.rollback()


# ---------------------------------------------------------------------- upgrades


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_a_new_image_comes_up_with_the_promoted_model(tmp_path: Path):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    file = tmp_path / "kuberay/serve/rayservice.yaml"
    target = Target(name="clip", version="7", uri="s3://my-bucket/m", digest="a" * 64)
    file.write_text(replace_target(file.read_text(), None, target, str(file)))
    settings = tmp_path / "kuberay/settings/kustomization.yaml"
    settings.write_text(settings.read_text().replace("newTag: cuda", "newTag: cuda-2"))
    done = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "kuberay/serve")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (service,) = (m for m in yaml.safe_load_all(done.stdout) if m["kind"] == "RayService")
    assert faults(service) == []
    images = {
        container["image"] for pod in pods(service) for container in pod["spec"]["containers"]
    }
    assert images == {"registry.example.com/clip-ray:cuda-2"}
    config = read_config(service["spec"]["serveConfigV2"], "rendered")
    (deployment,) = config["applications"][0]["deployments"]
    assert (deployment["user_config"]["version"], deployment["user_config"]["digest"]) == (
        "7",
        "a" * 64,
    )


def flags_of(script: str) -> str:
    """Return a script's help, and its subcommand's."""
    subcommand = ["create"] if script == "jobs/keys.py" else []
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *subcommand, "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    # `--config FILE` is no field, and --help lists fields.
    return done.stdout + (" --config" if script == "jobs/pretrain.py" else "")


def test_the_pages_name_flags_and_files_that_there_are():
    help_of: dict[str, str] = {}
    for page in ("UPGRADE.md", "BACKUP.md", "RUNBOOK.md", "SECURITY.md", "README.md"):
        text = (CLUSTER / page).read_text()
        for script, rest in re.findall(r"(jobs/\w+\.py)([^`\n#]*)", text):
            flags = re.findall(r"(?<!\S)(--[a-z][\w.-]*)", rest)
            assert (ROOT / script).is_file(), f"{page}: {script}"
            if flags and script not in help_of:
                help_of[script] = flags_of(script)
            for flag in flags:
                assert flag in help_of[script], f"{page}: {script} has no {flag}"
        for folder in re.findall(r"`(kuberay/[\w-]+)`", text):
            assert (CLUSTER / folder).is_dir(), f"{page}: {folder}"
        for link in re.findall(r"\]\((\w+\.md)\)", text):
            assert (CLUSTER / link).is_file(), f"{page}: {link}"
    assert {"jobs/register.py", "jobs/promote.py", "jobs/stop.py"} <= set(help_of)


# ---------------------------------------------------------------------- stopping


def test_a_job_has_time_to_commit_wherever_a_head_is_started():
    """Ray gives a stopped job 3 s by default."""
    heads = [ray_spec(m)["headGroupSpec"]["template"] for m in manifests() if "Ray" in m["kind"]]
    assert len(heads) == 3
    for head in heads:
        env = {e["name"]: e.get("value") for e in head["spec"]["containers"][0]["env"]}
        assert env["RAY_JOB_STOP_WAIT_TIME_S"] == "300"
    for cloud in ("aws", "gcp"):
        config = yaml.safe_load((CLUSTER / f"ray-up/{cloud}.yaml").read_text())
        assert any("RAY_JOB_STOP_WAIT_TIME_S=300 ray start --head" in line
                   for line in config["head_start_ray_commands"])  # fmt: skip
    lines = (CLUSTER / "slurm/pretrain.sbatch").read_text().splitlines()
    started = next(i for i, line in enumerate(lines) if "ray symmetric-run --address" in line)
    assert lines.index("export RAY_JOB_STOP_WAIT_TIME_S=300") < started
    assert '"RAY_JOB_STOP_WAIT_TIME_S": "60"' in (CLUSTER / "local.py").read_text()
    # That is Ray's own name for it.
    from ray.dashboard.modules.job import job_supervisor

    assert '"RAY_JOB_STOP_WAIT_TIME_S"' in Path(job_supervisor.__file__).read_text()


# ---------------------------------------------------------------------- quota and queue


def asked(container: dict[str, Any], count: float = 1) -> dict[str, float]:
    requests = container.get("resources", {}).get("requests", {})
    return {name: count * quantity(value) for name, value in requests.items()}


def total(parts: list[dict[str, float]]) -> dict[str, float]:
    names = {name for part in parts for name in part}
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def of_ray(manifest: dict[str, Any]) -> dict[str, float]:
    """Return what a cluster of KubeRay's takes at its largest."""
    spec = ray_spec(manifest)
    parts = [asked(c) for c in spec["headGroupSpec"]["template"]["spec"]["containers"]]
    if spec.get("enableInTreeAutoscaling"):
        parts.append(asked(spec["autoscalerOptions"]))
    for group in spec["workerGroupSpecs"]:
        for container in group["template"]["spec"]["containers"]:
            parts.append(asked(container, group["maxReplicas"]))
    return total(parts)


def test_the_quota_has_room_for_everything_and_serving_twice():
    parts = [of_ray(manifest) for manifest in manifests("pretrain", "dev", "serve", "serve")
             if manifest["kind"].startswith("Ray")]  # fmt: skip
    assert len(parts) == 4
    for manifest in manifests("companion", "serve"):
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            parts += [asked(c) for pod in pods(manifest) for c in pod["spec"]["containers"]]
    needed = total(parts)
    hard = named("ResourceQuota", "quota")["spec"]["hard"]
    for name in ("cpu", "memory", "nvidia.com/gpu"):
        given = quantity(hard[f"requests.{name}"])
        # Little more, too: a quota that nobody reaches bounds nothing.
        assert needed[name] <= given <= 1.3 * needed[name], (name, needed[name], given)
    disks = [
        quantity(claim["spec"]["resources"]["requests"]["storage"])
        for manifest in manifests()
        for claim in manifest.get("spec", {}).get("volumeClaimTemplates", [])
    ]
    assert len(disks) == 3 and sum(disks) <= quantity(hard["requests.storage"])


def rendered(folder: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERAY / folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_queued_job_fits_the_queue_that_admits_it():
    job, local = (
        next(m for m in rendered("pretrain-queued") if m["kind"] == kind)
        for kind in ("RayJob", "LocalQueue")
    )
    queue = named("ClusterQueue", "queue")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    settings = yaml.safe_load((KUBERAY / "settings/kustomization.yaml").read_text())
    for manifest in (job, local):
        assert manifest["metadata"]["namespace"] == settings["namespace"]
    (label,) = queue["spec"]["namespaceSelector"]["matchLabels"].items()
    assert label == ("kubernetes.io/metadata.name", settings["namespace"])
    # Kueue lifts it; and what grows by itself is not admitted as a whole.
    assert job["spec"]["suspend"] is True and job["spec"]["shutdownAfterJobFinishes"] is True
    spec = job["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is False and "autoscalerOptions" not in spec
    for group in spec["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    (group,) = queue["spec"]["resourceGroups"]
    flavors = {m["metadata"]["name"] for m in manifests("queue") if m["kind"] == "ResourceFlavor"}
    (flavor,) = group["flavors"]
    assert {flavor["name"]} == flavors
    quotas = {r["name"]: quantity(r["nominalQuota"]) for r in flavor["resources"]}
    needed = of_ray(job)
    assert set(group["coveredResources"]) == set(quotas) == set(needed)
    assert all(needed[name] <= quotas[name] for name in needed)
    # Without the patch it is the job of kuberay/pretrain.
    plain = next(m for m in rendered("pretrain") if m["kind"] == "RayJob")
    assert plain["spec"]["entrypoint"] == job["spec"]["entrypoint"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", ["quota", "queue", "pretrain-queued"])
def test_they_render_valid(folder: str):
    found = rendered(folder)
    assert found and [fault for manifest in found for fault in faults(manifest)] == []
    cluster_wide = {"ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass"}
    for manifest in found:
        assert ("namespace" in manifest["metadata"]) == (manifest["kind"] not in cluster_wide)


@pytest.mark.parametrize(
    ("kind", "folder", "change", "word"),
    [
        ("ResourceQuota", "quota", {"spec": {"hards": {}}}, "'hards' was unexpected"),
        ("ResourceQuota", "quota", {"spec": {"hard": {"pods": 3}}}, "is not of type 'string'"),
        ("ResourceQuota", "quota", {"spec": {"hard": {"cpu": "3 GB"}}}, "does not match"),
        ("LimitRange", "quota", {"spec": {"limits": [{"type": "Pods"}]}}, "is not one of"),
        ("ClusterQueue", "queue", {"apiVersion": "kueue.x-k8s.io/v1"}, "was expected"),
        ("ClusterQueue", "queue", {"spec": {}}, "is a required property"),
        ("LocalQueue", "pretrain-queued", {"spec": {"queue": "clip-ray"}}, "'queue' was unex"),
        ("WorkloadPriorityClass", "queue", {"value": "high"}, "is not of type 'integer'"),
        ("ResourceFlavor", "queue", {"spec": {"labels": {}}}, "'labels' was unexpected"),
    ],
)
def test_a_wrong_field_of_them_is_seen(kind: str, folder: str, change: dict, word: str):
    manifest = json.loads(json.dumps(named(kind, folder)))
    assert faults(manifest) == []
    assert any(word in fault for fault in faults(manifest | change)), faults(manifest | change)
