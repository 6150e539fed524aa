"""CPU time an image costs from shard to batch, against a bare process and the field's loader.

Marginal: of steps in the midst of a run, so that starting up does not count, nor the first use of
the memory that later batches use again; as many blocks are read ahead at the last of them as at the
first. Ratios of one run are asserted; the table shows the rest.
Each loader has all cores busy: two bare processes at a time, as two tasks read, and two of the
field's. What shares the machine only ever adds to a CPU time (caches, memory, the host of a virtual
machine), so of the rounds, in which the loaders take turns, the least counts, for each alike.
An idle Ray takes CPU time by the second, not by the image (0.06 cores, however many there are). It
counts; the table shows how much of the pipeline's it is, and the ratios without it.
"""

from __future__ import annotations

import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from clip_ray.config import ClusterConfig, Config, S3Options, TrainConfig
from clip_ray.runtime.cluster import connected
from tests.benchmarks.data.cases import GLOBAL_BATCH, WINDOW, build_reader, write_shards
from tests.benchmarks.data.measure import Pipeline, bare, usual

pytestmark = pytest.mark.bench
ROUNDS = 6
PROCESSES = 2  # of the bare reader at a time
AROUND = 3 * WINDOW  # steps before and after those that count
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Size:
    """A set of pictures, and how many steps (of whole windows) each loader takes of it."""

    side: int
    samples: int
    distinct: int
    steps: int
    usual_steps: int


SIZES = (
    Size(side=256, samples=4096, distinct=128, steps=32, usual_steps=4),
    Size(side=768, samples=1536, distinct=48, steps=16, usual_steps=2),
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, s3: S3Options) -> Iterator[Pipeline]:
    # `s3` first: Ray's processes inherit the credentials that it sets.
    folder = tmp_path_factory.mktemp("run")
    config = Config(cluster=ClusterConfig(num_workers=2, data_cpus=2), train=TrainConfig(steps=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(config, False, folder) as share:
            yield Pipeline(folder, share)


@pytest.fixture(scope="module")
def aside(s3: S3Options) -> Iterator[ProcessPoolExecutor]:
    """Processes without Ray; they inherit the credentials that `s3` sets."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        yield pool


def private_gigabytes(folder: Path) -> float:
    """Return the peak of the private memory of driver and workers, in a driver of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.data.measure", str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=180)
    return int(done.stdout) / 1e9


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.side}px")
def test_cpu_time_of_an_image(size: Size, pipeline, aside, tmp_path: Path):
    folder = write_shards(tmp_path / "shards", size.side, size.samples, size.distinct)
    kilobytes = sum(f.stat().st_size for f in folder.iterdir()) / size.samples / 1000
    reader = build_reader(str(folder))
    counted = range(AROUND, AROUND + size.steps)
    images = len(counted) * GLOBAL_BATCH

    def apart(steps: range) -> float:
        """Return the mean CPU seconds of bare processes that read the same steps at a time."""
        reading = [aside.submit(bare, reader, steps) for _ in range(PROCESSES)]
        return statistics.mean(each.result(timeout=300) for each in reading)

    apart(range(WINDOW))  # modules imported, files cached
    idle = pipeline.idle()
    rounds: dict[str, list[float]] = {"bare": [], "ray": [], "of it idle": [], "usual": []}
    for _ in range(ROUNDS):
        short = range(counted.start, counted.start + WINDOW)
        seconds = apart(range(short.start, counted.stop + WINDOW)) - apart(short)
        rounds["bare"].append(1000 * seconds / images)
        taken = pipeline.run(reader, counted.stop + AROUND, counted)
        rounds["ray"].append(1000 * taken.cpu_s / images)
        rounds["of it idle"].append(1000 * idle * taken.wall_s / images)
        print(f"  ray: {images / taken.wall_s:.0f} images/s, {taken.cpu_s / taken.wall_s:.2f} CPUs")
        first, last = 4, 4 + size.usual_steps
        seconds = aside.submit(usual, folder, first, last).result(timeout=300)
        rounds["usual"].append(1000 * seconds / ((last - first) * GLOBAL_BATCH))
    ms = {name: min(each) for name, each in rounds.items()}
    private = private_gigabytes(folder)
    print(f"\n{size.side} px, {kilobytes:.0f} kB a sample; CPU ms an image (each round)")
    for name, each in rounds.items():
        print(f"  {name:10} {ms[name]:6.3f}  ({', '.join(f'{x:.3f}' for x in each)})")
    for name, ray_ms in (("", ms["ray"]), (" less idle", ms["ray"] - ms["of it idle"])):
        of_bare, of_usual = ray_ms / ms["bare"], ray_ms / ms["usual"]
        print(f"  ray{name} / bare {of_bare:.2f}, / usual {of_usual:.2f}")
    print(f"  private memory of driver and workers {private:.2f} GB")
    assert ms["ray"] <= 1.15 * ms["bare"]
    assert ms["ray"] <= ms["usual"] / 3
    assert private <= 2.5


def test_reading_from_s3(pipeline, aside, s3, tmp_path: Path):
    """The client's CPU time, in a bare process and through Ray; moto's own is not ours."""
    import boto3

    size = SIZES[0]
    folder = write_shards(tmp_path / "shards", size.side, size.samples, size.distinct)
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    for file in folder.iterdir():
        client.upload_file(str(file), "bucket", f"bench/{file.name}")
    readers = {
        "local": build_reader(str(folder)),
        "s3": build_reader("s3://bucket/bench/*.tar", s3),
    }
    steps = range(WINDOW, 4 * WINDOW)
    counted = range(AROUND, AROUND + size.steps)

    def bare_ms(name: str) -> float:
        seconds = aside.submit(bare, readers[name], steps).result(timeout=120)
        return 1000 * seconds / (len(steps) * GLOBAL_BATCH)

    def ray_ms(name: str) -> float:
        taken = pipeline.run(readers[name], counted.stop + AROUND, counted)
        return 1000 * taken.cpu_s / (len(counted) * GLOBAL_BATCH)

    print()
    ratios = {}
    for kind, measure in (("bare", bare_ms), ("ray", ray_ms)):
        rounds: dict[str, list[float]] = {name: [] for name in readers}
        for round_ in range(1 + ROUNDS):
            for name in readers:
                ms = measure(name)
                if round_:  # the first one imports modules
                    rounds[name].append(ms)
        ms_of = {name: min(each) for name, each in rounds.items()}
        ratios[kind] = ms_of["s3"] / ms_of["local"]
        shown = ", ".join(f"{name} {ms:.3f}" for name, ms in ms_of.items())
        print(f"  {kind}: CPU ms an image: {shown}; s3 / local {ratios[kind]:.2f}  {rounds}")
    assert ratios["bare"] <= 1.2
    assert ratios["ray"] <= 1.2
