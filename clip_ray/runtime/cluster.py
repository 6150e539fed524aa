"""Reaching a Ray cluster, sharing it out between training and data, and finding paths on it.

The address is `cluster.address`, else RAY_ADDRESS, else a local Ray of our own. Ray's automatic
detection is never used: an address file that a killed Ray left behind would mislead it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import secrets
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clip_ray.config import ClusterConfig, Config
from clip_ray.errors import ClusterError, ConfigError
from clip_ray.runtime import cpu_policy

MIN_WORKER_CPUS = 0.25  # below this a worker and its process threads only fight for the core
ROOM_S = 5.0  # a placement group that the nodes have room for is there in milliseconds
STREAM_CPUS = 128  # reading tasks that one stream's coordinator, a single process, keeps busy
# What the processes of our own Ray find in their environment.
LOCAL_ENVIRONMENT = {
    # Ray Data's loop, ten times a second, sees a block or a task's end one turn later when a thread
    # of its own fetches what is told of each block, and a CPU waits as long for its next task.
    "RAY_DATA_METADATA_PREFETCH_ON_THREAD": "0",
    # Ray's 15 leaves workers 3 % of a CPU that something else on the machine wants, too.
    "RAY_worker_niceness": "0",
    # What Ray tells of itself and its tasks goes to a dashboard, and ours has none.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    # Its log monitor looks for new files ten times a second, to print in drivers; ours does not.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",
}
_PACKAGES = "working_dir_files"  # folder name of Ray's unpacked working directories


@dataclass(frozen=True)
class Share:
    """How CPUs and GPUs are dealt out.

    Attributes:
        num_workers: training workers.
        worker_cpus: CPUs reserved by each.
        worker_gpus: GPUs of each, 0 or 1.
        data_cpus: CPUs left to reading and decoding.
        threads: torch threads of a worker.
        streams: ordered streams that deal blocks to the workers.
        stream_cpus: CPUs of each stream.
        object_store: share of the object store that streamed blocks may fill.
        data_label: key and value of the label of nodes that may read; none = all nodes.
    """

    num_workers: int
    worker_cpus: float
    worker_gpus: int
    data_cpus: float
    threads: int
    streams: int = 1
    stream_cpus: float = 1.0
    object_store: float = 0.5
    data_label: tuple[str, str] | None = None

    def describe(self) -> str:
        """Return the arithmetic as a sentence."""
        each = f"{self.worker_cpus:g} CPU" + (" + 1 GPU" if self.worker_gpus else "")
        streams = "1 stream" if self.streams == 1 else f"{self.streams} streams"
        return (
            f"{self.num_workers} workers x {each}; data: {streams} x {self.stream_cpus:g} CPUs of "
            f"{self.data_cpus:g}"
        )


def is_local(config: ClusterConfig) -> bool:
    """Tell whether a run starts a Ray of its own."""
    return (config.address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def inside_ray_package() -> bool:
    """Tell whether the current directory is one that Ray unpacked for a job."""
    return _PACKAGES in Path.cwd().parts


def absolute(path: str) -> str:
    """Return a path that stays the same when the job is submitted again.

    Relative paths are relative to the current directory; inside a Ray job, whose directory has a
    new name with every edited line, they are relative to the home directory instead.
    """
    if "://" in path or os.path.isabs(path):
        return path
    return str((Path.home() if inside_ray_package() else Path.cwd()) / path)


@contextlib.contextmanager
def connected(config: Config, wants_gpu: bool, token_dir: Path) -> Iterator[Share]:
    """Connect to the run's Ray, yield what the run may use of it, and disconnect.

    A local Ray is ours: it is started with the CPUs that the plan needs and ended on leaving.

    Args:
        config: the run's configuration.
        wants_gpu: give each worker a GPU.
        token_dir: where a local Ray's token is kept, readable by its owner only.

    Raises:
        ClusterError: the cluster cannot be reached, or lacks what was asked within
            `cluster.start_timeout_s`.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # The driver looks for nodes that are to be taken away itself (`runtime.room`).
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # How soon the controller notices a dead worker; Ray's default is 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.cluster.start_timeout_s)
    )
    try:
        if is_local(config.cluster):
            share = local_share(config.cluster, wants_gpu)
            _start_local(share, config.cluster.object_store_share, token_dir)
        else:
            address = config.cluster.address or os.environ["RAY_ADDRESS"]
            _connect(address)
            share = wait_for_share(config.cluster, wants_gpu, config.cluster.start_timeout_s)
        yield deal_streams(share, config.cluster, ray.nodes())
    finally:
        ray.shutdown()


def local_share(config: ClusterConfig, wants_gpu: bool) -> Share:
    """Return the share on a Ray of our own, which is told to have the CPUs that this takes."""
    cores = os.cpu_count() or 1
    workers = config.worker_counts[-1]
    threads = max(cores // workers, 1)
    return Share(
        num_workers=workers,
        worker_cpus=config.cpus_per_worker or 1,
        worker_gpus=int(wants_gpu),
        data_cpus=config.data_cpus or max(1, min(cores // 2, 4)),
        threads=threads,
    )


def ray_temp() -> Path:
    """Return the directory of our own Rays' sessions and logs; only this user can read it."""
    temp = Path(tempfile.gettempdir()) / f"clip-ray-{os.getuid()}"
    temp.mkdir(mode=0o700, exist_ok=True)
    return temp


def ray_logs() -> str:
    """Say where the logs of the connected Ray are, on its head."""
    session = ray.get_runtime_context().get_session_name()
    folder = os.environ.get("RAY_TMPDIR", "/tmp/ray")
    return f"{folder}/{session}/logs"


def object_store_bytes(share: Share, streamed: float) -> int:
    """Return the size of a local Ray's object store: enough for the blocks under way.

    Ray's default of 30 % of the memory is the limit. It is no better: pages that no block has used
    yet are slow to write, and blocks would wander through all of them.

    Args:
        share: what the run may use.
        streamed: share of the store for blocks.
    """
    from clip_ray.data.blocks import store_bytes

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(store_bytes(share.data_cpus, share.num_workers, streamed), 0.3 * memory))


def _start_local(share: Share, streamed: float, token_dir: Path) -> None:
    token_dir.mkdir(parents=True, exist_ok=True)
    token = token_dir / "ray-token"
    if not token.exists():
        with open(os.open(token, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    # Ray turns token authentication on by itself for a local start; it warns of that each time.
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # A temp directory of our own: in Ray's, the address file of a killed Ray makes each shutdown
    # wait 12 s for a head that is gone. Short, because socket paths end at 107 characters.
    temp = ray_temp()
    os.environ["RAY_TMPDIR"] = str(temp)
    cpus = share.num_workers * share.worker_cpus + share.data_cpus
    # Where GPUs train, workers that have something to launch are to wait for nobody.
    policy = contextlib.nullcontext() if share.worker_gpus else cpu_policy.batch()
    try:
        with policy, _inherited(LOCAL_ENVIRONMENT):
            ray.init(
                address="local",
                num_cpus=max(1, round(cpus + 0.49)),
                object_store_memory=object_store_bytes(share, streamed),
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=True,
                logging_level=logging.WARNING,
                _temp_dir=str(temp),
            )
    except Exception as error:  # Ray raises many kinds here
        raise ClusterError(f"a local Ray could not be started: {error}") from error


@contextlib.contextmanager
def _inherited(environment: dict[str, str]) -> Iterator[None]:
    """Set what is not set yet in the environment of the processes that are started meanwhile."""
    added = environment.keys() - os.environ.keys()
    os.environ.update({name: environment[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _connect(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:
        raise ClusterError(
            f"no Ray answers at {address!r} ({type(error).__name__}: {error}); check "
            "cluster.address and RAY_ADDRESS, or unset both to start a local Ray"
        ) from error


def wait_for_share(
    config: ClusterConfig,
    wants_gpu: bool,
    timeout_s: float,
    given_back_s: float = 0.0,
    say: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
) -> Share:
    """Share out the CPUs of a running cluster; wait for them, and ask its autoscaler for them.

    Args:
        config: what is asked for.
        wants_gpu: each worker takes a GPU.
        timeout_s: seconds to wait for the least number of workers.
        given_back_s: seconds to wait for all that the nodes have room for.
        say: told what is waited for.
        check: called each second; what it raises ends the waiting.

    Raises:
        ClusterError: there is no room for the least number of workers within `timeout_s`.
    """
    begun, told = time.monotonic(), False
    try:
        while True:
            found, problem = _share_with_room(config, wants_gpu)
            waited = time.monotonic() - begun
            if found is not None:
                whole = whole_share(config, wants_gpu)
                if waited >= given_back_s or whole is None or _as_large(found, whole):
                    return found
            elif waited >= timeout_s:
                raise ClusterError(f"{problem} (after {timeout_s:g} s)")
            elif not told:
                most, cpus = config.worker_counts[-1], config.cpus_per_worker or 1
                request_resources(bundles=worker_bundles(most, cpus, wants_gpu))
                say(f"waiting up to {timeout_s:g} s for room: {problem}")
                told = True
            check()
            time.sleep(1)
    finally:
        if told:
            request_resources(bundles=[])


def whole_share(config: ClusterConfig, wants_gpu: bool) -> Share | None:
    """Return the share that the nodes would allow, were all of them free."""
    nodes = usable_nodes()
    total = {
        name: sum(node["Resources"].get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")
    }
    return share_of(total, nodes, config, wants_gpu)[0]


def _as_large(found: Share, whole: Share) -> bool:
    return (found.num_workers, found.data_cpus) >= (whole.num_workers, whole.data_cpus)


def _share_with_room(config: ClusterConfig, wants_gpu: bool) -> tuple[Share | None, str]:
    """Return the largest share whose workers the nodes take: sums do not say how CPUs lie."""
    counts = config.worker_counts
    while True:
        config = config.model_copy(update={"num_workers": (counts[0], counts[-1])})
        nodes = usable_nodes()
        found, problem = share_of(free_resources(), nodes, config, wants_gpu)
        if found is not None and (problem := missing_readers(found, config, nodes)):
            return None, problem
        if found is None or _has_room(found):
            return found, problem
        # Not one less at a time: each try takes ROOM_S, and of a thousand many may not fit.
        counts = range(counts[0], min(found.num_workers, taken_by_nodes(free_by_node(), found) + 1))
        if not counts:
            return None, (
                f"{found.describe()}: no node has room for the last of the workers; lower "
                "cluster.num_workers or cluster.cpus_per_worker"
            )


def taken_by_nodes(nodes: list[dict[str, float]], share: Share) -> int:
    """Return how many workers of a share the nodes take, each what it has free."""
    return sum(
        min(
            int(free.get("CPU", 0.0) / share.worker_cpus),
            int(free.get("GPU", 0.0)) if share.worker_gpus else share.num_workers,
        )
        for free in nodes
    )


def missing_readers(share: Share, config: ClusterConfig, nodes: list[dict[str, Any]]) -> str:
    """Say which CPUs are not there yet on the nodes that alone may read; "" = none.

    Args:
        share: what the run may use.
        config: what is asked for.
        nodes: as `ray.nodes()` returns them.
    """
    label = label_of(config)
    if label is None:
        return ""
    there, asked = sum(spare_cpus(share, label, nodes)), config.data_cpus or 1.0
    if there >= asked:
        return ""
    return (
        f"asked: {asked:g} CPU for data on nodes with the label {config.data_label}; there are "
        f"{there:g}: lower cluster.data_cpus, add such nodes, or leave cluster.data_label out"
    )


def label_of(config: ClusterConfig) -> tuple[str, str] | None:
    """Return key and value of the label of the nodes that alone may read."""
    if config.data_label is None:
        return None
    key, _, value = config.data_label.partition("=")
    return key, value


def _has_room(share: Share) -> bool:
    gpu = bool(share.worker_gpus)
    group = placement_group(worker_bundles(share.num_workers, share.worker_cpus, gpu))
    try:
        return bool(group.wait(ROOM_S))
    finally:
        remove_placement_group(group)


def worker_bundles(workers: int, cpus: float, gpu: bool) -> list[dict[str, float]]:
    """Return the resources of each of a run's workers."""
    return [{"CPU": cpus} | ({"GPU": 1.0} if gpu else {})] * workers


def usable_nodes() -> list[dict[str, Any]]:
    """Return the nodes, as `ray.nodes()` does, that are there and will not soon be taken away."""
    leaving = leaving_nodes()
    return [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]


def leaving_nodes() -> dict[str, int]:
    """Return the nodes that are to be taken away, and when (ms since 1970; 0 = not said).

    Ray Train looks in the same place: there is no public function.
    """
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return found


def job_actors(name: str, since: float) -> list[tuple[str, int]]:
    """Return node and process of this job's living actors of a class.

    Args:
        name: the class; Ray Train and Ray Data hand out no handles of theirs.
        since: unix time; those that started earlier belong to a group of workers that has ended.
    """
    job = ray.get_runtime_context().get_job_id()
    return [
        (actor["Address"]["NodeID"], actor["Pid"])
        for actor in ray._private.state.actors(job_id=ray.JobID.from_hex(job)).values()
        if actor["ActorClassName"] == name
        and actor["State"] == "ALIVE"
        and actor["StartTime"] > 1000 * since
    ]


def free_resources() -> dict[str, float]:
    """Return what is free on the nodes that will stay."""
    return {name: sum(free.get(name, 0.0) for free in free_by_node()) for name in ("CPU", "GPU")}


def free_by_node() -> list[dict[str, float]]:
    """Return what is free on each node that will stay."""
    by_node = ray._private.state.available_resources_per_node()
    return [by_node.get(node["NodeID"], {}) for node in usable_nodes()]


def share_of(
    free: dict[str, float], nodes: list[dict[str, Any]], config: ClusterConfig, wants_gpu: bool
) -> tuple[Share | None, str]:
    """Return the share that a cluster's free resources allow, or none and why, in numbers.

    It has as many workers as there is room for; less than a whole CPU each, unless asked for, is
    only for the least number.
    """
    least = config.worker_counts[0]
    for workers in reversed(config.worker_counts[1:]):
        found, _ = _share_for(workers, free, nodes, config, wants_gpu)
        if found is not None and found.worker_cpus >= (config.cpus_per_worker or 1):
            return found, ""
    return _share_for(least, free, nodes, config, wants_gpu)


def _share_for(
    workers: int,
    free: dict[str, float],
    nodes: list[dict[str, Any]],
    config: ClusterConfig,
    wants_gpu: bool,
) -> tuple[Share | None, str]:
    cpus, gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
    per_worker = config.cpus_per_worker
    reserved = config.data_cpus or 1.0
    if per_worker is None:
        per_worker = min(1.0, (cpus - reserved) / workers)
        per_worker = int(per_worker * 100) / 100  # Ray counts in units of 1/10000; keep it readable
    left = cpus - workers * per_worker
    if config.data_cpus is not None:
        left = min(left, config.data_cpus)
    asked = f"asked: {workers} workers x {max(per_worker, MIN_WORKER_CPUS):g} CPU"
    if wants_gpu:
        asked += " + 1 GPU"
    asked += f", and {reserved:g} CPU for data"
    there = f"{cpus:g} CPUs and {gpus:g} GPUs are free, on {len(nodes)} nodes"
    if per_worker < MIN_WORKER_CPUS or left < reserved:
        return None, (
            f"{asked}; {there}: lower cluster.num_workers or cluster.cpus_per_worker, or add CPUs"
        )
    if wants_gpu and gpus < workers:
        return None, (
            f"{asked}; {there}: lower cluster.num_workers, add GPUs, or set train.device cpu"
        )
    threads = max(int(per_worker), 1)
    return Share(workers, per_worker, int(wants_gpu), left, threads), ""


def deal_streams(share: Share, config: ClusterConfig, nodes: list[dict[str, Any]]) -> Share:
    """Return the share with the number of streams, and the CPUs of each, filled in.

    Ray Data gives each of S streams `spare CPUs // S` of every node, so what S does not divide is
    lost: without `cluster.data_streams` there is one stream, and more only where one could not
    keep its tasks busy and a quarter of the CPUs at most is lost.

    Args:
        share: what the run may use.
        config: how it is to be used.
        nodes: as `ray.nodes()` returns them.

    Raises:
        ClusterError: a stream would have no CPU, or no worker to serve.
    """
    label = label_of(config)
    spare = spare_cpus(share, label, nodes)

    alike = Counter(spare)  # of a thousand nodes few differ

    def cpus_of(streams: int) -> float:
        dealt = sum(nodes * (cpus // streams) for cpus, nodes in alike.items())
        return min(dealt, share.data_cpus / streams)

    streams = config.data_streams
    if streams is None:
        streams = min(math.ceil(cpus_of(1) / STREAM_CPUS) or 1, share.num_workers)
        while streams > 1 and streams * cpus_of(streams) < 0.75 * cpus_of(1):
            streams -= 1
    there = ", ".join(f"{cpus:g}" for cpus in spare) or "none"
    where = f" with the label {config.data_label}" if label else ""
    if cpus_of(streams) < 1:
        raise ClusterError(
            f"{streams} streams of data: none is left a CPU; spare on the nodes{where}: {there}. "
            "Lower cluster.num_workers, cluster.cpus_per_worker or cluster.data_streams, or add "
            "CPUs: a reading task takes a whole one, and the streams share each node's equally"
        )
    if streams > share.num_workers:
        raise ClusterError(
            f"cluster.data_streams {streams}: each serves a worker at least, and there are "
            f"{share.num_workers}; lower it"
        )
    return replace(
        share,
        streams=streams,
        stream_cpus=cpus_of(streams),
        object_store=config.object_store_share,
        data_label=label,
    )


def spare_cpus(
    share: Share, label: tuple[str, str] | None, nodes: list[dict[str, Any]]
) -> list[float]:
    """Return the CPUs that the workers leave on each node that may read, as Ray Data counts them.

    Ray's AutoscalingCoordinator, which deals CPUs to Ray Data, fills the nodes with workers one
    after the other: most GPUs first, then object store, memory, CPUs.
    """
    sizes = ("GPU", "object_store_memory", "memory", "CPU")
    alive = [n for n in nodes if n["Alive"] and (n["Resources"].keys() & {"CPU", "GPU"})]
    alive.sort(key=lambda n: (*(-n["Resources"].get(r, 0) for r in sizes), n["NodeID"]))
    free = [{r: n["Resources"].get(r, 0.0) for r in ("CPU", "GPU")} for n in alive]
    at = 0
    for _ in range(share.num_workers):
        for index in itertools.chain(range(at, len(free)), range(at)):
            node = free[index]
            if node["CPU"] >= share.worker_cpus and node["GPU"] >= share.worker_gpus:
                node["CPU"] -= share.worker_cpus
                node["GPU"] -= share.worker_gpus
                at = index
                break
    return [
        room["CPU"]
        for node, room in zip(alive, free, strict=True)
        if label is None or (node.get("Labels") or {}).get(label[0]) == label[1]
    ]


def fit_to_gpus(config: Config, say: Callable[[str], None]) -> tuple[Config, bool]:
    """Decide whether the workers take a GPU each.

    Under `train.device: auto` they do where there are GPUs; with fewer GPUs than workers, there
    are as many workers as GPUs (the run stays the same run).

    Returns:
        The config, its number of workers maybe lowered, and whether they take GPUs.

    Raises:
        ClusterError: a GPU was asked for that is not there, or is there and torch cannot use it.
    """
    wanted = config.train.device
    if wanted == "cpu":
        return config, False
    count, counts = _gpu_count(config), config.cluster.worker_counts
    workers = counts[-1]
    if wanted == "cuda":
        if count < counts[0] and is_local(config.cluster):
            raise ClusterError(
                f"train.device cuda: {counts[0]} workers take a GPU each, torch sees {count}; "
                "lower cluster.num_workers or set train.device auto"
            )
    elif count == 0:
        return config, False
    if count < workers and is_local(config.cluster):
        say(f"{count} GPUs: {count} workers in the place of {workers} (the run is the same)")
        cluster = config.cluster.model_copy(update={"num_workers": count})
        config = config.model_copy(update={"cluster": cluster})
    return config, True


def _gpu_count(config: Config) -> int:
    if not is_local(config.cluster):
        _connect(config.cluster.address or os.environ["RAY_ADDRESS"])
        try:
            return int(ray.cluster_resources().get("GPU", 0))
        finally:
            ray.shutdown()
    import torch

    if not torch.cuda.is_available():
        _refuse_unusable_gpu()
        return 0
    return torch.cuda.device_count()


def _refuse_unusable_gpu() -> None:
    import shutil
    import subprocess

    import torch

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        seen = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return
    if seen.returncode == 0 and seen.stdout.strip():
        raise ClusterError(
            f"nvidia-smi sees a GPU ({seen.stdout.strip().splitlines()[0]}) that torch "
            f"{torch.__version__} (CUDA {torch.version.cuda}) cannot use: install a torch build "
            "for this driver (make TORCH_INDEX=https://download.pytorch.org/whl/cu128 ...), or "
            "set train.device cpu"
        )


def check_storage(storage: str, tracking_uri: str, setting: str = "run.storage") -> None:
    """Refuse storage that some node of the cluster could not see.

    On several nodes a local path is proved to be shared: every node reads back a nonce.

    Args:
        storage: directory or s3:// prefix.
        tracking_uri: MLflow's address; "" = none is needed.
        setting: where the storage was set, for errors.

    Raises:
        ConfigError: the storage, or an sqlite tracking store, lies on one node only.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) <= 1:
        return
    if tracking_uri.startswith("sqlite"):
        raise ConfigError(
            f"tracking.uri {tracking_uri}: sqlite does not work over {len(nodes)} nodes; start an "
            "MLflow server and give its http:// address"
        )
    if storage.startswith("s3://"):
        return
    nonce = uuid.uuid4().hex
    marker = Path(storage) / f".shared-{nonce}"
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(nonce)
    try:
        checks = {
            node["NodeManagerAddress"]: _reads_back.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(str(marker), nonce)
            for node in nodes
        }
        blind = [host for host, check in checks.items() if not ray.get(check, timeout=60)]
    finally:
        marker.unlink()
    if blind:
        raise ConfigError(
            f"{setting} {storage}: not shared, {', '.join(blind)} cannot see it; use an s3:// "
            "prefix or a directory that all nodes mount"
        )


@ray.remote(num_cpus=0)
def _reads_back(path: str, nonce: str) -> bool:
    try:
        return Path(path).read_text() == nonce
    except OSError:
        return False
