"""Owners of a declarative config: only the target changes, everything else byte for byte."""

from __future__ import annotations

import difflib
import json
import os
import stat
from pathlib import Path

import pytest
import yaml

from clip_ray.errors import ClusterError, ConfigError
from clip_ray.registry import ServedModel, Target
from clip_ray.runtime.owner import RayService, read_config, read_file, replace_target, write_file


def model(version: int) -> ServedModel:
    digest = f"{version}" * 64
    return ServedModel(name="clip", version=str(version), uri=f"s3://b/{digest}", digest=digest)


OLD = Target(**model(1).model_dump())
NEW = Target(**model(2).model_dump(), previous=model(1))

SERVE = f"""\
# A config with everything that people write.
proxy_location: EveryNode   # HAProxy

applications:
  # somebody else's, first
  - name: other
    import_path: a:b
    args: {{x: [1, 2],   y: "z"}}
  - name: clip
    import_path: serve.app:build
    args: {{}}
    deployments:
      - name: clip
        user_config:   # the model
          name: clip
          version: '1'
          uri: s3://b/{"1" * 64}
          digest: "{"1" * 64}"   # do not touch

        # how many
        num_replicas: 2
    route_prefix: "/"
target_capacity:   100.0
"""
FLOW = SERVE.replace(
    SERVE[SERVE.index("user_config:") : SERVE.index("\n\n        # how many")],
    f"user_config: {{name: clip, version: '1', uri: 's3://b/{'1' * 64}', digest: '{'1' * 64}'}}",
)
LAST = f"""\
applications:
- name: clip
  import_path: serve.app:build
  deployments:
  - num_replicas: 1
    name: clip
    user_config:
      digest: '{"1" * 64}'
      name: clip
      version: '1'
      previous: null
      uri: s3://b/{"1" * 64}"""


def manifest(config: str) -> str:
    block = "".join("    " + line if line.strip() else line for line in config.splitlines(True))
    return f"""\
apiVersion: v1
kind: ConfigMap
metadata: {{name: x}}
---
apiVersion: ray.io/v1
kind: RayService
metadata:
  name: clip   # the service
spec:
  serveConfigV2: |
{block.rstrip()}

  rayClusterConfig:
    # kept
    rayVersion: "2.60.0"
"""


TEXTS = {"serve": SERVE, "flow": FLOW, "last": LAST, "rayservice": manifest(SERVE)}


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", TEXTS)
def test_the_target_is_replaced_and_nothing_else(kind, ends):
    text = TEXTS[kind].replace("\n", ends)
    changed = replace_target(text, "clip", NEW, "FILE")
    config = read_config(changed, "FILE")
    assert config["applications"][-1]["deployments"][0]["user_config"] == NEW.model_dump()
    # Line by line: what is gone was the old target, what is new is the new one.
    old, new = text.split(ends), changed.split(ends)
    touched = [
        line[2:].strip() for line in difflib.ndiff(old, new) if line[0] in "+-" and line[2:].strip()
    ]
    words = ("name:", "version:", "uri:", "digest:", "run_id:", "format:", "previous:", "user_conf")
    assert touched and all(line.startswith(words) for line in touched)
    assert changed.count("\r") == (changed.count("\n") if ends == "\r\n" else 0)
    # And back again: not one other byte.
    again = replace_target(changed, None, OLD, "FILE")
    assert replace_target(again, None, NEW, "FILE") == changed


def test_comments_around_and_behind_stay():
    changed = replace_target(SERVE, None, NEW, "FILE")
    for comment in ("# A config", "# HAProxy", "# somebody", "# the model", "# do not", "# how"):
        assert comment in changed
    assert changed.split("user_config:")[0] == SERVE.split("user_config:")[0]
    assert changed.split("# how many")[1] == SERVE.split("# how many")[1]


@pytest.mark.parametrize(
    ("text", "app", "message"),
    [
        ("a: 1", None, "expected a Serve config .applications: ....* or a RayService"),
        ("a: [", None, "not YAML"),
        ("a: 2026-13-45", None, "not YAML"),
        ("null\n---\na: 1", None, "expected a Serve config"),
        ("applications: [1]", None, "expected a Serve config"),
        ("applications: [{name: [a]}]", None, "expected a Serve config"),
        ("applications: [{name: a, deployments: {}}]", None, "applications there: a"),
        ("applications: [{name: a, deployments: [{user_config: {}}]}]", None, "expected a Serve"),
        ("applications: [{name: a, import_path: b:c}]", None, "applications there: a"),
        (SERVE, "birds", "expected an application birds .*applications there: other, clip"),
        (SERVE.replace("s3://b/", "models:/clip@champion/"), None, "resolve it with"),
        (manifest(SERVE).replace("V2: |", "V2: >"), None, "must be a literal block|not YAML"),
        (
            SERVE.replace("user_config:   # the model", "user_config: &m").replace(
                "target_capacity:   100.0", "again: *m"
            ),
            None,
            "cannot be replaced in place|not YAML",
        ),
        (
            f"m: &m {{name: clip, version: '1', uri: /x, digest: '{'1' * 64}'}}\n"
            "applications:\n- name: clip\n  import_path: a:b\n  deployments:\n"
            "  - {name: clip, user_config: *m}\n",
            None,
            "a YAML alias",
        ),
    ],
)
def test_what_cannot_be_changed_in_place_is_told(text, app, message):
    with pytest.raises(ConfigError, match=f"^(FILE|application clip): .*({message})"):
        replace_target(text, app, NEW, "FILE")


def test_two_applications_with_models_must_be_told_apart():
    text = SERVE + SERVE[SERVE.index("  - name: clip") : SERVE.index("target_cap")]
    text = text.replace("target_capacity:   100.0\n", "").replace(
        "name: clip\n    imp", "name: A\n    imp", 1
    )
    with pytest.raises(ConfigError, match="several applications serve models .A, clip"):
        replace_target(text, None, NEW, "FILE")
    changed = read_config(replace_target(text, "A", NEW, "FILE"), "FILE")
    versions = {
        app["name"]: app["deployments"][0]["user_config"]["version"]
        for app in changed["applications"][1:]
    }
    assert versions == {"A": "2", "clip": "1"}


def test_a_file_is_replaced_whole_and_keeps_its_permissions(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("a: 1\r\n", newline="")
    path.chmod(0o640)
    write_file(path, read_file(path).replace("1", "2"))
    assert path.read_bytes() == b"a: 2\r\n" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["serve.yaml"]
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot read it"):
        read_file(tmp_path / "nowhere.yaml")


def test_a_link_to_a_file_stays_one(tmp_path):
    """As ConfigMaps and checkouts of configurations have them."""
    (tmp_path / "real").mkdir()
    path, link = tmp_path / "real" / "serve.yaml", tmp_path / "serve.yaml"
    path.write_text("a: 1\n")
    link.symlink_to("real/serve.yaml")
    write_file(link, "a: 2\n")
    assert link.is_symlink() and path.read_text() == "a: 2\n"
    assert os.listdir(tmp_path / "real") == ["serve.yaml"]


FAKE_KUBECTL = """\
#!/bin/sh
# A kubectl that knows one RayService, kept in a file.
echo "$@" >> "$FAKE/calls"
case "$1" in
  get) cat "$FAKE/object.json" || { echo "not found" >&2; exit 1; } ;;
  patch) cat > "$FAKE/patch.json"; [ ! -e "$FAKE/conflict" ] || { echo "Conflict" >&2; exit 1; } ;;
esac
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch) -> Path:
    tool = tmp_path / "kubectl"
    tool.write_text(FAKE_KUBECTL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    service = yaml.safe_load(manifest(SERVE).split("---\n")[1])
    service["metadata"]["resourceVersion"] = "17"
    (tmp_path / "object.json").write_text(json.dumps(service))
    return tmp_path


def test_a_rayservice_is_patched_and_only_its_serve_config(kubectl):
    service = RayService("prod/clip")
    text, version = service.read()
    changed = replace_target(text, None, NEW, service.where)
    service.write(changed, version)
    patch = json.loads((kubectl / "patch.json").read_text())
    assert patch == {"spec": {"serveConfigV2": changed}, "metadata": {"resourceVersion": "17"}}
    assert "# somebody else's, first" in changed
    calls = (kubectl / "calls").read_text().splitlines()
    assert calls[0] == "get rayservice clip --output json --namespace prod"
    assert calls[1].startswith("patch rayservice clip --type merge --patch-file /dev/stdin")


def test_what_kubectl_says_is_passed_on(kubectl):
    (kubectl / "conflict").touch()
    with pytest.raises(ClusterError, match="RayService clip: kubectl patch: Conflict"):
        RayService("clip").write("x", "17")
    (kubectl / "object.json").write_text('{"spec": {}}')
    with pytest.raises(ConfigError, match="has no spec.serveConfigV2"):
        RayService("clip").read()
    (kubectl / "object.json").unlink()
    with pytest.raises(ClusterError, match="not found"):
        RayService("clip").read()


def test_without_kubectl(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="kubectl is not on PATH"):
        RayService("clip").read()
