"""Decode + encode without a server: what a request of many images is held against.

Run as a module: MODEL COUNT SECONDS THREADS; prints items/s as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from clip_ray.inference import Encoder
from tests.benchmarks.serving import cases

_AHEAD = 2  # groups that are decoded while one is encoded


def serial(encoder: Encoder, images: list[bytes], threads: int, seconds: float) -> float:
    """Return items/s of decoding by a pool, then encoding, group after group."""
    with ThreadPoolExecutor(threads) as pool:
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            pixels = list(pool.map(encoder.preprocess, images))
            encoder.encode_pixels(np.stack(pixels))
            done += len(images)
        return done / (time.perf_counter() - begun)


def pipelined(encoder: Encoder, images: list[bytes], threads: int, seconds: float) -> float:
    """Return items/s where the next groups are decoded while one is encoded."""
    with ThreadPoolExecutor(threads) as pool:
        groups: list[list[Future[np.ndarray]]] = []
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            while len(groups) < _AHEAD:
                groups.append([pool.submit(encoder.preprocess, image) for image in images])
            encoder.encode_pixels(np.stack([future.result() for future in groups.pop(0)]))
            done += len(images)
        return done / (time.perf_counter() - begun)


def _main() -> None:
    model, count, seconds, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    encoder = Encoder.load(Path(model), "cpu")
    pictures = cases.pictures()
    images = [pictures[index % len(pictures)] for index in range(int(count))]
    rates = {}
    for name, loop in (("serial", serial), ("pipelined", pipelined)):
        loop(encoder, images, int(threads), 0.5)  # warm
        rates[name] = loop(encoder, images, int(threads), float(seconds))
    print(json.dumps(rates))


if __name__ == "__main__":
    _main()
