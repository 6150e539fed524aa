"""The configuration of serving: what a replica needs to know, and how a profile deploys it.

The model is not here: it lives in the deployment's `user_config` (`clip_ray.registry.Target`), so
that another model never restarts a replica.
"""

from __future__ import annotations

import ipaddress
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from clip_ray.config.schema import PositiveInt, PublicPath, PublicUri, S3Options, Section


class Limits(Section):
    """What one request, one image and one replica may take."""

    body_mb: float = Field(20, gt=0, description="MB (1e6 bytes) of a request's body")
    items: PositiveInt = Field(64, description="texts and images of a request")
    image_mb: float = Field(10, gt=0, description="MB of an image file")
    image_mpx: float = Field(25, gt=0, description="megapixels of an image, from its header")
    text_chars: PositiveInt = Field(2000, description="characters of a text")
    prompts: PositiveInt = Field(
        8000, description="labels x templates of one request; a stored classifier may have more"
    )
    stored_prompts: PositiveInt = Field(
        100_000, description="labels x templates of a stored classifier"
    )
    predictions: PositiveInt = Field(
        10_000, description="images x top_k of a request to classify; the labels of its answer"
    )
    stored_classifiers: PositiveInt = Field(100, description="stored classifiers of a key")
    request_s: float = Field(30, gt=0, description="seconds of a request, from its first byte")
    body_s: float = Field(15, gt=0, description="seconds in which a request's body must arrive")
    memory_mb: float = Field(
        512, gt=0, description="MB of bodies and decoded pixels in flight in a replica"
    )
    queue_s: float = Field(5, ge=0, description="seconds that a request may wait for memory")
    ongoing: PositiveInt = Field(128, description="requests worked on at once by a replica")
    queued: PositiveInt = Field(256, description="requests that wait for a replica")


class ImageUrls(Section):
    """Fetching images by URL; off unless hosts are named."""

    hosts: tuple[str, ...] = Field(
        (), description="host names that images may be fetched from over https; none = off"
    )
    timeout_s: float = Field(10, gt=0, description="seconds of a fetch")


class Batching(Section):
    """How items of several requests share a forward pass."""

    image_batch: PositiveInt = Field(16, description="images of a forward pass")
    text_batch: PositiveInt = Field(64, description="texts of a forward pass")
    wait_ms: float = Field(2, ge=0, description="milliseconds that the first item waits for others")


class Tracing(Section):
    """Spans of requests by OpenTelemetry, through Ray Serve."""

    enabled: bool = Field(False, description="trace requests; what runs must be started anew")
    exporter: str = Field(
        "",
        pattern=r"^([\w.]+[.:]\w+)?$",
        description="import path of a function that returns span processors; "
        "clip_ray.runtime.tracing:otlp sends them by OTLP over HTTP; empty = files in Ray's logs",
    )
    sampling_ratio: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the requests that are traced; a caller's traceparent decides for its",
    )

    @model_validator(mode="after")
    def _used(self) -> Tracing:
        if not self.enabled and self.exporter:
            raise ValueError("exporter is set and enabled is not: nothing would be exported")
        return self


class AppSettings(Section):
    """What a replica needs; a change restarts the replicas."""

    name: str = Field(
        "clip",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="application and deployment name; `model` in requests is the model's own name",
    )
    state_uri: PublicPath = Field(
        "runs/serving/state", description="directory or s3:// prefix of stored classifiers"
    )
    s3: S3Options = Field(S3Options(), description="access to state_uri and model_store on s3://")
    auth: Literal["off", "keys"] = Field("off", description="off, or keys of keys_file")
    auth_off_on_network: bool = Field(
        False, description="allow auth off on an address that other machines reach"
    )
    keys_file: str | None = Field(
        None, description="file of jobs/keys.py, or the mounted secret that holds it"
    )
    keep_previous: bool = Field(
        True, description="after a promotion NAME/OLD stays answerable until --drop-previous"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    limits: Limits = Field(Limits(), description="of requests")
    image_urls: ImageUrls = Field(ImageUrls(), description="images by URL")
    batching: Batching = Field(Batching(), description="forward passes")
    text_cache: int = Field(50_000, ge=0, description="text features kept by a replica")
    classifier_cache: PositiveInt = Field(64, description="classifiers kept by a replica")

    @field_validator("auth", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        # What YAML makes of an unquoted off.
        return "off" if value is False else value

    @model_validator(mode="after")
    def _keys(self) -> AppSettings:
        if self.auth == "keys" and not self.keys_file:
            raise ValueError(
                "auth keys needs keys_file; make one with jobs/keys.py create --file keys.json"
            )
        return self


class ServeConfig(AppSettings):
    """A deployment: settings of the replicas, how many there are, and where they listen."""

    profile: Literal["local", "gpu", "cluster"] = Field(
        "local", description="local (Python proxy), gpu or cluster (HAProxy)"
    )
    model: str | None = Field(
        None, description="models:/NAME@alias, models:/NAME/VERSION, or a directory with a model"
    )
    model_store: PublicPath = Field(
        "runs/serving/models", description="directory or s3:// prefix; exports by digest"
    )
    address: PublicUri = Field(
        None, description="Ray address of profile cluster; none = RAY_ADDRESS"
    )
    host: str = Field("127.0.0.1", description="address that Serve listens on")
    port: int = Field(8000, ge=0, le=65535, description="port; 0 = a free one")
    min_replicas: PositiveInt = Field(1, description="replicas kept")
    max_replicas: PositiveInt = Field(1, description="replicas under load")
    target_ongoing: float = Field(
        24, gt=0, description="requests in flight a replica that the autoscaler aims at"
    )
    upscale_delay_s: float = Field(
        10, ge=0, description="seconds of load before replicas are added"
    )
    downscale_delay_s: float = Field(
        300, ge=0, description="seconds without load before replicas are removed"
    )
    cpus: float = Field(1, gt=0, description="CPUs of a replica, also its decoding threads")
    gpus: float = Field(0, ge=0, description="GPUs of a replica")
    declared_gpus: int | None = Field(
        None,
        ge=0,
        description="GPUs that our own Ray (local, gpu) is told of; none = those that are there",
    )
    working_dir: PublicUri = Field(
        None,
        description="profile cluster: URI of a zip with this repository; none = the image has it",
    )
    start_timeout_s: PositiveInt = Field(180, description="seconds in which all must be serving")
    tracing: Tracing = Field(Tracing(), description="spans of requests")

    @model_validator(mode="after")
    def _rules(self) -> ServeConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        limits = self.limits
        if limits.body_mb > limits.memory_mb / 4:
            raise ValueError(
                f"limits.body_mb {limits.body_mb:g} is above a quarter of limits.memory_mb "
                f"{limits.memory_mb:g}, which is what bodies get: no such body could ever come in"
            )
        return self

    def app_settings(self) -> AppSettings:
        """Return what the replicas are built with: a change of the rest restarts nothing."""
        return AppSettings.model_validate(
            {name: getattr(self, name) for name in AppSettings.model_fields}
        )


class ServeRecipe(Section):
    """The root of a serving profile's YAML file."""

    serve: ServeConfig = Field(ServeConfig(), description="the deployment")


def stored_in(storage: str) -> dict[str, Any]:
    """Return the settings below a recipe's that follow from where runs are stored."""
    place = f"{storage.rstrip('/')}/serving"
    return {"serve": {"state_uri": f"{place}/state", "model_store": f"{place}/models"}}


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a listener on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_auth(settings: AppSettings, live_host: str) -> str | None:
    """Return why these settings must not serve on `live_host`, or None where they may."""
    if settings.auth == "keys" or settings.auth_off_on_network or is_loopback(live_host):
        return None
    return (
        f"auth off while Serve listens on {live_host}, which other machines reach: set auth keys "
        "with a keys_file (jobs/keys.py create), host 127.0.0.1, or auth_off_on_network true "
        "behind a gateway of your own"
    )
