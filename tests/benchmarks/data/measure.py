"""CPU time and private memory of loaders, each measured over all its processes."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from clip_ray.config import ClusterConfig, Config, TrainConfig
from clip_ray.data.blocks import BlockReader, read_batches
from clip_ray.runtime.cluster import Share, connected
from clip_ray.runtime.data import BatchStream
from clip_ray.runtime.recorder import Recorder
from tests.benchmarks.data.cases import CONSUMERS, GLOBAL_BATCH, IMAGE_SIZE, WINDOW, build_reader
from tests.benchmarks.data.field import loader

POLL_S = 2.0  # scanning all processes costs CPU time itself
IDLE_S = 10.0
SETTLE_S = 0.5  # for processes that end a stream after its last batch


def tree() -> list[psutil.Process]:
    """Return this process and all that descend from it."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


class TreeClock:
    """CPU seconds of a process tree, those of its ended members included where they were seen."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, float], float] = {}

    def seconds(self) -> float:
        """Return user and system time of all processes seen so far."""
        for process in tree():
            try:
                times = process.cpu_times()
                self._last[process.pid, process.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return sum(self._last.values())


def private_bytes() -> int:
    """Return the anonymous memory of the driver and of Ray's workers and actors."""
    total = 0
    for process in tree():
        try:
            if process.pid != os.getpid() and not process.name().startswith("ray::"):
                continue
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
            continue
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
    return total


def bare(reader: BlockReader, steps: range) -> float:
    """Read the batches of all ranks in this process, and return its CPU seconds."""
    torch.set_num_threads(1)
    begun = time.process_time()
    for rank in range(reader.layout.world_size):
        for batch in read_batches(reader, rank, steps.start, steps.stop):
            assert batch.valid.all()
    return time.process_time() - begun


def usual(folder: Path, short: int, long: int) -> float:
    """Return the CPU seconds that the field's loader takes from step `short` to step `long`."""
    torch.set_num_threads(1)
    clock, marks = TreeClock(), {}
    for step, (pixels, _) in enumerate(loader(folder, IMAGE_SIZE, GLOBAL_BATCH), 1):
        assert pixels.shape == (GLOBAL_BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)
        if step in (short, long):
            marks[step] = clock.seconds()
        if step == long:
            break
    return marks[long] - marks[short]


@ray.remote(num_cpus=0)
class Consumer:
    """A training worker that does nothing but take its batches."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def take(self, recorder: Any, name: str, reference: list[Any], *rest: Any) -> int:
        """Take all batches of a stream; return the number of samples."""
        batches = BatchStream(recorder, name, reference[0], *rest)
        samples = 0
        try:
            for batch in batches:
                assert batch.valid.all()
                samples += len(batch.valid)
        finally:
            batches.close()
        return samples


class Pipeline:
    """The Ray pipeline as shipped, with consumers in actors.

    Args:
        folder: for the recorder's journals.
        share: what it may use.

    Attributes:
        private_bytes: the peak of `private_bytes()` while streams ran.
        wall_s: seconds that each run took.
    """

    def __init__(self, folder: Path, share: Share) -> None:
        self._consumers = [Consumer.remote() for _ in range(CONSUMERS)]
        actor: Any = ray.remote(num_cpus=0)(Recorder)
        self._recorder = actor.remote(str(folder), None)
        self._share, self._streams = share, 0
        self._clock = TreeClock()
        self.private_bytes = 0
        self.wall_s: list[float] = []

    def idle(self) -> float:
        """Return the CPU seconds that all processes take in a second without a stream."""
        begun, time_begun = self._clock.seconds(), time.monotonic()
        time.sleep(IDLE_S)
        return (self._clock.seconds() - begun) / (time.monotonic() - time_begun)

    def run(self, reader: BlockReader, steps: range) -> float:
        """Stream the batches to the consumers, and return the CPU seconds of all processes."""
        reference = [ray.put(reader)]
        self._streams += 1
        begun, time_begun = self._clock.seconds(), time.monotonic()
        taken = [
            consumer.take.remote(
                self._recorder,
                f"stream {self._streams}",
                reference,
                reader.layout,
                rank,
                steps.start,
                steps.stop,
                self._share,
            )
            for rank, consumer in enumerate(self._consumers)
        ]
        waiting = list(taken)
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            self._clock.seconds()
            self.private_bytes = max(self.private_bytes, private_bytes())
        assert sum(ray.get(taken)) == len(steps) * GLOBAL_BATCH
        self.wall_s.append(time.monotonic() - time_begun)
        time.sleep(SETTLE_S)
        return self._clock.seconds() - begun


def main(shards: str) -> None:
    """Print the private bytes of a stream at default settings, in a driver that does only that."""
    config = Config(cluster=ClusterConfig(num_workers=CONSUMERS), train=TrainConfig(steps=1))
    with tempfile.TemporaryDirectory() as folder:
        with connected(config, False, Path(folder)) as share:
            pipeline = Pipeline(Path(folder), share)
            pipeline.run(build_reader(shards), range(4 * WINDOW))
            print(pipeline.private_bytes)


if __name__ == "__main__":
    main(sys.argv[1])
