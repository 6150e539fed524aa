"""One forward and backward in a process of its own: CPU seconds and the growth of its memory.

Run as a module: plain|tiled ROWS WIDTH; prints JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch

from clip_ray.contrastive import clip_loss
from tests.benchmarks.loss.plain import leaves, plain_loss

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def main() -> None:
    """Measure what the arguments say."""
    name, rows, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    loss = {"plain": plain_loss, "tiled": clip_loss}[name]
    loss(*leaves(64, width)).backward()  # libraries are loaded, kernels chosen
    inputs = leaves(rows, width)
    memory, begun = _peak(), time.process_time()
    loss(*inputs).backward()
    print(json.dumps({"seconds": time.process_time() - begun, "bytes": _peak() - memory}))


if __name__ == "__main__":
    main()
