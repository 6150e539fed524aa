"""From settings to the declarative config that Serve takes; no Ray is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.serve._private.constants import DEFAULT_TRACING_EXPORTER_IMPORT_PATH
from ray.serve.schema import ServeDeploySchema

from clip_ray.config.load import load_config
from clip_ray.config.serving import AppSettings, Limits, ServeConfig, ServeRecipe
from clip_ray.errors import ConfigError
from clip_ray.registry import Target
from clip_ray.runtime.serve_config import (
    PLACEHOLDER,
    as_yaml,
    check_declaration,
    declaration,
    located,
    node_environment,
    placeholder,
)

ROOT = Path(__file__).parents[2]
DIGEST = "ab" * 32
TARGET = Target(name="clip", version="3", uri=f"/models/{DIGEST}", digest=DIGEST, run_id="r")


def profile(name: str, *flags: str) -> ServeConfig:
    recipe = ROOT / f"serve/profiles/{name}.yaml"
    loaded = load_config(list(flags), default_recipe=recipe, program="test", schema=ServeRecipe)
    return located(loaded.serve)


def deployment(config: ServeConfig) -> dict:
    return declaration(config, TARGET)["applications"][0]["deployments"][0]


@pytest.mark.parametrize("name", ["local", "gpu", "cluster"])
def test_a_profile_is_a_config_that_serve_takes(name):
    declared = declaration(profile(name), TARGET)
    check_declaration(declared)
    assert yaml.safe_load(as_yaml(declared, profile(name))) == declared
    schema = ServeDeploySchema.model_validate(declared)
    assert schema.http_options.host == ("127.0.0.1" if name == "local" else "0.0.0.0")
    assert (schema.proxy_location.value == "EveryNode") == (name == "cluster")


@pytest.mark.parametrize("name", ["local", "gpu", "cluster"])
def test_the_model_is_in_user_config_and_nowhere_else(name):
    declared = declaration(profile(name, "--serve.model", "models:/clip@champion"), TARGET)
    app = declared["applications"][0]
    assert Target.model_validate(app["deployments"][0].pop("user_config")) == TARGET
    assert "models:" not in yaml.safe_dump(declared) and DIGEST not in yaml.safe_dump(declared)
    assert AppSettings.model_validate(app["args"]) == profile(name).app_settings()


def test_tracing_is_for_serve_as_a_whole_and_for_its_nodes():
    flags = ("--serve.tracing.enabled", "true", "--serve.tracing.sampling_ratio", "0.5")
    for name in ("local", "gpu", "cluster"):
        plain, config = profile(name), profile(name, *flags)
        declared = declaration(config, TARGET)
        check_declaration(declared)
        schema = ServeDeploySchema.model_validate(declared).tracing_config
        assert (schema.enabled, schema.exporter_import_path) == (True, "")
        assert schema.sampling_ratio == 0.5
        # Off, nothing is said of it; and the replicas are the same, traced or not.
        assert declared.pop("tracing_config") and declared == declaration(plain, TARGET)
        assert "tracing" not in declared["applications"][0]["args"]
        # Serve's Python proxies look into the environment.
        more = node_environment(config).items() - node_environment(plain).items()
        assert dict(more) == {
            "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": DEFAULT_TRACING_EXPORTER_IMPORT_PATH,
            "RAY_SERVE_TRACING_SAMPLING_RATIO": "0.5",
        }
        text = as_yaml(declaration(config, TARGET), config)
        assert "#   RAY_SERVE_TRACING_SAMPLING_RATIO=0.5\n" in text
    otlp = (*flags, "--serve.tracing.exporter", "clip_ray.runtime.tracing:otlp")
    declared = declaration(profile("cluster", *otlp), TARGET)
    assert declared["tracing_config"]["exporter_import_path"] == "clip_ray.runtime.tracing:otlp"
    with pytest.raises(ConfigError, match="nothing would be exported"):
        profile("local", "--serve.tracing.exporter", "a:b")


def test_what_only_concerns_the_deployment_restarts_nothing():
    """Serve restarts replicas when import_path, runtime_env or args change, and only then."""
    before = declaration(profile("local"), TARGET)["applications"][0]
    other = TARGET.model_copy(update={"version": "4"})
    flags = "--serve.max_replicas 3 --serve.model_store /elsewhere --serve.start_timeout_s 1"
    after = declaration(profile("local", *flags.split()), other)["applications"][0]
    for part in ("import_path", "runtime_env", "args"):
        assert before[part] == after[part]
    changed = declaration(profile("local", "--serve.text_cache", "7"), TARGET)["applications"][0]
    assert changed["args"] == {**before["args"], "text_cache": 7}


def test_arguments_are_few_so_that_older_code_takes_them():
    args = declaration(profile("local"), TARGET)["applications"][0]["args"]
    assert args.keys() == {"name", "state_uri", "auth"}


def test_replicas_are_fixed_or_scaled():
    assert deployment(profile("local"))["num_replicas"] == 1
    flags = "--serve.min_replicas 2 --serve.max_replicas 6 --serve.upscale_delay_s 30"
    scaled = deployment(profile("local", *flags.split()))
    assert "num_replicas" not in scaled
    assert scaled["autoscaling_config"] == {
        "min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 24,
        "upscale_delay_s": 30, "downscale_delay_s": 300, "look_back_period_s": 30,
    }  # fmt: skip


def test_our_own_limits_answer_before_serves():
    limits = Limits(ongoing=10, queued=20, request_s=12)
    config = profile("local").model_copy(update={"limits": limits})
    made = deployment(config)
    assert made["max_ongoing_requests"] > limits.ongoing + limits.queued
    assert made["backpressure_config"]["status_code"] == 429
    assert made["graceful_shutdown_timeout_s"] > limits.request_s
    assert declaration(config, TARGET)["http_options"]["request_timeout_s"] > limits.request_s


def test_paths_mean_the_same_in_every_process(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = located(ServeConfig(auth="keys", keys_file="k.json", state_uri="s3://b/s"))
    assert config.keys_file == f"{tmp_path}/k.json"
    assert config.model_store == f"{tmp_path}/runs/serving/models"
    assert config.state_uri == "s3://b/s"


def test_code_comes_from_here_from_the_image_or_from_a_package():
    def env(config: ServeConfig) -> dict:
        return declaration(config, TARGET)["applications"][0]["runtime_env"]

    assert env(profile("gpu")) == {"env_vars": {"PYTHONPATH": str(ROOT)}}
    assert env(profile("cluster")) == {}
    packed = profile("cluster", "--serve.working_dir", "s3://b/code.zip")
    assert env(packed) == {"working_dir": "s3://b/code.zip"}
    check_declaration(declaration(packed, TARGET))


def test_what_serve_would_refuse_is_told():
    broken = profile("cluster", "--serve.working_dir", "/not/a/package")
    with pytest.raises(ConfigError, match="not one that Serve takes"):
        check_declaration(declaration(broken, TARGET))


def test_the_sample_is_what_the_job_prints():
    """`serve/config.yaml` is made by: jobs/deploy.py --profile cluster --print."""
    sample = (ROOT / "serve/config.yaml").read_text()
    command = [sys.executable, "jobs/deploy.py", "--profile", "cluster", "--print"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == sample, "make it anew with the command in its first line"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(sample))
    assert schema.applications[0].import_path == "serve.app:build"
    assert schema.applications[0].deployments[0].user_config["digest"] == PLACEHOLDER
    config = profile("cluster")
    assert as_yaml(declaration(config, placeholder(config, "clip")), config, " --print") == sample
    # What the sample asks of the nodes, and warns of.
    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in sample and "network policy" in sample
