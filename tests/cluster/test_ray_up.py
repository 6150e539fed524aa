"""The files of `ray up`: Ray's schema and defaults take them, and their nodes meet the command."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
import ray
import yaml
from ray._private.label_utils import validate_node_labels
from ray.autoscaler._private.util import prepare_config, validate_config

from clip_ray.config.load import load_config
from clip_ray.runtime.cluster import deal_streams, missing_readers, share_of

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster/ray-up"
CLOUDS = ("aws", "gcp")


def read(cloud: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())
    return config


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config as `ray up` sees it, with the cloud's defaults; raises as `ray up` does."""
    full: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_takes_it_and_adds_no_node_type(cloud: str):
    full = prepared(read(cloud))
    assert set(full["available_node_types"]) == {"head", "gpu", "gpu_spot", "decode"}
    assert full["provider"]["type"] == cloud


def without_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "heads"


def unknown(config: dict[str, Any]) -> None:
    config["max_worker"] = 3


def unknown_in_type(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["min_worker"] = 3


def half_a_gpu(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["resources"]["GPU"] = 0.5


def too_many(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["min_workers"] = 99


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (without_head, ValueError),
        (unknown, jsonschema.ValidationError),
        (unknown_in_type, jsonschema.ValidationError),
        (half_a_gpu, jsonschema.ValidationError),
        (too_many, ValueError),
    ],
)
@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_refuses_what_is_wrong(
    cloud: str, spoil: Callable[[dict[str, Any]], None], error: type[Exception]
):
    config = read(cloud)
    spoil(config)
    with pytest.raises(error):
        prepared(config)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nodes_are_labelled_and_only_gpu_types_have_gpus(cloud: str):
    types = read(cloud)["available_node_types"]
    for node in types.values():
        validate_node_labels(node.get("labels", {}))
    gpus = {name: node["resources"].get("GPU", 0) for name, node in types.items()}
    assert gpus == {"head": 0, "gpu": 8, "gpu_spot": 8, "decode": 0}
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["decode"]["labels"] == {"clip-ray/role": "decode"}


def test_spot_nodes_are_the_same_machines_at_the_clouds_mercy():
    market = {"InstanceMarketOptions": {"MarketType": "spot"}}
    aws = read("aws")["available_node_types"]
    assert aws["gpu_spot"]["node_config"] == aws["gpu"]["node_config"] | market
    gcp = read("gcp")["available_node_types"]
    assert gcp["gpu_spot"]["node_config"]["scheduling"]["preemptible"] is True
    assert "preemptible" not in gcp["gpu"]["node_config"]["scheduling"]
    assert gcp["gpu_spot"]["node_config"]["machineType"] == gcp["gpu"]["node_config"]["machineType"]


def command(cloud: str) -> list[str]:
    """Return the words of the job in the file's head."""
    lines = (FOLDER / f"{cloud}.yaml").read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if "ray job submit" in line)
    taken = []
    for line in lines[start:]:
        taken.append(line.lstrip("# ").rstrip("\\"))
        if not line.endswith("\\"):
            break
    words = shlex.split(" ".join(taken))
    return words[words.index("--") + 1 :]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_nodes_kept_meet_the_command_in_the_head_of_the_file(cloud: str):
    python, script, *argv = command(cloud)
    assert python == "python"
    home = "/home/ubuntu/clip-ray"
    assert (ROOT / script.removeprefix(f"{home}/")).is_file()
    argv = [word.replace(home, str(ROOT)) for word in argv]
    config = load_config(argv, default_recipe=None, program=script)

    def least(*names: str) -> dict[str, float]:
        types = [read(cloud)["available_node_types"][name] for name in names]
        return {
            key: sum(node["min_workers"] * node["resources"].get(key, 0) for node in types)
            for key in ("CPU", "GPU")
        }

    share, problem = share_of(least("gpu", "decode"), [], config.cluster, wants_gpu=True)
    assert share is not None, problem
    assert share.num_workers == least("gpu")["GPU"]
    assert share_of(least("decode"), [], config.cluster, wants_gpu=True)[0] is None
    # Images are decoded on the decode nodes alone, and the run waits for all that are kept.
    nodes = [
        {"NodeID": f"{name}-{n}", "Alive": True, "Resources": node["resources"],
         "Labels": node.get("labels", {})}
        for name, node in read(cloud)["available_node_types"].items()
        for n in range(node["min_workers"] if name != "head" else 1)
    ]  # fmt: skip
    assert missing_readers(share, config.cluster, nodes) == ""
    fewer = [node for node in nodes if node["NodeID"] != "decode-1"]
    assert "clip-ray/role=decode" in missing_readers(share, config.cluster, fewer)
    assert deal_streams(share, config.cluster, nodes).stream_cpus == 60


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_spot_variant_is_a_range_down_to_one_node(cloud: str):
    text = (FOLDER / f"{cloud}.yaml").read_text()
    (variant,) = re.findall(r'--cluster\.num_workers "(\[[^]]*\])"', text)
    types = read(cloud)["available_node_types"]
    argv = ["--cluster.num_workers", variant, "--train.steps", "1"]
    counts = load_config(argv, default_recipe=None, program="x").cluster.worker_counts
    assert counts[0] == types["gpu_spot"]["resources"]["GPU"]
    assert counts[-1] == 2 * counts[0] <= types["gpu_spot"]["max_workers"] * counts[0]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_what_is_copied_is_there_and_what_is_run_is_shell(cloud: str):
    config = read(cloud)
    own = {remote: local for remote, local in config["file_mounts"].items() if local[0] != "~"}
    assert len(own) == 7
    for local in own.values():
        assert (ROOT / local).exists(), local
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for line in config[key]:
            subprocess.run(["bash", "-n"], input=line.encode(), check=True, timeout=30)
    # The line that lists the dependencies does, on this machine's copy.
    (install,) = (line for line in config["setup_commands"] if "tomllib" in line)
    code = re.search(r'python -c "(.*?)"', install)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert "ray[train,serve,data]==2.60.*\n" in done.stdout
    for name in ("constraints.txt", "requirements.txt", "pyproject.toml"):
        assert name in install
        assert f"~/clip-ray/{name}" in own


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_is_started_with_flags_that_it_has_a_token_and_no_open_dashboard(cloud: str):
    from ray.scripts.scripts import cli

    config = read(cloud)
    known = {option for p in cli.commands["start"].params for option in p.opts}
    head, worker = config["head_start_ray_commands"][1], config["worker_start_ray_commands"][1]
    for line in (head, worker):
        flags = set(re.findall(r"--[a-z-]+", line.split("ray start", 1)[1]))
        assert flags <= known, flags - known
    assert "--dashboard-host=127.0.0.1" in head
    assert "RAY_JOB_STOP_WAIT_TIME_S=300" in head
    assert any("RAY_AUTH_MODE=token" in line for line in config["setup_commands"])
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_roles_name_the_bucket_and_the_cluster_of_the_file():
    text = (FOLDER / "aws.yaml").read_text()
    bucket = json.loads((FOLDER / "aws-s3-policy.json").read_text())
    resources = {statement["Resource"] for statement in bucket["Statement"]}
    assert all(resource.startswith("arn:aws:s3:::my-bucket") for resource in resources)
    assert "s3://my-bucket/clip-ray/runs" in text
    (writes,) = (s for s in bucket["Statement"] if "s3:PutObject" in s["Action"])
    assert writes["Resource"] == "arn:aws:s3:::my-bucket/clip-ray/*"
    head = json.loads((FOLDER / "aws-head-policy.json").read_text())
    (ends,) = (s for s in head["Statement"] if "ec2:TerminateInstances" in s["Action"])
    assert ends["Condition"] == {
        "StringEquals": {"aws:ResourceTag/ray-cluster-name": read("aws")["cluster_name"]}
    }
    profiles = {
        node["node_config"]["IamInstanceProfile"]["Name"]
        for node in read("aws")["available_node_types"].values()
    }
    assert profiles == {"clip-ray-head", "clip-ray-worker"}


def test_google_nodes_that_touch_data_have_our_account_and_the_page_names_its_role():
    config, text = read("gcp"), (FOLDER / "gcp.yaml").read_text()
    project = config["provider"]["project_id"]
    types = config["available_node_types"]
    for name in ("gpu", "gpu_spot", "decode"):
        (account,) = types[name]["node_config"]["serviceAccounts"]
        assert account["email"] == f"clip-ray@{project}.iam.gserviceaccount.com"
        assert account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"]
    # Ray gives the head the account that it makes itself.
    assert "serviceAccounts" not in types["head"]["node_config"]
    # Read, not imported: that module needs Google's client.
    source = (Path(ray.__file__).parent / "autoscaler/_private/gcp/config.py").read_text()
    assert 'VERSION = "v1"' in source and 'RAY = "ray-autoscaler"' in source
    assert 'DEFAULT_SERVICE_ACCOUNT_ID = RAY + "-sa-" + VERSION' in source
    assert "ray-autoscaler-sa-v1" in text
    assert "roles/storage.objectViewer" in text and "-o ro" in "".join(config["setup_commands"])


class Metadata(BaseHTTPRequestHandler):
    """Stands in for a cloud's metadata service, which gives notice at the third look."""

    looks: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        self.answer(200, b"token" if self.path == "/latest/api/token" else b"?")

    def do_GET(self) -> None:
        self.looks.append(self.path)
        told = len(self.looks) >= 3
        if self.path == "/latest/meta-data/spot/instance-action":
            right = self.headers["X-aws-ec2-metadata-token"] == "token"
            self.answer(200 if told and right else 404, b"{}")
        elif self.path == "/computeMetadata/v1/instance/preempted":
            assert self.headers["Metadata-Flavor"] == "Google"
            self.answer(200, b"TRUE" if told else b"FALSE")
        else:
            self.answer(404, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("flock")), reason="curl and flock are Linux nodes'"
)
@pytest.mark.parametrize(("cloud", "seconds"), [("aws", "100"), ("gcp", "25")])
def test_a_spot_machine_is_announced_once_the_cloud_says_so(
    cloud: str, seconds: str, tmp_path: Path
):
    from ray.scripts.scripts import cli

    Metadata.looks.clear()
    (tmp_path / "ray").write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" > {tmp_path}/told\n")
    (tmp_path / "ray").chmod(0o755)
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    clean = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env = clean | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    try:
        script = ["bash", str(FOLDER / "spot-notice.sh"), cloud, "10.0.0.1:6379", url, "0.05"]
        done = subprocess.run(script, env=env, timeout=60, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert len(Metadata.looks) == 3 and "announced" in done.stdout
    command, *words = (tmp_path / "told").read_text().splitlines()
    told = dict(zip(words[::2], words[1::2], strict=True))
    assert command == "drain-node" and told["--address"] == "10.0.0.1:6379"
    assert told["--deadline-remaining-seconds"] == seconds
    options = {option: p for p in cli.commands[command].params for option in p.opts}
    assert set(told) <= set(options)
    assert told["--reason"] in options["--reason"].type.choices
    for line in read(cloud)["worker_start_ray_commands"]:
        if "spot-notice" in line:
            assert f"spot-notice.sh {cloud} $RAY_HEAD_IP:6379" in line and line.endswith("&")
            break
    else:
        raise AssertionError("no node is watched")
