"""A run's directory: what is in it, whether it may be resumed, and what a run is made of.

The directory is the run: the same name and run-defining config resume it, whatever machine asks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import yaml
from pydantic import ValidationError

from clip_ray.config import Config
from clip_ray.config.load import dump_config, flatten
from clip_ray.data.blocks import BlockReader, Layout
from clip_ray.data.captions import training_captions
from clip_ray.data.earlier import MANIFEST, PARTS
from clip_ray.data.manifest import Manifest
from clip_ray.data.manifest_file import load_manifest, save_manifest
from clip_ray.data.plan import Plan, default_sizes
from clip_ray.data.rewrite import coarse_sources, sparse_sources
from clip_ray.errors import CheckpointError, ConfigError
from clip_ray.storage import Store, open_store, split_uri
from clip_ray.tokenizer import Tokenizer
from clip_ray.train.journal import Row

VOCABULARY_CAPTIONS = 1_000_000  # captions that a vocabulary is trained on, at most
NOT_DEFINING = (
    "cluster.",
    "tracking.",
    "checkpoint.",
    "eval.",
    "run.storage",
    "run.extend",
    "run.s3.",
    "data.s3.",
    "data.max_bad_fraction",
    "train.max_nonfinite",
    "train.micro_batch",
    "train.device",
    "train.compile",
    "train.grad_checkpointing",
    "train.profile_steps",
)
"""Settings that may change between two starts of one run: none of them moves a sample or, but for
rounding, a weight."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        config: resolved; the model's vocabulary size is the tokenizer's.
        store: its directory.
        manifest: its data.
        tokenizer: captions to ids.
        plan: which samples each step sees.
        total_steps: its length.
    """

    config: Config
    store: Store
    manifest: Manifest
    tokenizer: Tokenizer
    plan: Plan
    total_steps: int

    def layout(self, world_size: int) -> Layout:
        """Return how blocks are dealt to `world_size` workers."""
        side, length = self.config.model.vision.image_size, self.tokenizer.context_length
        return Layout.fit(self.plan, world_size, 3 * side * side + 4 * length)

    def reader(self, world_size: int) -> BlockReader:
        """Return the reader of the run's blocks for `world_size` workers."""
        return BlockReader(
            self.plan,
            self.layout(world_size),
            self.manifest,
            self.config.data,
            self.tokenizer,
            self.config.model.vision.image_size,
            image_ids=self.config.train.mask_duplicates,
        )


def run_store(config: Config) -> Store:
    """Return the run's directory, `<run.storage>/<run.name>`."""
    return open_store(config.run.storage, config.run.s3).child(config.run.name)


def defining(config: Config) -> dict[str, Any]:
    """Return the settings that make the run what it is, with dotted keys."""
    flat = flatten(config.model_dump(mode="json"))
    return {k: v for k, v in flat.items() if not k.startswith(NOT_DEFINING)}


def claim(store: Store, config: Config) -> bool:
    """Make the directory this config's; return whether there was a run in it.

    A directory in which no attempt has begun holds nothing to keep: it is begun anew.

    Raises:
        CheckpointError: it holds a run whose defining settings differ; the message lists them.
    """
    existed = bool(store.child("attempts").files())
    if not existed:
        store.delete("tokenizer.json")
        store.delete("initial.json")
    if existed:
        old = read_config(store)
        before, after = defining(old), defining(config)
        changed = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
        if changed:
            lines = [f"  {k}: was {before.get(k)!r}, now {after.get(k)!r}" for k in changed]
            raise CheckpointError(
                f"run {store.uri} exists with other settings:\n"
                + "\n".join(lines)
                + f"\ngive them back, or give this run another name: --run.name {config.run.name}-2"
            )
    store.write("config.yaml", dump_config(config).encode())
    return existed


def read_config(store: Store) -> Config:
    """Return the configuration that a run was started with last. Raises CheckpointError."""
    try:
        return Config.model_validate(yaml.safe_load(store.read("config.yaml")))
    except (ValidationError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{store.uri}/config.yaml cannot be read by this version ({error}); give this run "
            "another name (--run.name)"
        ) from error


def prepare(
    store: Store, config: Config, build_manifest: Callable[[], Manifest], say: Callable[[str], None]
) -> Run:
    """Return the run with its manifest and tokenizer, made on its first start, read later.

    Args:
        store: the run's directory.
        config: the run's configuration.
        build_manifest: called where the run has no manifest yet.
        say: told what is being done, for the terminal.
    """
    begun = bool(store.child("attempts").files())
    manifest = read_manifest(store) if begun or _is_indexed(store, config) else None
    if manifest is None:
        manifest = write_manifest(store, build_manifest(), config)
    for line in sparse_sources(manifest):
        say(f"warning: {line}")
    if store.exists("tokenizer.json"):
        tokenizer = Tokenizer.load(store.read("tokenizer.json"))
    else:
        captions = None
        if config.tokenizer.train_vocab is not None:
            say(f"training a vocabulary of {config.tokenizer.train_vocab} on the captions")
            captions = training_captions(manifest, config.data, VOCABULARY_CAPTIONS)
        tokenizer = Tokenizer.from_config(
            config.tokenizer, config.model.text.context_length, captions
        )
        store.write("tokenizer.json", tokenizer.to_bytes())
    text = config.model.text.model_copy(update={"vocab_size": tokenizer.vocab_size})
    model = config.model.model_copy(update={"text": text})
    config = config.model_copy(update={"model": model})
    plan = build_plan(manifest, config)
    for line in coarse_sources(manifest, plan.slot):
        say(f"warning: {line}")
    return Run(config, store, manifest, tokenizer, plan, total_steps(config, manifest.total))


def read_manifest(store: Store) -> Manifest | None:
    """Return the run's manifest; None before it is built."""
    return load_manifest(store, MANIFEST) if store.exists(MANIFEST) else None


def write_manifest(store: Store, manifest: Manifest, config: Config) -> Manifest:
    """Write a run's manifest and the settings that it was built with; drop the index's parts.

    Returns the manifest as it is read back: of what it was built from, nothing is needed.
    """
    saved = save_manifest(manifest, store, MANIFEST)
    store.write("manifest.json", _index_settings(config))
    store.delete(PARTS)
    return saved


def _index_settings(config: Config) -> bytes:
    """Return the settings that decide which samples there are, and the lists of keys."""
    data = config.data
    lists = [data.exclude, *(source.select for source in data.sources)]
    content = {
        "sources": [
            # Without conditions, as before there were any.
            source.model_dump(
                exclude={"weight", "max_passes"} | (set() if source.where else {"where"})
            )
            for source in data.sources
        ],
        "holdout": data.holdout,
        "salvage": data.salvage,
        "copies": data.copies,
        "sidecars": data.sidecars,
        "lists": [
            hashlib.sha256(open_store(folder, data.s3).read(name)).hexdigest()
            for folder, name in (split_uri(path) for path in lists if path)
        ],
    }
    return json.dumps(content, indent=1).encode()


def _is_indexed(store: Store, config: Config) -> bool:
    """Tell whether jobs/index.py has left the manifest of exactly these settings."""
    if not store.exists("manifest.json") or not store.exists(MANIFEST):
        return False
    try:
        return store.read("manifest.json") == _index_settings(config)
    except OSError:
        return False  # a list is missing: building the manifest says which


def build_plan(manifest: Manifest, config: Config) -> Plan:
    """Return the plan of a config over a manifest.

    Raises:
        ConfigError: sizes do not fit, or the run would outlast the passes over its sources.
    """
    G, data = config.train.global_batch, config.data
    slot, window = default_sizes(manifest.total, G)
    window = data.window or (min(window, data.slot) if data.slot else window)
    slot = data.slot or (slot if slot % window == 0 else window)
    weights = [source.weight for source in data.sources if source.weight is not None]
    plan = Plan(
        manifest.train_counts,
        manifest.source.astype("int64"),
        weights=tuple(weights) or None,
        max_passes=tuple(source.max_passes for source in data.sources) if weights else None,
        seed=config.run.seed,
        global_batch=G,
        slot=slot,
        window=window,
        manifest_digest=manifest.digest,
    )
    steps = total_steps(config, manifest.total)
    if plan.steps is not None and steps > plan.steps:
        raise ConfigError(_outlasts(manifest, config, plan, steps))
    return plan


def _outlasts(manifest: Manifest, config: Config, plan: Plan, steps: int) -> str:
    sizes = [row["train"] for row in manifest.by_source()]
    parts = [
        f"{source.path} {source.max_passes} x {size}"
        for source, size in zip(config.data.sources, sizes, strict=True)
    ]
    return (
        f"the run has {steps} steps of {plan.global_batch} samples, but with "
        f"data.sources[].max_passes the data ends after {plan.steps} (passes x samples: "
        f"{', '.join(parts)}; whole windows of {plan.window} steps); shorten the run, raise a "
        "max_passes, or leave it out for one source"
    )


def total_steps(config: Config, samples_per_pass: int) -> int:
    """Return the run's length in steps, `run.extend` included."""
    train, G = config.train, config.train.global_batch
    if train.steps is not None:
        steps = train.steps
    elif train.samples is not None:
        steps = math.ceil(train.samples / G)
    else:
        assert train.passes is not None
        # As written: 1.1 passes over 100 samples in steps of 10 are 11 steps, not 12.
        steps = math.ceil(Fraction(str(train.passes)) * samples_per_pass / G)
    return steps + config.run.extend


def read_summary(store: Store) -> Row | None:
    """Return the run's summary; None before its first end."""
    if not store.exists("summary.json"):
        return None
    summary: Row = json.loads(store.read("summary.json"))
    return summary
