"""The loss on a GPU: time, memory and TFLOP/s against the plain formulation. torch alone.

    python tests/benchmarks/loss/gpu.py [--rows 32768 65536 262144] [--width 512]

Prints a table for each matmul precision: the plain formulation, the tiles, the tiles under
torch.compile, and the sigmoid loss; a case that does not fit says so. Fewest milliseconds of some
runs; memory is the peak above the features; TFLOP/s counts what each has to multiply (plain:
12 N N d, tiles: 8, or 6 where the logits are kept; sigmoid: 6).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from clip_ray.contrastive import clip_loss, siglip_loss  # noqa: E402
from clip_ray.contrastive.tiles import KEEP_BYTES  # noqa: E402
from tests.benchmarks.loss.plain import leaves, plain_loss  # noqa: E402


def _siglip(image: Tensor, text: Tensor, scale: Tensor, fused: bool = False) -> Tensor:
    return siglip_loss(image, text, scale, scale.detach() - 24.3, fused=fused)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "plain": plain_loss,
    "tiled": clip_loss,
    "tiled, compiled": partial(clip_loss, fused=True),
    "sigmoid": _siglip,
    "sigmoid, compiled": partial(_siglip, fused=True),
}


def products(name: str, rows: int) -> int:
    """Return how many N x N x d products of two flops an implementation makes."""
    if name == "plain":
        return 6
    kept = 4 * rows * rows <= KEEP_BYTES["cuda"]
    return 3 if name.startswith("sigmoid") or kept else 4


def measure(loss: Callable[..., Tensor], rows: int, width: int, repeats: int) -> tuple[float, int]:
    """Return the least milliseconds of forward and backward, and the peak of memory."""
    inputs = leaves(rows, width, "cuda")
    best, before = float("inf"), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 2):  # the first two compile and warm up
        for leaf in inputs:
            leaf.grad = None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss(*inputs).backward()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best, torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[32768, 65536, 262144])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here; run this on a machine with a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, d = {args.width}")
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        name = {"highest": "fp32", "high": "tf32"}[precision]
        print(f"\nN | loss ({name}) | ms | x plain | peak MB | TFLOP/s")
        for rows in args.rows:
            plain_ms = None
            for label, loss in LOSSES.items():
                torch.cuda.empty_cache()
                try:
                    ms, peak = measure(loss, rows, args.width, args.repeats)
                except torch.cuda.OutOfMemoryError:
                    print(f"{rows} | {label} | does not fit | | |", flush=True)
                    continue
                plain_ms = ms if label == "plain" else plain_ms
                ratio = f"{ms / plain_ms:.2f}" if plain_ms else "-"
                rate = 2 * products(label, rows) * rows * rows * args.width / ms / 1e9
                print(
                    f"{rows} | {label} | {ms:.1f} | {ratio} | {peak / 1e6:.0f} | {rate:.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
