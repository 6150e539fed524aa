"""What owns a declarative config: a YAML file, or a RayService in Kubernetes.

Whoever applies the owner again must not bring an old model back, so a promotion writes the new
target there too. In a file everything but the `user_config` stays as it is, byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from clip_ray.errors import ClusterError, ConfigError
from clip_ray.registry import Target
from clip_ray.runtime.serving import Place, find_place, with_target

KUBECTL_S = 60
_RAY_SERVICE = "serveConfigV2"


def read_config(text: str, where: str) -> dict[str, Any]:
    """Return the declarative config that a YAML text holds, in a RayService or plainly.

    Raises:
        ConfigError: it holds none.
    """
    return _parse(text, where)[1]


def replace_target(text: str, app: str | None, target: Target, where: str) -> str:
    """Return a YAML text with the `user_config` of one deployment replaced, and no other byte.

    Args:
        text: a Serve config, or manifests of which one is a RayService with `serveConfigV2: |`.
        app: application; none = the only one that serves a model.
        target: what is to be served.
        where: names the text in errors.

    Raises:
        ConfigError: there is no such deployment, or its YAML cannot be changed in place.
    """
    node, config = _parse(text, where)
    place = find_place(config, app, where)
    if isinstance(node, yaml.ScalarNode):
        changed = _in_block(text, node, place, target, where)
    else:
        changed = _splice(text, node, place, target, where)
    # The proof: it reads back as what it was, with this target.
    if read_config(changed, where) != with_target(config, place, target):
        raise ConfigError(
            f"{where}: the user_config of application {place.app} cannot be replaced in place "
            "(is it a YAML alias, or part of one?); write it out there, and promote again"
        )
    return changed


def write_file(path: Path, text: str) -> None:
    """Replace a file's text: whole, or not at all; its permissions stay, and a link to it.

    Raises:
        ConfigError: it cannot be written.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write it: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path: Path) -> str:
    """Return a file's text, its line ends as they are.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with open(path, newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read it: {error}") from error


def _parse(text: str, where: str) -> tuple[yaml.Node, dict[str, Any]]:
    """Return the node that holds the declarative config, and the config."""
    try:
        nodes = yaml.compose_all(text, yaml.SafeLoader)
        for node, document in zip(nodes, yaml.safe_load_all(text), strict=True):
            if node is None or not isinstance(document, dict):
                continue
            if _is_config(document):
                return node, document
            inner = (document.get("spec") or {}).get(_RAY_SERVICE)
            if document.get("kind") == "RayService" and isinstance(inner, str):
                config = yaml.safe_load(inner)
                if _is_config(config):
                    return _child(_child(node, "spec"), _RAY_SERVICE), config
    # ValueError: a date that is none.
    except (yaml.YAMLError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: not YAML that can be read: {error}") from error
    raise ConfigError(
        f"{where}: expected a Serve config (applications: ...) or a RayService with "
        f"spec.{_RAY_SERVICE}"
    )


def _is_config(value: Any) -> bool:
    """Tell whether a value has the shape of a declarative config."""
    if not isinstance(value, dict) or not _are_named(value.get("applications"), "default"):
        return False
    return all(_are_named(app.get("deployments") or [], None) for app in value["applications"])


def _are_named(values: Any, default: str | None) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, dict) and isinstance(value.get("name", default), str) for value in values
    )


def _child(node: yaml.Node, key: str) -> yaml.Node:
    """Return the value of a mapping's key, which is there."""
    assert isinstance(node, yaml.MappingNode)
    return next(value for name, value in node.value if name.value == key)


def _splice(text: str, root: yaml.Node, place: Place, target: Target, where: str) -> str:
    key, value = _user_config(root, place)
    if not isinstance(value, yaml.MappingNode) or value.start_mark.index < key.end_mark.index:
        raise ConfigError(
            f"{where}: the user_config of application {place.app} is not written out there (a "
            "YAML alias?); write it out, and promote again"
        )
    ends = "\r\n" if "\r\n" in text else "\n"
    if value.flow_style:
        new = json.dumps(target.model_dump(mode="json"))
        start, stop = value.start_mark.index, value.end_mark.index
    else:
        dumped = yaml.safe_dump(target.model_dump(mode="json"), sort_keys=False).rstrip("\n")
        indent = " " * value.start_mark.column
        new = (ends + indent).join(dumped.split("\n"))
        # A literal block's end lies behind its line end.
        start, stop = value.start_mark.index, len(text[: _last(value)].rstrip())
    return text[:start] + new + text[stop:]


def _last(node: yaml.Node) -> int:
    """Return where a block's text ends: its end mark lies behind the comments that follow."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _last(last[1] if isinstance(last, tuple) else last)


def _user_config(root: yaml.Node, place: Place) -> tuple[yaml.Node, yaml.Node]:
    for app in _child(root, "applications").value:
        if _text(app, "name", "default") != place.app:
            continue
        for deployment in _child(app, "deployments").value:
            if _text(deployment, "name", "") == place.deployment:
                for key, value in deployment.value:
                    if key.value == "user_config":
                        return key, value
    raise AssertionError(f"{place.app} was found in the parsed config")


def _text(node: yaml.Node, key: str, default: str) -> str:
    return next((str(v.value) for k, v in node.value if k.value == key), default)


def _in_block(text: str, node: yaml.ScalarNode, place: Place, target: Target, where: str) -> str:
    """Replace the target within `serveConfigV2: |`, whose lines are indented YAML of their own."""
    if node.style != "|":
        raise ConfigError(
            f"{where}: spec.{_RAY_SERVICE} must be a literal block ({_RAY_SERVICE}: |) to be "
            "changed in place"
        )
    header = text.index("\n", node.start_mark.index) + 1
    body = text[header : node.end_mark.index]
    lines = body.splitlines(keepends=True)
    indent = next(line for line in lines if line.strip())
    indent = indent[: len(indent) - len(indent.lstrip(" "))]
    # Blank lines may have less indentation than the block; they keep what they have.
    stripped = [line.removeprefix(indent) for line in lines]
    inner = _splice("".join(stripped), _compose("".join(stripped)), place, target, where)
    marks = iter(_kept(lines, stripped, inner.splitlines(keepends=True), indent))
    return text[:header] + "".join(marks) + text[node.end_mark.index :]


def _compose(text: str) -> yaml.Node:
    node = yaml.compose(text, yaml.SafeLoader)
    assert node is not None
    return node


def _kept(lines: list[str], stripped: list[str], new: list[str], indent: str) -> Iterator[str]:
    """Yield the new lines indented again; those that did not change as they were."""
    same = 0
    while same < min(len(stripped), len(new)) and stripped[same] == new[same]:
        same += 1
    rest = 0
    while rest < min(len(stripped), len(new)) - same and stripped[-1 - rest] == new[-1 - rest]:
        rest += 1
    yield from lines[:same]
    yield from (indent + line for line in new[same : len(new) - rest])
    yield from lines[len(lines) - rest :]


class RayService:
    """A RayService of the current kubectl context.

    Args:
        name: NAME, or NAMESPACE/NAME.
    """

    def __init__(self, name: str) -> None:
        namespace, _, self._name = name.rpartition("/")
        self._scope = ["--namespace", namespace] if namespace else []
        self.where = f"RayService {name}"

    def read(self) -> tuple[str, str]:
        """Return its serveConfigV2 and its resource version.

        Raises:
            ClusterError: kubectl fails.
            ConfigError: it has no serveConfigV2.
        """
        out = self._kubectl("get", "rayservice", self._name, "--output", "json")
        try:
            service = json.loads(out)
            return service["spec"][_RAY_SERVICE], str(service["metadata"]["resourceVersion"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.where}: has no spec.{_RAY_SERVICE}") from error

    def write(self, config: str, version: str | None) -> None:
        """Patch spec.serveConfigV2 and nothing else.

        Args:
            config: the new text.
            version: refuse where the object has another resource version by now; none = whatever.
        """
        patch: dict[str, Any] = {"spec": {_RAY_SERVICE: config}}
        if version is not None:
            patch["metadata"] = {"resourceVersion": version}
        # Not as an argument: a config may be longer than a command line.
        self._kubectl(
            *("patch", "rayservice", self._name, "--type", "merge", "--patch-file", "/dev/stdin"),
            given=json.dumps(patch),
        )

    def _kubectl(self, *arguments: str, given: str = "") -> str:
        tool = shutil.which("kubectl")
        if tool is None:
            raise ClusterError(f"{self.where}: kubectl is not on PATH; it patches the object")
        try:
            done = subprocess.run(
                [tool, *arguments, *self._scope],
                input=given,
                capture_output=True,
                text=True,
                timeout=KUBECTL_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"{self.where}: kubectl took longer than {KUBECTL_S} s") from error
        if done.returncode != 0:
            raise ClusterError(f"{self.where}: kubectl {arguments[0]}: {done.stderr.strip()}")
        return done.stdout
