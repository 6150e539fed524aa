"""Reading and checking Kubernetes manifests without a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "cluster/kuberay"
RAY_KINDS = ("RayCluster", "RayJob", "RayService")


def _closed(required: tuple[str, ...] = (), /, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_TEXT = {"type": "string"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGTPE]i?)?$"}
_QUANTITIES = {"type": "object", "additionalProperties": _QUANTITY, "minProperties": 1}
_META = _closed(("name",), name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS)
_LIMIT = _closed(("type",), type={"enum": ["Container"]}, default=_QUANTITIES,
                 defaultRequest=_QUANTITIES)  # fmt: skip
_FLAVOR = _closed(
    ("name", "resources"),
    name=_TEXT,
    resources={
        "type": "array",
        "items": _closed(("name", "nominalQuota"), name=_TEXT, nominalQuota=_QUANTITY),
    },
)
_GROUP = _closed(
    ("coveredResources", "flavors"),
    coveredResources={"type": "array", "items": _TEXT},
    flavors={"type": "array", "items": _FLAVOR},
)
_CLUSTER_QUEUE = _closed(
    ("namespaceSelector", "resourceGroups"),
    namespaceSelector=_closed(matchLabels=_TEXTS),
    queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
    preemption=_closed(
        withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]}
    ),
    resourceGroups={"type": "array", "items": _GROUP},
)


def _kind(version: str, kind: str, required: tuple[str, ...] = (), /, **fields: Any) -> Any:
    head = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": _META}
    return _closed(("apiVersion", "kind", "metadata", *required), **head, **fields)


_KUEUE = "kueue.x-k8s.io/v1beta2"
_SELECTOR = _closed(("matchLabels",), matchLabels=_TEXTS)
_WORKLOAD = {"replicas": {"type": "integer", "minimum": 0}, "selector": _SELECTOR, "template": {}}
_CLAIMS = {"type": "array", "items": {"type": "object"}}
# By hand, after Kubernetes' core/v1, apps/v1, networking/v1 and Kueue's CRDs, and closed: of their
# fields, those that ours have. What is `{}` or an object here is checked by KubeRay's schemas.
OTHERS = {
    "Service": _kind("v1", "Service", ("spec",), spec={"type": "object"}),
    "ConfigMap": _kind("v1", "ConfigMap", ("data",), data=_TEXTS),
    "ServiceAccount": _kind(
        "v1", "ServiceAccount", automountServiceAccountToken={"type": "boolean"}
    ),
    "Deployment": _kind(
        "apps/v1", "Deployment", ("spec",), spec=_closed(("selector", "template"), **_WORKLOAD)
    ),
    "StatefulSet": _kind(
        "apps/v1",
        "StatefulSet",
        ("spec",),
        spec=_closed(
            ("serviceName", "selector", "template"),
            **_WORKLOAD,
            serviceName=_TEXT,
            volumeClaimTemplates=_CLAIMS,
        ),
    ),
    "NetworkPolicy": _kind(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        ("spec",),
        spec=_closed(
            ("podSelector", "ingress"),
            podSelector=_SELECTOR,
            ingress={"type": "array"},
            policyTypes={"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
        ),
    ),
    "ResourceQuota": _kind("v1", "ResourceQuota", ("spec",), spec=_closed(hard=_QUANTITIES)),
    "LimitRange": _kind(
        "v1", "LimitRange", ("spec",), spec=_closed(limits={"type": "array", "items": _LIMIT})
    ),
    "ResourceFlavor": _kind(_KUEUE, "ResourceFlavor", spec=_closed(nodeLabels=_TEXTS)),
    "ClusterQueue": _kind(_KUEUE, "ClusterQueue", ("spec",), spec=_CLUSTER_QUEUE),
    "LocalQueue": _kind(
        _KUEUE, "LocalQueue", ("spec",), spec=_closed(("clusterQueue",), clusterQueue=_TEXT)
    ),
    "WorkloadPriorityClass": _kind(
        *(_KUEUE, "WorkloadPriorityClass", ("value",)), value={"type": "integer"}, description=_TEXT
    ),
}


@cache
def _schemas() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "tests/cluster/crds/schemas.json").read_text())
    return found


@cache
def validator(kind: str, *path: str) -> jsonschema.Draft202012Validator:
    """Return the validator of a KubeRay kind, or of what lies at `path` in its schema."""
    schemas = _schemas()

    def resolved(schema: Any) -> Any:
        while "$ref" in schema:
            schema = schemas["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        return schema

    schema = resolved(schemas["kinds"][kind])
    for name in path:
        schema = resolved(schema["items"] if name == "*" else schema["properties"][name])
    return jsonschema.Draft202012Validator(schema | {"$defs": schemas["$defs"]})


POD = ("spec", "headGroupSpec", "template")
SERVICE = ("spec", "headGroupSpec", "headService", "spec")
CLAIM = (*POD, "spec", "volumes", "*", "ephemeral", "volumeClaimTemplate")
INGRESS = ("spec", "networkPolicy", "head", "ingressRules")


def faults(manifest: dict[str, Any]) -> list[str]:
    """Return what the schemas say against a manifest.

    KubeRay's hold Kubernetes' own pod template, service, volume claim and ingress rules, by which
    other kinds are checked.
    """
    kind, spec = manifest["kind"], manifest.get("spec", {})
    checks: list[tuple[jsonschema.Draft202012Validator, Any]] = []
    if kind in RAY_KINDS:
        checks.append((validator(kind), manifest))
    elif kind in OTHERS:
        checks.append((jsonschema.Draft202012Validator(OTHERS[kind]), manifest))
    else:
        return [f"{kind}: no schema of it is here"]
    if kind == "NetworkPolicy":
        checks.append((validator("RayCluster", *INGRESS), spec.get("ingress")))
    elif kind == "Service":
        checks.append((validator("RayCluster", *SERVICE), spec))
    elif kind in ("Deployment", "StatefulSet"):
        checks.append((validator("RayCluster", *POD), spec.get("template")))
        claims = spec.get("volumeClaimTemplates", [])
        checks.extend((validator("RayCluster", *CLAIM), claim) for claim in claims)
    return [
        f"{kind} {'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for check, value in checks
        for error in check.iter_errors(value)
    ]


@cache
def _read(folder: str) -> str:
    return json.dumps(
        [
            document
            for path in sorted((KUBERAY / folder).glob("*.yaml"))
            if path.name != "kustomization.yaml"
            for document in yaml.safe_load_all(path.read_text())
        ]
    )


def manifests(*folders: str) -> list[dict[str, Any]]:
    """Return the manifests of the named folders of cluster/kuberay, else of all; a fresh copy."""
    chosen = folders or [path.name for path in sorted(KUBERAY.iterdir()) if path.is_dir()]
    return [document for folder in chosen for document in json.loads(_read(folder))]


def named(kind: str, folder: str) -> dict[str, Any]:
    """Return the one manifest of a kind in a folder."""
    (found,) = (document for document in manifests(folder) if document["kind"] == kind)
    return found


def ray_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the RayCluster's spec inside a manifest of KubeRay's."""
    spec: dict[str, Any] = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the pod templates of a manifest."""
    if manifest["kind"] in RAY_KINDS:
        spec = ray_spec(manifest)
        yield spec["headGroupSpec"]["template"]
        yield from (group["template"] for group in spec["workerGroupSpecs"])
    elif "template" in manifest.get("spec", {}):
        yield manifest["spec"]["template"]
