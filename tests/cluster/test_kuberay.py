"""KubeRay's manifests: valid by its schemas, one with the code, closed to who needs nothing."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from clip_ray.config.load import load_config
from clip_ray.config.serving import AppSettings
from clip_ray.errors import ConfigError
from clip_ray.registry import Target
from clip_ray.runtime.cluster import deal_streams, missing_readers, share_of
from clip_ray.runtime.owner import read_config, replace_target
from clip_ray.runtime.serve_config import check_declaration, haproxy_environment
from tests.cluster.manifests import (
    KUBERAY,
    RAY_KINDS,
    ROOT,
    faults,
    manifests,
    named,
    pods,
    ray_spec,
    validator,
)

FOLDERS = ("companion", "dev", "pretrain", "serve")
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def ours() -> list[dict[str, Any]]:
    return [manifest for manifest in manifests() if manifest["kind"] in RAY_KINDS]


def offers(group: dict[str, Any], count: int) -> dict[str, float]:
    """Return what `count` pods of a worker group bring."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = float(limits.get("nvidia.com/gpu", "0"))
    return {"CPU": count * float(limits["cpu"]), "GPU": count * gpus}


def test_every_manifest_is_valid():
    assert {manifest["kind"] for manifest in ours()} == set(RAY_KINDS)
    assert [fault for manifest in manifests() for fault in faults(manifest)] == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "word"),
    [
        ("RayCluster", ("rayVersions",), "2.60.0", "'rayVersions' was unexpected"),
        ("RayCluster", ("enableInTreeAutoscaling",), "yes", "is not of type 'boolean'"),
        ("RayCluster", ("autoscalerOptions", "version"), "v3", "is not one of"),
        ("RayCluster", ("authOptions", "secret"), "x", "'secret' was unexpected"),
        ("RayCluster", ("headGroupSpec", "template"), None, "is not of type 'object'"),
        ("RayCluster", ("workerGroupSpecs", 0, "maxReplica"), 3, "'maxReplica' was unexpected"),
        (
            "RayCluster",
            ("workerGroupSpecs", 0, "template", "spec", "containers", 0, "images"),
            "x",
            "'images' was unexpected",
        ),
        ("RayJob", ("backoffLimit",), "3", "is not of type 'integer'"),
        ("RayJob", ("rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "type"),
        ("RayService", ("serveConfigV2",), {"applications": []}, "is not of type 'string'"),
    ],
)
def test_a_wrong_field_or_type_is_seen(kind: str, path: tuple[Any, ...], value: Any, word: str):
    (manifest,) = (manifest for manifest in ours() if manifest["kind"] == kind)
    assert faults(manifest) == []
    place = manifest["spec"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert any(word in fault for fault in faults(manifest)), faults(manifest)


def test_a_required_field_is_missed():
    cluster = named("RayCluster", "dev")
    del cluster["spec"]["workerGroupSpecs"][0]["groupName"]
    assert any("'groupName' is a required" in fault for fault in faults(cluster))


@pytest.mark.parametrize(
    ("kind", "folder", "path", "value", "word"),
    [
        ("Deployment", "companion", ("template", "spec", "containers", 0, "port"), 5000, "'port'"),
        ("Deployment", "companion", ("replica",), 1, "'replica'"),
        ("NetworkPolicy", "dev", ("ingress", 1, "port"), 8265, "'port'"),
        ("NetworkPolicy", "dev", ("podSelectors",), {}, "'podSelectors'"),
        ("Service", "serve", ("ports", 0, "targetport"), 6379, "'targetport'"),
        ("Service", "serve", ("selectors",), {}, "'selectors'"),
        ("Service", "serve", ("ports", 0, "port"), "6379", "'6379' is not of type 'integer'"),
        ("StatefulSet", "serve", ("serviceNames",), "redis", "'serviceNames'"),
        ("StatefulSet", "serve", ("volumeClaimTemplates", 0, "spec", "access"), [], "'access'"),
        ("StatefulSet", "serve", ("template", "spec", "container"), [], "'container'"),
    ],
)
def test_a_wrong_field_of_other_kinds_is_seen(
    kind: str, folder: str, path: tuple[Any, ...], value: Any, word: str
):
    manifest = next(m for m in manifests(folder) if m["kind"] == kind)
    assert faults(manifest) == []
    place = manifest["spec"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert any(word in fault for fault in faults(manifest)), faults(manifest)


def test_a_kind_without_a_schema_and_a_wrong_version_are_seen():
    assert "no schema" in faults({"kind": "DaemonSet", "metadata": {"name": "x"}})[0]
    redis = named("StatefulSet", "serve")
    assert any("'apps/v1' was expected" in f for f in faults(redis | {"apiVersion": "v1"}))


def test_the_schemas_are_schemas():
    for kind in RAY_KINDS:
        jsonschema.Draft202012Validator.check_schema(validator(kind).schema)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_kustomization_takes_every_file_beside_it(folder: str):
    one = yaml.safe_load((KUBERAY / folder / "kustomization.yaml").read_text())
    files = {path.name for path in (KUBERAY / folder).glob("*.yaml")} - {"kustomization.yaml"}
    assert set(one["resources"]) == files | {"../common"}
    assert one["components"] == ["../settings"]


def test_the_settings_name_our_image_and_what_the_pods_read():
    component = yaml.safe_load((KUBERAY / "settings/kustomization.yaml").read_text())
    assert [image["name"] for image in component["images"]] == ["clip-ray"]
    (maps,) = component["configMapGenerator"]
    assert (KUBERAY / "settings" / maps["envs"][0]).is_file()
    for manifest in ours():
        for pod in pods(manifest):
            container = pod["spec"]["containers"][0]
            assert container["image"] == "clip-ray"
            assert {"configMapRef": {"name": maps["name"]}} in container["envFrom"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_renders_valid_manifests_with_the_settings(folder: str):
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERAY / folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    rendered = list(yaml.safe_load_all(done.stdout))
    assert [fault for manifest in rendered for fault in faults(manifest)] == []
    assert {manifest["metadata"]["namespace"] for manifest in rendered} == {"clip-ray"}
    images = {c["image"] for m in rendered for pod in pods(m) for c in pod["spec"]["containers"]}
    assert "registry.example.com/clip-ray:cuda" in images
    assert "clip-ray" not in images


def test_ray_is_the_pinned_one_asks_for_a_token_and_scales():
    for manifest in ours():
        spec = ray_spec(manifest)
        assert spec["rayVersion"] == PINS["ray"]
        assert spec["authOptions"] == {"mode": "token", "secretName": "clip-ray-token"}
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_no_pod_is_root_or_may_become_it():
    seen = 0
    for manifest in manifests():
        for pod in pods(manifest):
            seen += 1
            spec = pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            for container in spec["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            heads = spec.get("serviceAccountName") == "clip-ray-head"
            # Only the head's autoscaler talks to the API server.
            assert spec.get("automountServiceAccountToken", True) is heads
    assert seen == 11


def secrets(tree: Any) -> set[str]:
    """Return the names of the secrets that a manifest refers to."""
    found: set[str] = set()
    if isinstance(tree, list):
        found = {name for item in tree for name in secrets(item)}
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("secretKeyRef", "secretRef"):
                found.add(value["name"])
            elif key == "secretName":
                found.add(value)
            else:
                found |= secrets(value)
    return found


def test_secrets_are_named_and_the_readme_makes_each():
    assert all(manifest["kind"] != "Secret" for manifest in manifests())
    readme = (ROOT / "cluster/README.md").read_text()
    wanted = secrets(manifests())
    assert wanted == {
        "clip-ray-token",
        "clip-ray-s3",
        "clip-ray-keys",
        "clip-ray-redis",
        "clip-ray-postgres",
    }
    for name in wanted:
        assert f"create secret generic {name} " in readme, f"README.md makes no secret {name}"


def test_the_pretraining_command_is_one_that_the_job_takes_and_its_cluster_can_meet():
    job = named("RayJob", "pretrain")["spec"]
    python, script, *argv = shlex.split(job["entrypoint"])
    assert python == "python"
    path = ROOT / script.removeprefix("/app/")
    assert path.is_file()
    argv = [word.replace("/app/", f"{ROOT}/") for word in argv]
    config = load_config(argv, default_recipe=None, program="jobs/pretrain.py")
    groups = job["rayClusterSpec"]["workerGroupSpecs"]
    least = [offers(group, group["minReplicas"]) for group in groups]
    free = {key: sum(offer[key] for offer in least) for key in ("CPU", "GPU")}
    share, problem = share_of(free, [], config.cluster, wants_gpu=True)
    assert share is not None, problem
    assert share.num_workers == free["GPU"]
    # Without the decode workers the run waits for them, and without a GPU it is refused.
    nodes = [
        {"NodeID": f"{group['groupName']}-{n}", "Alive": True, "Labels": group["labels"],
         "Resources": offers(group, 1)}
        for group in groups
        for n in range(group["minReplicas"])
    ]  # fmt: skip
    assert missing_readers(share, config.cluster, nodes) == ""
    assert missing_readers(share, config.cluster, nodes[:-1]) != ""
    assert deal_streams(share, config.cluster, nodes).data_label == ("clip-ray/role", "decode")
    fewer = {"CPU": free["CPU"], "GPU": free["GPU"] - 1}
    assert share_of(fewer, [], config.cluster, wants_gpu=True)[0] is None
    with pytest.raises(ConfigError):
        load_config([*argv, "--cluster.nodes", "2"], default_recipe=None, program="x")


def test_a_pod_that_goes_has_time_to_be_announced_and_the_run_to_commit():
    from ray._private import ray_constants

    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert name in Path(ray_constants.__file__).read_text()  # Ray's own name for it
    job = named("RayJob", "pretrain")
    for group in ray_spec(job)["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        env = {item["name"]: item["value"] for item in spec["containers"][0]["env"]}
        assert 60 <= float(env[name]) < spec["terminationGracePeriodSeconds"]
    text = (KUBERAY / "pretrain/rayjob.yaml").read_text()
    assert '--cluster.num_workers "[8, 16]"' in text


def test_no_page_says_what_is_no_longer_so():
    pages = [*(ROOT / "cluster").rglob("*.md"), *(ROOT / "cluster").rglob("*.yaml")]
    text = "\n".join(page.read_text() for page in [*pages, ROOT / "README.md"])
    for stale in ("autoscaler for nothing", "counts what is there", "taken away ends the attempt"):
        assert stale not in text
    readme = (ROOT / "cluster/README.md").read_text()
    assert "--cluster.data_label clip-ray/role=decode" in readme
    assert '--cluster.num_workers "[8, 16]"' in readme


def test_a_finished_job_costs_nothing_and_a_stopped_one_can_commit():
    job = named("RayJob", "pretrain")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["backoffLimit"] >= 1
    head = ray_spec(job)["headGroupSpec"]["template"]["spec"]["containers"][0]
    env = {item["name"]: item["value"] for item in head["env"]}
    assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_serving_is_the_declarative_config_of_serve():
    text = named("RayService", "serve")["spec"]["serveConfigV2"]
    declared = yaml.safe_load(text)
    expected = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    assert declared == expected, "copy serve/config.yaml into cluster/kuberay/serve/rayservice.yaml"
    check_declaration(declared)
    # Serve takes a field that it does not know; a wrong value it refuses.
    declared["applications"][0]["deployments"][0]["max_ongoing_requests"] = "many"
    with pytest.raises(ConfigError):
        check_declaration(declared)


def test_a_promotion_can_write_into_the_rayservice_file():
    text = (KUBERAY / "serve/rayservice.yaml").read_text()
    target = Target(name="clip", version="7", uri="s3://bucket/clip", digest="a" * 64)
    changed = replace_target(text, None, target, "rayservice.yaml")
    before, after = read_config(text, "before"), read_config(changed, "after")
    (deployment,) = after["applications"][0]["deployments"]
    assert deployment["user_config"]["version"] == "7"
    assert before["applications"][0]["deployments"][0]["user_config"]["version"] == "0"


def test_serving_pods_fit_the_replicas_and_have_haproxy_and_keys():
    service = named("RayService", "serve")
    app = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]
    deployment = app["deployments"][0]
    (group,) = ray_spec(service)["workerGroupSpecs"]
    scaling, options = deployment["autoscaling_config"], deployment["ray_actor_options"]
    for replicas, count in (("min_replicas", "minReplicas"), ("max_replicas", "maxReplicas")):
        offer = offers(group, group[count])
        assert scaling[replicas] * options["num_gpus"] <= offer["GPU"]
        assert scaling[replicas] * options["num_cpus"] <= offer["CPU"]
    wanted = haproxy_environment(AppSettings.model_validate(app["args"]))
    keys = app["args"]["keys_file"]
    for pod in pods(service):
        container = pod["spec"]["containers"][0]
        env = {item["name"]: item["value"] for item in container["env"]}
        assert {name: env[name] for name in env if name.startswith("RAY_SERVE_")} == wanted
        (mount,) = container["volumeMounts"]
        assert keys == f"{mount['mountPath']}/keys.json"
    drain = deployment["graceful_shutdown_timeout_s"]
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > drain
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drain
    assert service["spec"]["upgradeStrategy"]["type"] == "NewCluster"
    assert ray_spec(service)["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"


def test_serving_pods_are_ready_when_their_proxy_is_and_answer_before_they_end():
    from ray._private import ray_constants
    from ray.serve._private.constants import DEFAULT_HTTP_PORT

    service = named("RayService", "serve")
    declared = yaml.safe_load(service["spec"]["serveConfigV2"])
    (deployment,) = declared["applications"][0]["deployments"]
    assert declared["http_options"]["port"] == DEFAULT_HTTP_PORT == 8000
    (group,) = ray_spec(service)["workerGroupSpecs"]
    spec = group["template"]["spec"]
    (container,) = spec["containers"]
    probe = container["readinessProbe"]
    assert probe["httpGet"] == {"path": "/-/healthz", "port": 8000}
    assert 8000 in [port["containerPort"] for port in container["ports"]]
    assert probe["timeoutSeconds"] <= probe["periodSeconds"]
    # `ray start` drains its node when it is told to end; `ray stop` ends the raylet at once.
    assert "lifecycle" not in container
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert name in Path(ray_constants.__file__).read_text()
    env = {item["name"]: item["value"] for item in container["env"]}
    drain = deployment["graceful_shutdown_timeout_s"]
    assert drain + 30 < float(env[name]) < spec["terminationGracePeriodSeconds"]
    # No traffic goes to the head.
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True


def allowed(
    policies: list[dict[str, Any]], to: str, port: int, pod: str = "", namespace: str = ""
) -> bool:
    """Tell whether the policies let a peer reach a port of the pods of component `to`.

    Args:
        policies: NetworkPolicy manifests.
        to: component label of the pods reached.
        port: TCP port.
        pod: component label of a peer in the same namespace.
        namespace: name of another namespace, `clients` for one labelled for clients.
    """
    labels = {"kubernetes.io/metadata.name": namespace}
    if namespace == "clients":
        labels["clip-ray/clients"] = "yes"
    rules = [
        rule
        for policy in policies
        if policy["spec"]["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": to}
        for rule in policy["spec"]["ingress"]
    ]
    assert rules, f"no policy selects {to}"
    for rule in rules:
        if "ports" in rule and port not in [entry["port"] for entry in rule["ports"]]:
            continue
        if "from" not in rule:
            return True
        for peer in rule["from"]:
            if "podSelector" in peer and pod:
                selector = peer["podSelector"]
                exact = selector.get("matchLabels", {}).get("app.kubernetes.io/component")
                listed = [v for e in selector.get("matchExpressions", []) for v in e["values"]]
                if pod == exact or pod in listed:
                    return True
            if "namespaceSelector" in peer and namespace:
                wanted = peer["namespaceSelector"]["matchLabels"]
                if wanted.items() <= labels.items():
                    return True
    return False


CLOSED = (6379, 8265, 8404, 8500, 9101, 10001, 30000, 31000, 52365)


def test_only_who_needs_a_port_reaches_it():
    policies = [manifest for manifest in manifests() if manifest["kind"] == "NetworkPolicy"]
    for component in ("pretrain", "dev", "serve"):
        for port in CLOSED:
            assert allowed(policies, component, port, pod=component)
            assert not allowed(policies, component, port, namespace="clients")
            assert not allowed(policies, component, port, namespace="monitoring")
            assert not allowed(policies, component, port, namespace="default")
            assert not allowed(policies, component, port, pod="mlflow")
            for other in {"pretrain", "dev", "serve"} - {component}:
                assert not allowed(policies, component, port, pod=other)
        assert allowed(policies, component, 8265, namespace="kuberay-operator")
        assert allowed(policies, component, 8080, namespace="monitoring")
        assert allowed(policies, component, 8000, namespace="clients") is (component == "serve")
    assert not allowed(policies, "serve", 8000, namespace="default")
    assert allowed(policies, "redis", 6379, pod="serve")
    assert not allowed(policies, "redis", 6379, pod="pretrain")
    assert allowed(policies, "mlflow", 5000, pod="pretrain")
    assert allowed(policies, "postgres", 5432, pod="mlflow")
    assert not allowed(policies, "postgres", 5432, pod="serve")
    # A rule without peers or ports opens everything: this must be seen.
    policies[0]["spec"]["ingress"].append({})
    (to,) = policies[0]["spec"]["podSelector"]["matchLabels"].values()
    assert allowed(policies, to, 9999, namespace="default")


def test_every_pod_that_listens_has_a_policy_and_every_service_its_pods():
    policed = {
        manifest["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for manifest in manifests()
        if manifest["kind"] == "NetworkPolicy"
    }
    components = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]
        for manifest in manifests()
        for pod in pods(manifest)
    }
    assert components == policed
    services = {m["metadata"]["name"]: m["spec"] for m in manifests() if m["kind"] == "Service"}
    assert set(services) == {"redis", "mlflow", "postgres", "object-store"}
    for name, spec in services.items():
        assert spec["selector"]["app.kubernetes.io/component"] == name
    settings = (KUBERAY / "settings/settings.env").read_text()
    port = services["mlflow"]["ports"][0]["port"]
    assert f"MLFLOW_TRACKING_URI=http://mlflow:{port}\n" in settings


def test_mlflow_reaches_its_database_with_the_driver_that_the_image_has():
    from mlflow.utils.uri import extract_db_type_from_uri
    from sqlalchemy import make_url

    (pod,) = pods(named("Deployment", "companion"))
    env = {item["name"]: item.get("value") for item in pod["spec"]["containers"][0]["env"]}
    url = env["MLFLOW_BACKEND_STORE_URI"].replace("$(POSTGRES_PASSWORD)", "x")
    assert extract_db_type_from_uri(url) == "postgresql"
    # Without a name SQLAlchemy 2.1 takes another one.
    driver = make_url(url).get_driver_name()
    assert driver == "psycopg2"
    assert f"{driver}-binary==" in (ROOT / "cluster/requirements.txt").read_text()
    assert make_url(url).host in {
        manifest["metadata"]["name"] for manifest in manifests() if manifest["kind"] == "Service"
    }


def test_mlflow_takes_the_flags_it_is_started_with():
    from mlflow.cli import cli

    (pod,) = pods(named("Deployment", "companion"))
    tool, command, *flags = pod["spec"]["containers"][0]["command"]
    assert tool == "mlflow"
    known = {option for p in cli.commands[command].params for option in p.opts}
    assert {flag.split("=")[0] for flag in flags} <= known
