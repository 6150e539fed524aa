"""The configuration: one frozen tree of pydantic models, the same in every job.

Each field's description states its unit or its allowed values; rules that tie fields
together are validated here, so that code below never has to doubt a config.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from clip_ray.config import zoo
from clip_ray.config.conditions import parse_condition


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def without_credentials(uri: str | None) -> str | None:
    """Return a URI as it is; raise ValueError when it holds a user, password or key."""
    if uri is not None:
        # An address without a scheme (me:secret@host) is a path to urlsplit.
        parts = urlsplit(uri if "://" in uri else f"//{uri}")
        secret = {"password", "token", "secret", "key", "access_key", "secret_key"}
        if parts.password or (parts.username and parts.scheme != "ssh"):
            raise ValueError(_CREDENTIALS)
        if secret & {name.lower() for name, _ in parse_qsl(parts.query)}:
            raise ValueError(_CREDENTIALS)
    return uri


_CREDENTIALS = (
    "holds credentials, and the config is logged; use the AWS chain for S3, and for MLflow "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
)
PublicUri = Annotated[str | None, AfterValidator(without_credentials)]
PublicPath = Annotated[
    str, AfterValidator(lambda path: without_credentials(path) if "://" in path else path)
]


class S3Options(Section):
    """How to reach an S3-compatible store; credentials come from the AWS chain alone."""

    endpoint: PublicUri = Field(None, description="endpoint URL; none = AWS (or AWS_ENDPOINT_URL)")
    region: str | None = Field(None, description="region name; none = the AWS chain's")
    profile: str | None = Field(None, description="profile of the AWS credentials file")
    anonymous: bool = Field(False, description="unsigned requests, for public buckets")
    timeout_s: float = Field(
        30.0, gt=0, description="seconds that one request (at most 32 MB) may take"
    )
    retry_s: float = Field(
        120.0,
        ge=0,
        description="seconds after which a request that keeps failing is given up; 0 = one attempt",
    )
    hedge: Fraction = Field(
        0.05, description="share of the reads sent twice when slow, at most; 0 = none"
    )


class RunConfig(Section):
    """Where a run lives and what names it."""

    name: str = Field(
        "clip",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="run name; the same name and config resumes",
    )
    storage: PublicPath = Field("runs", description="directory or s3:// prefix that holds all runs")
    seed: int = Field(0, ge=0, description="seed of weights, plan and augmentation")
    extend: int = Field(0, ge=0, description="steps added to a run's length")
    s3: S3Options = Field(S3Options(), description="access to run.storage on s3://")


class ClusterConfig(Section):
    """The share of a Ray cluster that a run asks for."""

    address: PublicUri = Field(
        None, description="Ray address; none = RAY_ADDRESS, else a local Ray of our own"
    )
    num_workers: int | tuple[int, int] = Field(
        1,
        description="training workers (one a GPU); [MIN, MAX] = as many as the cluster has room "
        "for, also when that changes",
    )
    cpus_per_worker: float | None = Field(
        None, gt=0, description="CPUs reserved by a worker; none = 1, less on small machines"
    )
    data_cpus: float | None = Field(
        None, ge=1, description="CPUs for reading and decoding; none = what workers leave free"
    )
    data_streams: PositiveInt | None = Field(
        None,
        description="ordered streams that deal the data to the workers; none = 1, more where the "
        "cluster is too large for one",
    )
    data_label: str | None = Field(
        None,
        pattern=r"^[^=]+=[^=]+$",
        description="KEY=VALUE: data are read and decoded only on nodes with this label; none = "
        "on all nodes",
    )
    object_store_share: float = Field(
        0.5, gt=0, le=0.9, description="share of Ray's object store that data read ahead may fill"
    )
    start_timeout_s: PositiveInt = Field(
        60, description="seconds that a job waits for the resources at its start"
    )
    rejoin_timeout_s: PositiveInt = Field(
        1800, description="seconds that a run waits for them after it has lost workers"
    )
    collective_timeout_s: PositiveInt = Field(
        180,
        description="seconds after which a hung collective ends the attempt; reading or writing a "
        "checkpoint must take less",
    )
    hang_timeout_s: float | None = Field(
        None,
        gt=0,
        description="seconds without a step after which the worker that holds the others up is "
        "ended and the run goes on from the last commit; none = 4.5 median steps, at least 8 s",
    )
    max_fruitless_attempts: PositiveInt = Field(
        3, description="attempts without a new commit after which the run stops"
    )
    price_per_hour: float | None = Field(
        None,
        gt=0,
        description="price of an hour of all that the run uses, in your currency; none = the run "
        "does not say what it costs",
    )

    @field_validator("num_workers", mode="wrap")
    @classmethod
    def _number_or_range(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            workers = read(value)
            least, most = (workers, workers) if isinstance(workers, int) else workers
        except ValueError:
            least = most = 0
        # More would overflow the float32 sums that the digest of the samples rides on.
        if not 1 <= least <= most <= 8192:
            raise ValueError("expected a number, or [MIN, MAX] with MIN <= MAX, of 1 to 8192")
        return workers

    @property
    def worker_counts(self) -> range:
        """Numbers of workers that the run may have."""
        least, most = (
            (self.num_workers, self.num_workers)
            if isinstance(self.num_workers, int)
            else self.num_workers
        )
        return range(least, most + 1)


class SourceConfig(Section):
    """One set of shards."""

    path: PublicPath = Field(
        description="file, directory, glob or {000..123} pattern; local or s3://"
    )
    weight: float | None = Field(
        None, gt=0, description="share of the samples, relative; none on all = by size"
    )
    max_passes: PositiveInt | None = Field(
        None, description="passes after which others take a weighted source's share; none = no end"
    )
    image: str | None = Field(
        None, description="tar suffix or Parquet column of the image; none = the usual names"
    )
    caption: str | None = Field(
        None,
        description="tar suffix, json:KEY or Parquet column of the caption; none = the usual names",
    )
    select: str | None = Field(None, description="file of sample keys to take, one a line")
    where: tuple[str, ...] = Field(
        (),
        description="conditions on Parquet columns (numbers, strings, bool) that all hold, as "
        '"similarity >= 0.3" or "license == cc"',
    )

    @field_validator("where")
    @classmethod
    def _conditions(cls, where: tuple[str, ...]) -> tuple[str, ...]:
        for text in where:
            parse_condition(text)
        return where


class DataConfig(Section):
    """Which samples are trained on, and how they are read."""

    sources: tuple[SourceConfig, ...] = Field((), description="sets of shards, mixed by weight")
    s3: S3Options = Field(S3Options(), description="access to sources on s3://")
    holdout: float = Field(
        0.01, ge=0.0, lt=1.0, description="share of the samples kept out, by hash of the key"
    )
    exclude: str | None = Field(
        None, description="file of sample keys never to train on, one a line (take-downs)"
    )
    salvage: bool = Field(False, description="take the whole samples of truncated shards")
    sidecars: bool = Field(
        False,
        description="index tars on S3 by the tables that img2dataset writes beside them: at once, "
        "but each tar is streamed whole by who first reads from it, so the first steps wait, and "
        "each node streams the set anew; an index of the tars streams it once for all, so false",
    )
    copies: bool = Field(False, description="train on shards that are copies of others, too")
    max_bad_fraction: Fraction = Field(
        0.05, description="share of undecodable samples that stops the run"
    )
    slot: PositiveInt | None = Field(
        None, description="R: samples fetched by one read; none = 64, less for small sets"
    )
    window: PositiveInt | None = Field(
        None, description="K: steps over which a slot is dealt; none = 8, less for small sets"
    )
    max_pixels: PositiveInt = Field(64_000_000, description="pixels above which an image is void")
    exif_orientation: bool = Field(
        False,
        description="turn pictures as their EXIF data say, in training and in the model's use",
    )
    crop_margin: float = Field(
        0.0, ge=0, description="the resized shorter side, over the crop's side, less 1"
    )
    caption_choice: Literal["first", "random"] = Field(
        "first", description="which of an image's captions: first, or random (drawn by position)"
    )
    templates: tuple[str, ...] = Field(
        (), description="captions are put into one of these, drawn by position; {c} is the caption"
    )

    @field_validator("templates")
    @classmethod
    def _place_for_the_caption(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if "{c}" not in template:
                raise ValueError(f"{template!r} has no {{c}}, the place of the caption")
        return templates

    @model_validator(mode="after")
    def _weights_on_all_or_none(self) -> DataConfig:
        without = [source.path for source in self.sources if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(
                f"give every source a weight, or none; without one: {', '.join(without)}"
            )
        for source in self.sources:
            if source.weight is None and source.max_passes is not None:
                raise ValueError(
                    f"max_passes {source.max_passes} of {source.path}: sources without weights are "
                    "one pool; give every source a weight, or bound the run with train.passes"
                )
        return self


class TokenizerConfig(Section):
    """How captions become token ids."""

    vocab: str = Field(
        "clip",
        description="clip (OpenAI's BPE) or the path of a tokenizer.json or BPE vocabulary file",
    )
    train_vocab: int | None = Field(
        None, ge=514, description="ids of a BPE trained on the run's own captions; none = vocab"
    )

    @model_validator(mode="after")
    def _one_source(self) -> TokenizerConfig:
        if self.train_vocab is not None and self.vocab != "clip":
            raise ValueError("give tokenizer.vocab or tokenizer.train_vocab, not both")
        return self


class VisionConfig(Section):
    """The Vision Transformer image tower."""

    image_size: PositiveInt = Field(224, description="image side in pixels")
    patch_size: PositiveInt = Field(32, description="patch side in pixels; divides image_size")
    width: PositiveInt = Field(768, description="channels of the residual stream")
    layers: PositiveInt = Field(12, description="transformer blocks")
    heads: PositiveInt = Field(12, description="attention heads; divides width")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP / width")

    @model_validator(mode="after")
    def _divides(self) -> VisionConfig:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class TextConfig(Section):
    """The causal text transformer."""

    context_length: int = Field(77, ge=4, description="tokens of a caption, start and end included")
    vocab_size: PositiveInt = Field(49408, description="token ids; set by a trained vocabulary")
    width: PositiveInt = Field(512, description="channels of the residual stream")
    layers: PositiveInt = Field(12, description="transformer blocks")
    heads: PositiveInt = Field(8, description="attention heads; divides width")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP / width")

    @model_validator(mode="after")
    def _divides(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class ModelConfig(Section):
    """An architecture: a name from the zoo, with any field overridden."""

    name: str = Field("ViT-B-32", description="architecture: " + ", ".join(zoo.ARCHITECTURES))
    embed_dim: PositiveInt = Field(512, description="dimension of the joint embedding space")
    quick_gelu: bool = Field(
        False, description="x * sigmoid(1.702 x) as OpenAI's released weights use"
    )
    init_logit_scale: float = Field(
        2.6592600369327783,  # ln(1 / 0.07), Radford et al. 2021, section 2.5
        description="log of the factor on cosine similarities, at the start",
    )
    init_logit_bias: float | None = Field(
        None, description="bias of the sigmoid loss at the start; none = the model has no bias"
    )
    vision: VisionConfig = Field(VisionConfig(), description="image tower")
    text: TextConfig = Field(TextConfig(), description="text tower")

    @model_validator(mode="before")
    @classmethod
    def _from_zoo(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return zoo.fill(given)
        return given


class InitConfig(Section):
    """What a run begins from, other than random weights."""

    weights: PublicPath | None = Field(
        None,
        description="model of the same architecture and tokenizer to begin from: an export, or a "
        "CLIP ViT of open_clip or Hugging Face; directory or s3:// prefix. Their logit scale and "
        "bias come along where they are of the same loss",
    )
    freeze: tuple[Literal["image", "text"], ...] = Field(
        (), description="towers whose weights stay as they are (locked-image tuning: [image])"
    )

    @field_validator("weights")
    @classmethod
    def _a_place(cls, weights: str | None) -> str | None:
        if weights is not None and weights.startswith(("models:", "runs:")):
            raise ValueError(
                f"{weights!r} is a name in MLflow, which a restarted run could resolve to another "
                "model; give the directory of its export, such as runs/<run name>/export"
            )
        return weights


class TrainConfig(Section):
    """The optimization's length, loss, batch and precision."""

    steps: PositiveInt | None = Field(None, description="length in optimizer steps")
    samples: PositiveInt | None = Field(None, description="length in samples, rounded up to steps")
    passes: float | None = Field(None, gt=0, description="length in passes over the data")
    global_batch: PositiveInt = Field(256, description="G: samples of one step, over all workers")
    micro_batch: PositiveInt | None = Field(
        None, description="samples of one forward pass on a worker; none = all of them"
    )
    loss: Literal["clip", "siglip"] = Field(
        "clip", description="clip: softmax over the global batch; siglip: a sigmoid for each pair"
    )
    mask_duplicates: bool = Field(
        False,
        description="samples of a batch with the same image file or the same caption are not each "
        "other's negatives",
    )
    patch_dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of an image's patches left out in training"
    )
    grad_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="fp32, or bf16 autocast")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    compile: bool = Field(False, description="torch.compile the towers and the loss's tiles")
    profile_steps: tuple[int, int] | None = Field(
        None, description="[first, last] steps recorded in a torch trace"
    )
    max_nonfinite: PositiveInt = Field(
        3, description="non-finite steps in a row after which the run rolls back once, then stops"
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [k for k in ("steps", "samples", "passes") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of train.steps, train.samples and train.passes; "
                + (f"given: {', '.join(given)}" if given else "none is given")
            )
        if (
            self.profile_steps is not None
            and not 0 < self.profile_steps[0] <= self.profile_steps[1]
        ):
            raise ValueError(f"profile_steps {self.profile_steps}: expected 0 < first <= last")
        return self


class OptimConfig(Section):
    """AdamW with warm-up and cosine decay (Radford et al. 2021, section 2.5, tables 18-20)."""

    lr: float = Field(5e-4, gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.98, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-6, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.2, ge=0, description="on matrices; never on gains or biases")
    warmup: int = Field(2000, ge=0, description="steps of linear warm-up")
    final_lr: float = Field(0.0, ge=0, description="learning rate at the last step")
    clip_norm: float | None = Field(None, gt=0, description="limit of the global gradient norm")


class CheckpointConfig(Section):
    """When commits are written and which are kept."""

    every_steps: PositiveInt = Field(1000, description="steps between commits")
    keep_last: PositiveInt = Field(3, description="newest commits kept")
    keep_every: PositiveInt | None = Field(None, description="also keep each commit at k x this")
    patience_s: float = Field(
        900.0,
        ge=0,
        description="seconds in which no commit can be written, after which the workers stop",
    )
    writers: PositiveInt = Field(
        1, description="workers that write a part of each commit: 1 = rank 0 writes all of it"
    )


class EvalConfig(Section):
    """What a finished run is evaluated on."""

    datasets: tuple[str, ...] = Field((), description="directories in CLIP_benchmark's layout")
    batch: PositiveInt = Field(256, description="images or texts of one forward pass")


class TrackingConfig(Section):
    """Where MLflow's records go."""

    uri: PublicUri = Field(
        None,
        description="MLflow tracking URI; none = MLFLOW_TRACKING_URI, else sqlite in run.storage",
    )
    experiment: str = Field("clip-ray", description="experiment name")
    model_name: str | None = Field(None, description="registered model; none = run.name")
    register_model: bool = Field(True, description="register the export as a model version")
    flush_s: float = Field(5.0, gt=0, description="seconds between batches sent to MLflow")


class Config(Section):
    """A run: everything that `jobs/pretrain.py` needs to know."""

    run: RunConfig = Field(RunConfig(), description="name, storage, seed")
    cluster: ClusterConfig = Field(ClusterConfig(), description="resources")
    data: DataConfig = Field(DataConfig(), description="shards")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="captions to ids")
    model: ModelConfig = Field(ModelConfig(), description="architecture")
    init: InitConfig = Field(InitConfig(), description="weights to begin from, locked towers")
    train: TrainConfig = Field(description="length, loss, batch, precision")
    optim: OptimConfig = Field(OptimConfig(), description="AdamW and schedule")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="commits")
    eval: EvalConfig = Field(EvalConfig(), description="evaluation at the end")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow")

    @model_validator(mode="after")
    def _rules(self) -> Config:
        slot, window = self.data.slot, self.data.window
        if slot is not None and window is not None and slot % window:
            raise ValueError(f"data.window {window} does not divide data.slot {slot}")
        siglip, bias = self.train.loss == "siglip", self.model.init_logit_bias
        if siglip and bias is None:
            raise ValueError(
                "train.loss siglip needs a bias, or its first steps undo the surplus of negatives; "
                "its authors begin with --model.init_logit_bias -10 --model.init_logit_scale 2.3026"
            )
        if not siglip and bias is not None:
            raise ValueError(
                f"model.init_logit_bias {bias:g}: train.loss clip has no bias; leave it out, or "
                "give --train.loss siglip"
            )
        if self.train.patch_dropout and "image" in self.init.freeze:
            raise ValueError(
                f"train.patch_dropout {self.train.patch_dropout:g} would drop patches of an image "
                "tower that init.freeze keeps from learning; give one of them"
            )
        return self
