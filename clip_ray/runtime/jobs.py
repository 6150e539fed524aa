"""Jobs that use the cluster without training on it."""

from __future__ import annotations

from pathlib import Path

from clip_ray.config import Config
from clip_ray.data.report import report
from clip_ray.errors import CheckpointError, ConfigError
from clip_ray.runtime.cluster import connected
from clip_ray.runtime.index import index_data, write_beside
from clip_ray.runtime.train import resolve
from clip_ray.storage import LocalStore
from clip_ray.tokenizer import Tokenizer
from clip_ray.train.rundir import run_store, write_manifest


def index_job(config: Config, wants_report: bool, beside: bool = False) -> None:
    """Build the manifest into the run's directory; print a report of the data where asked to.

    Args:
        config: names the run and its data.
        wants_report: read samples, and print what they are like.
        beside: leave the manifest beside the data too, where other runs find it.
    """
    config = resolve(config)
    store = run_store(config)
    if store.child("attempts").files():
        raise CheckpointError(
            f"{store.uri} holds a run that has begun, and keeps its manifest; index under another "
            "run.name"
        )
    local = Path(store.uri) if isinstance(store, LocalStore) else Path.cwd()
    with connected(config, wants_gpu=False, token_dir=local):
        manifest = index_data(config.data, store, print)
    manifest = write_manifest(store, manifest, config)
    print(f"manifest: {store.uri}/manifest.parquet (digest {manifest.digest[:12]})")
    if beside:
        print(f"beside the data: {write_beside(config.data, manifest)}")
    if not wants_report:
        return
    tokenizer = None
    if config.tokenizer.train_vocab is None:
        try:
            tokenizer = Tokenizer.from_config(config.tokenizer, config.model.text.context_length)
        except ConfigError as error:
            print(f"tokens are not counted: {error}")
    found = report(manifest, config.data, tokenizer)
    print(found.as_text())
    picture = local / "report.png"
    found.figure(picture)
    print(f"16 pairs: {picture}")
