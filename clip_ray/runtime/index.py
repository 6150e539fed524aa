"""Indexing shards with Ray Data.

Shards are dealt to tasks some at a time; a task hands on what it has found every second and at its
end, in no order, so that an index that is killed goes on from what it has recorded, and the bar
moves. A shard takes from a millisecond (local) to minutes (a tar on S3 that is read whole).

A few small shards are indexed where they are asked for: sooner than a task begins.
"""

from __future__ import annotations

import functools
import logging
import pickle
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from clip_ray.config import DataConfig
from clip_ray.data.earlier import BESIDE, Earlier, folder_of, read_earlier
from clip_ray.data.indexing import Job, Outcome
from clip_ray.data.manifest import Manifest, build_manifest
from clip_ray.data.manifest_file import save_manifest
from clip_ray.errors import ClipRayError, ClusterError, ConfigError
from clip_ray.storage import Store, open_store

STALL_S = 600.0
EVERY_S = 1.0  # between two results of a task
TASK_SHARDS = 256  # of one task, at most
TASKS_PER_CPU = 16  # at least, where the shards suffice
FEW, FEW_BYTES = 32, 64 << 20  # at most, indexed before a task would begin: shards, their size
ATTEMPTS = 3  # in a row that bring nothing
SILENT_BELOW = 8  # shards that are indexed before a bar could be read
_SHOWN = 5  # shards named in one line
Indexer = Callable[[Job], Outcome]
_LOST = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)


def index_data(
    data: DataConfig,
    store: Store,
    say: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Return the manifest of the configured sources; shows a bar and says what was found.

    Args:
        data: the sources.
        store: the run's directory: an index that was interrupted goes on from what it left there.
        say: prints a line.
        check: called after each shard; what it raises ends the indexing.

    Raises:
        DataError: see `data.manifest.build_manifest`.
        ClusterError: no shard was finished for ten minutes, or shards take their processes along.
    """
    earlier = read_earlier(store, data, say)
    with _Bar() as bar:

        def show(done: int, total: int) -> None:
            check()
            bar.show(done, total)

        manifest = build_manifest(data, _over_the_cluster, show, earlier)
    say(_summary(manifest, earlier))
    for group in manifest.same_keys()[:_SHOWN]:
        names = ", ".join(manifest.paths.text(row) for row in group[:_SHOWN])
        more = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
        say(
            f"warning: {names}{more} have the same sample keys: data.exclude, select and holdout "
            "cannot tell their samples apart"
        )
    return manifest


def _summary(manifest: Manifest, earlier: Earlier) -> str:
    held, by_sidecar = int(manifest.holdout.sum()), int((manifest.marks == 0).sum())
    parts = [
        f"indexed {len(manifest)} shards: {manifest.total} training samples, {held} held out",
    ]
    if manifest.skipped:
        parts.append(f"skipped: {', '.join(f'{n} {why}' for why, n in manifest.skipped.items())}")
    if any(manifest.invalid_utf8):
        parts.append(f"{sum(manifest.invalid_utf8)} captions not UTF-8")
    if by_sidecar:
        parts.append(f"{by_sidecar} tars by their sidecars, each streamed once by who reads it")
    if earlier.kept:
        parts.append(f"{earlier.kept} shards kept from an earlier index, {earlier.scanned} scanned")
    return "; ".join(parts)


def write_beside(data: DataConfig, manifest: Manifest) -> str:
    """Write a manifest into the directory of the first source; return where it is.

    Raises:
        ConfigError: the directory cannot be written to.
    """
    store = open_store(folder_of(data.sources[0].path), data.s3)
    try:
        save_manifest(manifest, store, BESIDE)
    except OSError as error:
        raise ConfigError(
            f"{store.uri} cannot be written to ({error}); leave --beside out: the run's directory "
            "has the manifest"
        ) from error
    return f"{store.uri}/{BESIDE}"


class _Bar:
    """A progress bar over all shards, those of an earlier index included."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` shards are indexed."""
        if self._bar is None:
            silent = total - done < SILENT_BELOW
            self._bar = tqdm(total=total, initial=done, desc="indexing shards", disable=silent)
        self._bar.update(done - self._bar.n)


def _over_the_cluster(function: Indexer, jobs: list[Job]) -> Iterable[Outcome]:
    if len(jobs) <= FEW and sum(job.file.size for job in jobs) <= FEW_BYTES:
        return map(function, jobs)
    return _over_tasks(function, jobs)


def _over_tasks(function: Indexer, jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Yield the results of jobs in any order; tasks of Ray Data make them.

    A task whose process is lost leaves some shards, as an execution does. What is left is begun
    anew, until only shards are left that take their processes along.
    """
    left = {job.number: job for job in jobs}
    in_vain, why = 0, "its results did not come"
    while left:
        before = len(left)
        try:
            for outcome in _execution(function, list(left.values()), tolerant=not in_vain):
                if left.pop(outcome.number, None) is not None:
                    yield outcome
        except _LOST as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[-1]
        in_vain = 0 if len(left) < before else in_vain + 1
        if in_vain == ATTEMPTS:
            paths = [job.file.path for job in left.values()]
            more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
            raise ClusterError(
                f"{', '.join(paths[:_SHOWN])}{more}: not indexed, {ATTEMPTS} times in a row the "
                f"process that read them was lost ({why}); is a node out of memory?"
            )


def _execution(function: Indexer, jobs: list[Job], tolerant: bool) -> Iterator[Outcome]:
    """Yield the results of jobs, but for those of tasks that are lost, or until one is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    cpus = max(int(ray.cluster_resources().get("CPU", 1)), 1)
    each = min(max(len(jobs) // (TASKS_PER_CPU * cpus), 1), TASK_SHARDS)
    chunks = [pickle.dumps(jobs[at : at + each]) for at in range(0, len(jobs), each)]
    # Put once: it holds the lists of keys, which may be long. In a list, or Ray would unpack it.
    reference = ray.put(function)
    results: Any = _execute.options(scheduling_strategy=here).remote([reference], chunks, tolerant)
    try:
        while ray.wait([results], timeout=STALL_S)[0]:
            try:
                some = ray.get(next(results))
            except StopIteration:
                return
            for result in pickle.loads(some):
                if isinstance(result, Exception):
                    raise result
                yield result
        raise ClusterError(
            f"no shard was indexed within {STALL_S:g} s; is the cluster full, or the storage down?"
        )
    finally:
        if ray.is_initialized():  # else this would begin a new one
            ray.cancel(results)


@ray.remote(num_cpus=0, max_retries=0)
def _execute(boxed: list[ray.ObjectRef], chunks: list[bytes], tolerant: bool) -> Iterator[bytes]:
    """Run an execution of Ray Data; yield pickled lists of results, as they come.

    A process of its own: an execution in the driver could neither be waited for with a bound nor
    ended.
    """
    import ray.data

    def run(batch: pa.Table) -> Iterator[pa.Table]:
        for chunk in batch["item"].to_pylist():
            for results in run_some(boxed[0], chunk):
                yield pa.table({"results": [pickle.dumps(results)]})

    with ray.data.DataContext.current(_context(tolerant)):
        dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
            # Not repeated by Ray, which takes for granted that it yields the same once more.
            run,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            max_retries=0,
        )
    # Without a prefetched batch: each would wait for the next one before it is handed on.
    tables: Iterable[Any] = dataset.iter_batches(
        prefetch_batches=0, batch_size=None, batch_format="pyarrow"
    )
    for table in tables:
        (results,) = table["results"].to_pylist()
        yield results


def _context(tolerant: bool) -> ray.data.DataContext:
    """Return the settings of an execution that is silent: the bar is ours."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)  # errors are tasks that are lost, which we count
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A shard may take minutes, which is no issue; what a task uses is not looked at.
    context.issue_detectors_config.detectors = []
    context.memory_usage_poll_interval_s = None
    context.max_errored_blocks = -1 if tolerant else 0
    context.target_max_block_size = 1  # what a task yields is handed on as it comes
    return context


def run_some(reference: ray.ObjectRef, chunk: bytes) -> Iterator[list[Any]]:
    """Yield the results of pickled jobs, those of a second together; called in tasks.

    An error is a result, and the last: what is raised is for Ray Data a task that is lost.
    """
    done: list[Any] = []
    begun = time.monotonic()
    try:
        function = _function(reference)
        for job in pickle.loads(chunk):
            done.append(function(job))
            if time.monotonic() - begun >= EVERY_S:
                yield done
                done, begun = [], time.monotonic()
    except Exception as error:
        done.append(_portable(error))
    if done:
        yield done


def _portable(error: Exception) -> Exception:
    """Return an error that can be pickled; one that is not a user's tells where it was raised."""
    if not isinstance(error, ClipRayError):
        error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(traceback.format_exc())
    return error


@functools.lru_cache(maxsize=2)
def _function(reference: ray.ObjectRef) -> Indexer:
    """Fetch the function once per process."""
    function: Indexer = ray.get(reference)
    return function
