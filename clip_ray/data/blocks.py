"""Blocks: the plan's rows as decoded arrays, cut for the workers.

A window's rows are dealt to W workers: of each step's G rows, worker r takes the b = ceil(G/W)
rows from r·b on; where W does not divide G, the rows beyond G are void. What a worker needs of a
window (K steps x b rows) travels as one or more equal *blocks*, small enough for the object
store. A block is a function of (plan, layout, window, chunk, rank): whoever reads it, and however
often, it holds the same rows in the same shapes. This file needs no Ray; `runtime.data` streams
the blocks through Ray Data.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from clip_ray.config import DataConfig
from clip_ray.data.manifest import Manifest
from clip_ray.data.plan import Ints, Plan
from clip_ray.data.shards import BadSample, Sample, read_ordinals
from clip_ray.data.threads import SHARDS
from clip_ray.images import ImageError, decode, train_crop
from clip_ray.tokenizer import Tokenizer

BLOCK_BYTES = 40 << 20  # Ray takes some 25 ms of CPU time for each (tests/benchmarks/data)
MOST_BYTES = 64 << 20  # of a block that is larger because it holds a whole slot
Block = dict[str, NDArray[Any]]


def store_bytes(data_cpus: float, workers: float, streamed: float) -> float:
    """Return the object store that the blocks under way on a node need.

    Args:
        data_cpus: reading tasks at a time.
        workers: consumers.
        streamed: share of the store that blocks may fill.
    """
    return (8 + 3 * (data_cpus + workers)) * BLOCK_BYTES / streamed


@dataclass(frozen=True)
class Layout:
    """How the rows of a step are dealt to workers and cut into blocks.

    A slot gives `share` neighbouring rows to each step. Blocks are cut between slots, counted from
    the first row of the step, so that only the edge between two workers cuts a slot: what is cut
    is read by both.

    Attributes:
        world_size: W, number of workers.
        rows: b = ceil(G/W), rows of a step on each worker, void ones included.
        window: K, steps of a window.
        chunks: blocks that a worker's share of a window travels in.
        share: R/K, rows that a slot gives to a step.
        row_bytes: size of a row's pixels and ids; only streams ask for it.
    """

    world_size: int
    rows: int
    window: int
    chunks: int
    share: int = 1
    row_bytes: int = 0

    @classmethod
    def fit(cls, plan: Plan, world_size: int, row_bytes: int) -> Layout:
        """Return the layout whose blocks stay near 40 MB."""
        rows = -(-plan.global_batch // world_size)
        share = plan.slot // plan.window
        height = max(BLOCK_BYTES // (plan.window * row_bytes), 1)
        if share > height:
            # A slot that is cut in two is read twice; a huge one has to be.
            if share * plan.window * row_bytes <= MOST_BYTES:
                height = share
            else:
                share = 1
        one = cls(world_size, rows, plan.window, 1, share, row_bytes)
        return replace(one, chunks=-(-one.rows_per_block // (height // share * share)))

    @property
    def rows_per_block(self) -> int:
        """Rows of a step in one block; what a block does not need of them is void."""
        # Where workers begin within slots, the longest way to a worker's end begins a slot before.
        begun = self.share - 1 if self.world_size > 1 and self.rows % self.share else 0
        return -(-(self.rows + begun) // (self.chunks * self.share)) * self.share

    @property
    def block_bytes(self) -> int:
        """Size of a block's pixels and ids, to which a few bytes a row come."""
        assert self.row_bytes, "a layout for streams"
        return self.window * self.rows_per_block * self.row_bytes

    def span(self, rank: int, chunk: int) -> range:
        """Return the rows of a step, counted from the step's first, that a block holds."""
        first, stop = rank * self.rows, (rank + 1) * self.rows
        cut = first - first % self.share + chunk * self.rows_per_block
        return range(min(max(first, cut), stop), min(cut + self.rows_per_block, stop))

    @property
    def blocks_per_window(self) -> int:
        """Blocks of a window over all workers."""
        return self.chunks * self.world_size

    def block_at(self, number: int) -> tuple[int, int, int]:
        """Return (window, chunk, rank) of block `number` of the stream that starts at window 0.

        Ranks turn fastest: dealing the stream's blocks round robin gives each worker its own.
        """
        window, rest = divmod(number, self.blocks_per_window)
        chunk, rank = divmod(rest, self.world_size)
        return window, chunk, rank


@dataclass(frozen=True)
class Batch:
    """A worker's rows of one step.

    Attributes:
        pixels: (b, 3, S, S) uint8, channels last in memory.
        ids: (b, L) int32 token ids.
        valid: (b,) bool; false for undecodable samples and padding.
        shard: (b,) int64, -1 for padding.
        place: (b,) int64, index among the shard's training samples.
        image_id: (b,) int64, a hash of the image file, or None where it is not asked for.
        bad: the undecodable samples: shard path, key and reason of each.
        truncated: captions cut at the context length.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    valid: torch.Tensor
    shard: Ints
    place: Ints
    image_id: Ints | None
    bad: tuple[dict[str, str], ...]
    truncated: int


@dataclass(frozen=True)
class _Piece:
    """Rows of a block that come from one shard.

    Attributes:
        path: the shard.
        target: (n,) rows of the block.
        position: (n,) their positions in the plan.
        which: (n,) their indices in `samples`.
        samples: one sample can stand twice in a window that straddles two passes.
    """

    path: str
    target: Ints
    position: Ints
    which: Ints
    samples: list[Sample | BadSample]


@dataclass(frozen=True)
class Fetched:
    """A block as it lies in the shards: the files of its rows, not yet decoded."""

    shard: Ints
    place: Ints
    pieces: list[_Piece]


@dataclass(frozen=True)
class BlockReader:
    """Reads blocks: everything that turns (window, chunk, rank) into arrays.

    Attributes:
        plan: the order of samples.
        layout: how they are dealt.
        manifest: the shards.
        config: how they are read.
        tokenizer: captions to ids.
        image_size: S, in pixels.
        image_ids: hash each image file, so that duplicates can be told.
    """

    plan: Plan
    layout: Layout
    manifest: Manifest
    config: DataConfig
    tokenizer: Tokenizer
    image_size: int
    image_ids: bool = False

    def read(self, window: int, chunk: int, rank: int, arrays: Arrays | None = None) -> Block:
        """Return the arrays of one block, K·rows_per_block rows, ordered by step.

        Args:
            window: as `Layout.block_at` returns it.
            chunk: likewise.
            rank: likewise.
            arrays: what the pixels are written to; none = fresh memory.
        """
        return self.decode(self.fetch(window, chunk, rank), arrays)

    def fetch(self, window: int, chunk: int, rank: int) -> Fetched:
        """Read what a block is made of; waits for the store, and takes little of the CPU.

        What a shard contains is no error here; an OSError means that the storage failed.
        """
        layout, plan = self.layout, self.plan
        size = layout.window * layout.rows_per_block
        fetched = Fetched(np.full(size, -1, np.int64), np.full(size, -1, np.int64), [])
        span = layout.span(rank, chunk)
        span = range(span.start, min(span.stop, plan.global_batch))
        if not span:
            return fetched
        share = plan.slot // plan.window
        slots = (span.start // share, -(-span.stop // share))
        rows = plan.window_rows(window, *slots)
        mine = slice(span.start - slots[0] * share, span.stop - slots[0] * share)
        shard, place = (
            a.reshape(-1, plan.window, share)
            .swapaxes(0, 1)
            .reshape(plan.window, -1)[:, mine]
            .ravel()
            for a in (rows.shard, rows.place)
        )
        steps = window * plan.window + np.arange(plan.window)
        position = (steps[:, None] * plan.global_batch + np.array(span)).ravel()
        height = np.arange(plan.window)[:, None] * layout.rows_per_block
        target = (height + np.arange(len(span))).ravel()
        fetched.shard[target], fetched.place[target] = shard, place

        def piece(index: int) -> _Piece:
            entry = self.manifest.shard(index)
            chosen = np.flatnonzero(shard == index)
            chosen = chosen[np.argsort(place[chosen], kind="stable")]
            wanted, which = np.unique(place[chosen], return_inverse=True)
            ordinals = self.manifest.train_ordinals(index, wanted)
            source = self.config.sources[entry.source]
            samples = read_ordinals(entry, source, self.config.s3, ordinals)
            return _Piece(entry.path, target[chosen], position[chosen], which, samples)

        shards = np.unique(shard).tolist()
        if len(shards) > 1 and self._remote:
            fetched.pieces.extend(SHARDS.map(piece, shards))
        else:
            fetched.pieces.extend(map(piece, shards))
        return fetched

    @property
    def _remote(self) -> bool:
        return any(source.path.startswith("s3://") for source in self.config.sources)

    def decode(self, fetched: Fetched, arrays: Arrays | None = None) -> Block:
        """Return the arrays of a block; what cannot be decoded makes void rows.

        Args:
            fetched: the block's files.
            arrays: what the pixels are written to; none = fresh memory.
        """
        block = self._empty(fetched, arrays or Arrays())
        captions: list[str] = []
        captioned: list[int] = []
        # One for all rows, set to what a new one begins with: to make one asks for entropy.
        bits = np.random.Philox(key=[self.plan.seed, 0])
        rng, fresh = np.random.Generator(bits), cast(Any, bits.state)
        for piece in fetched.pieces:
            decoded: dict[int, NDArray[np.uint8] | BadSample] = {}
            times = np.bincount(piece.which)
            for at, position, which in zip(piece.target, piece.position, piece.which, strict=True):
                sample = piece.samples[which]
                pixels = decoded[which] if which in decoded else self._decode(sample)
                if times[which] > 1:
                    decoded[which] = pixels
                if isinstance(pixels, BadSample):
                    block["bad"][at] = json.dumps(
                        {"shard": piece.path, "key": pixels.key, "reason": pixels.reason}
                    )
                    continue
                assert isinstance(sample, Sample)
                # By position: the same crop and caption whoever reads the block, and how often.
                fresh["state"]["key"][1] = position
                bits.state = fresh
                margin = self.config.crop_margin
                crop = train_crop(pixels, self.image_size, rng, margin)
                block["pixels"][at] = crop.transpose(1, 2, 0)
                block["valid"][at] = True
                if self.image_ids:
                    block["image_id"][at] = _hash(sample.image)
                captions.append(self._caption(sample, rng))
                captioned.append(at)
        if captions:
            block["ids"][captioned], block["truncated"][captioned] = self.tokenizer(captions)
        block["pixels"][~block["valid"]] = 0
        return block

    def _empty(self, fetched: Fetched, arrays: Arrays) -> Block:
        rows, side, length = len(fetched.shard), self.image_size, self.tokenizer.context_length
        block: Block = {
            # As the decoder leaves them.
            "pixels": arrays.take("pixels", (rows, side, side, 3), np.uint8),
            "ids": np.zeros((rows, length), np.int32),
            "valid": np.zeros(rows, bool),
            "truncated": np.zeros(rows, bool),
            "shard": fetched.shard,
            "place": fetched.place,
            "bad": np.full(rows, "", dtype=object),
        }
        if self.image_ids:
            block["image_id"] = np.zeros(rows, np.int64)
        return block

    def _caption(self, sample: Sample, rng: np.random.Generator) -> str:
        caption, templates = sample.caption, self.config.templates
        if self.config.caption_choice == "random" and sample.others:
            caption = (caption, *sample.others)[int(rng.integers(1 + len(sample.others)))]
        if not templates:
            return caption
        return templates[int(rng.integers(len(templates)))].replace("{c}", caption)

    def _decode(self, sample: Sample | BadSample) -> NDArray[np.uint8] | BadSample:
        if isinstance(sample, BadSample):
            return sample
        try:
            return decode(sample.image, self.config.max_pixels, self.config.exif_orientation)
        except ImageError as error:
            return BadSample(sample.key, error.reason)


def _hash(image: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little", signed=True)


class Arrays:
    """Arrays that are used again once nobody else has them: fresh pages cost more than a copy."""

    def __init__(self) -> None:
        self._kept: dict[str, list[NDArray[Any]]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an array of any content; a name always comes with the same shape and dtype."""
        kept = self._kept.setdefault(name, [])
        for array in kept:
            # Its list, this loop and getrefcount itself have it; a tensor or a view would, too.
            if sys.getrefcount(array) == 3:
                return array
        kept.append(np.empty(shape, dtype))
        return kept[-1]


def assemble(blocks: Iterable[Block], layout: Layout, rank: int, arrays: Arrays) -> Iterator[Batch]:
    """Yield the K batches of a window from a worker's blocks of it, in chunk order.

    Each block is copied as it comes and then let go: it may lie in the object store.

    Args:
        blocks: the blocks, `layout.chunks` of them; nothing is yielded where they end early.
        layout: how they were cut.
        rank: the worker.
        arrays: what the batches are made of; the same for all of a worker's windows.
    """
    height, rows = layout.rows_per_block, layout.rows
    steps: list[Block] = [{} for _ in range(layout.window)]
    chunk = -1
    for chunk, block in enumerate(blocks):
        span = layout.span(rank, chunk)
        target = slice(span.start - rank * rows, span.stop - rank * rows)
        for k, step in enumerate(steps):
            source = slice(k * height, k * height + len(span))
            for name, array in block.items():
                if chunk == 0:
                    kind = object if array.dtype.kind == "U" else array.dtype
                    step[name] = arrays.take(name, (rows, *array.shape[1:]), kind)
                step[name][target] = array[source]
    if chunk + 1 < layout.chunks:
        return
    while steps:
        step = steps.pop(0)
        yield Batch(
            pixels=torch.from_numpy(step["pixels"]).movedim(-1, 1),
            ids=torch.from_numpy(step["ids"]),
            valid=torch.from_numpy(step["valid"]),
            shard=step["shard"],
            place=step["place"],
            image_id=step.get("image_id"),
            bad=tuple(json.loads(line) for line in step["bad"] if line),
            truncated=int(step["truncated"].sum()),
        )


def read_batches(
    reader: BlockReader, rank: int, first_step: int, last_step: int
) -> Iterator[Batch]:
    """Yield a worker's batches of steps `[first_step, last_step)`, read in this process.

    The same batches as the Ray pipeline delivers; for a bare process, tests and benchmarks.
    """
    window_length = reader.layout.window
    blocks_of, arrays = Arrays(), Arrays()
    for window in range(first_step // window_length, -(-last_step // window_length)):
        blocks = (reader.read(window, c, rank, blocks_of) for c in range(reader.layout.chunks))
        for k, batch in enumerate(assemble(blocks, reader.layout, rank, arrays)):
            if first_step <= window * window_length + k < last_step:
                yield batch
