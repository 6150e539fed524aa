"""What a block's rows hold, read from real shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from clip_ray.config import DataConfig, SourceConfig
from clip_ray.data.blocks import BlockReader, Layout
from clip_ray.data.captions import training_captions
from clip_ray.data.manifest import build_manifest
from clip_ray.data.plan import Plan
from clip_ray.images import decode, eval_crop, with_orientation
from clip_ray.tokenizer import Tokenizer
from tests.data.shard_files import jpeg, write_tar


@pytest.mark.parametrize("turned", [False, True])
def test_pictures_lie_in_blocks_as_the_config_says(tmp_path: Path, turned: bool) -> None:
    """A square picture of orientation 6: no crop's place hides whether it was turned."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 200
    data = with_orientation(simplejpeg.encode_jpeg(pixels, quality=95), 6)
    path = write_tar(tmp_path / "a.tar", [("0.jpg", data), ("0.txt", b"half of it is white")])
    config = DataConfig(sources=(SourceConfig(path=str(path)),), holdout=0, exif_orientation=turned)
    manifest = build_manifest(config)
    plan = Plan(
        manifest.train_counts,
        manifest.source.astype(np.int64),
        weights=None,
        seed=0,
        global_batch=1,
        slot=1,
        window=1,
    )
    reader = BlockReader(plan, Layout(1, 1, 1, 1), manifest, config, Tokenizer.clip(), 32)
    block = reader.read(0, 0, 0)
    assert block["valid"].all()
    picture = block["pixels"][0]
    assert (picture.transpose(2, 0, 1) == eval_crop(decode(data, 10**6, turned), 32)).all()
    # As it lies the upper half is light; turned clockwise, the right one.
    light = picture[:, 20:, 0] if turned else picture[:12, :, 0]
    assert (light > 150).all() and (block["pixels"] > 150).mean() < 0.6


@pytest.mark.parametrize(
    ("choice", "captions"), [("first", ["a", "c"]), ("random", ["a", "b", "c"])]
)
def test_a_vocabulary_is_trained_on_each_caption_that_may_be_chosen(
    tmp_path: Path, choice: str, captions: list[str]
) -> None:
    members = [("0.jpg", jpeg(0)), ("0.json", b'{"caption": ["a", "b"]}')]
    members += [("1.jpg", jpeg(1)), ("1.txt", b"c")]
    path = write_tar(tmp_path / "a.tar", members)
    config = DataConfig.model_validate(
        {"sources": [{"path": str(path)}], "holdout": 0, "caption_choice": choice}
    )
    assert list(training_captions(build_manifest(config), config, 10)) == captions
