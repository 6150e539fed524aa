"""Make schemas.json of KubeRay's CRDs: python tests/cluster/crds/make.py DIRECTORY_OF_CRDS.

Each kind's v1 schema becomes a JSON Schema that is closed: a field that the CRD lacks is an error,
as it is for an API server that validates strictly. Equal subtrees are kept once.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

LARGE = 200  # characters from which an equal subtree is worth a reference
FILES = ("rayclusters", "rayjobs", "rayservices")


def closed(schema: Any) -> Any:
    """Return a JSON Schema of an openAPIV3Schema, closed to unknown fields."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {
        key: {name: closed(value) for name, value in inner.items()}
        if key == "properties"
        else closed(inner)
        for key, inner in schema.items()
        # A default fills what is required, so it may be left out of a manifest.
        if not key.startswith("x-kubernetes-") and key not in ("description", "format", "default")
    }
    if "required" in kept:
        inner = schema.get("properties", {})
        kept["required"] = [name for name in kept["required"] if "default" not in inner[name]]
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in kept and "additionalProperties" not in kept and not is_open:
        kept["additionalProperties"] = False
    return kept


def shared(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return the schema with large subtrees moved to `definitions`, equal ones once."""
    if isinstance(schema, list):
        return [shared(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    small = {key: shared(value, definitions) for key, value in schema.items()}
    text = json.dumps(small, sort_keys=True)
    if len(text) < LARGE or "type" not in small or isinstance(small["type"], dict):
        return small
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    definitions[name] = small
    return {"$ref": f"#/$defs/{name}"}


def main(folder: Path) -> None:
    """Write schemas.json beside this file."""
    definitions: dict[str, Any] = {}
    kinds = {}
    for file in FILES:
        crd = yaml.load((folder / f"ray.io_{file}.yaml").read_text(), yaml.CSafeLoader)
        version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
        schema = closed(version["schema"]["openAPIV3Schema"])
        # An object's metadata is the API server's own, not in a CRD.
        schema["properties"]["metadata"] = {"type": "object"}
        kinds[crd["spec"]["names"]["kind"]] = shared(schema, definitions)
    out = {"kinds": kinds, "$defs": definitions}
    target = Path(__file__).with_name("schemas.json")
    target.write_text(json.dumps(out, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
