"""CPU time and private memory of loaders, each measured over all its processes."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
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

POLL_S = 0.05
MEMORY_POLL_S = 2.0  # scanning all processes costs CPU time itself
SETTLED_S = 15.0  # Ray's workers, started in advance, have imported what they need
IDLE_S = 10.0


def tree() -> list[psutil.Process]:
    """Return this process and all that descend from it."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def tree_seconds() -> float:
    """Return the CPU seconds of all that descend from this process, which only measures.

    The S3 server of the tests is another machine's elsewhere.
    """
    seconds = 0.0
    for process in tree()[1:]:
        try:
            if process.name() == "moto_server":
                continue
            times = process.cpu_times()
            seconds += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return seconds


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
    marks: dict[int, float] = {}
    for step, (pixels, _) in enumerate(loader(folder, IMAGE_SIZE, GLOBAL_BATCH), 1):
        assert pixels.shape == (GLOBAL_BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)
        if step in (short, long):
            marks[step] = tree_seconds()
        if step == long:
            break
    return marks[long] - marks[short]


@ray.remote(num_cpus=0)
class Consumer:
    """A training worker that does nothing but take its batches."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def take(
        self, recorder: Any, name: str, reference: list[Any], marks: dict[int, str], *rest: Any
    ) -> int:
        """Take all batches of a stream; return the number of samples.

        `marks` names the files that are made after some steps.
        """
        batches = BatchStream(recorder, name, reference[0], *rest)
        samples = 0
        try:
            for step, batch in enumerate(batches, 1):
                assert batch.valid.all()
                samples += len(batch.valid)
                if step in marks:
                    Path(marks[step]).touch()
        finally:
            batches.close()
        return samples


@dataclass(frozen=True)
class Taken:
    """What some steps took: CPU seconds of all processes, and seconds."""

    cpu_s: float
    wall_s: float


class Pipeline:
    """The Ray pipeline as shipped, with consumers in actors.

    Args:
        folder: for the recorder's journals.
        share: what it may use.

    Attributes:
        private_bytes: the peak of `private_bytes()` while streams ran, if it was asked for.
    """

    def __init__(self, folder: Path, share: Share) -> None:
        self._consumers = [Consumer.remote() for _ in range(CONSUMERS)]
        actor: Any = ray.remote(num_cpus=0)(Recorder)
        self._folder, self._recorder = folder, actor.remote(str(folder), None)
        self._share, self._streams = share, 0
        self.private_bytes = 0

    def idle(self) -> float:
        """Return the CPU seconds that all processes take in a second without a stream."""
        time.sleep(SETTLED_S)
        begun, time_begun = tree_seconds(), time.monotonic()
        time.sleep(IDLE_S)
        return (tree_seconds() - begun) / (time.monotonic() - time_begun)

    def run(self, reader: BlockReader, steps: int, counted: range, memory: bool = False) -> Taken:
        """Stream `steps` steps to the consumers; return what those of `counted` took.

        What was read ahead of them is as much as what is read ahead in them, where the steps before
        and after them are enough to fill the pipeline.
        """
        reference = [ray.put(reader)]
        self._streams += 1
        marks = {
            step: str(self._folder / f"{self._streams}-{step}")
            for step in (counted.start, counted.stop)
        }
        taken = [
            consumer.take.remote(
                self._recorder,
                f"stream {self._streams}",
                reference,
                {} if rank else marks,
                reader.layout,
                rank,
                0,
                steps,
                self._share,
            )
            for rank, consumer in enumerate(self._consumers)
        ]
        at: dict[int, Taken] = {}
        looked = time.monotonic()
        while ray.wait(taken, num_returns=len(taken), timeout=POLL_S)[1]:
            for step, file in marks.items():
                if step not in at and os.path.exists(file):
                    at[step] = Taken(tree_seconds(), time.monotonic())
            if memory and time.monotonic() > looked + MEMORY_POLL_S:
                self.private_bytes = max(self.private_bytes, private_bytes())
                looked = time.monotonic()
        assert sum(ray.get(taken)) == steps * GLOBAL_BATCH
        first, last = at[counted.start], at[counted.stop]
        return Taken(last.cpu_s - first.cpu_s, last.wall_s - first.wall_s)


def main(shards: str) -> None:
    """Print the private bytes of a stream at default settings, in a driver that does only that."""
    config = Config(cluster=ClusterConfig(num_workers=CONSUMERS), train=TrainConfig(steps=1))
    with tempfile.TemporaryDirectory() as folder:
        with connected(config, False, Path(folder)) as share:
            pipeline = Pipeline(Path(folder), share)
            steps = 6 * WINDOW
            pipeline.run(build_reader(shards), steps, range(1, steps - WINDOW), memory=True)
            print(pipeline.private_bytes)


if __name__ == "__main__":
    main(sys.argv[1])
