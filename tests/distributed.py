"""Several ranks in processes of their own, for tests against the one-process answer."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 60


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo"
) -> list[Any]:
    """Call `function(*args)` on each rank of a new process group; return the results by rank.

    Args:
        function: at the top level of a module, so that it can be pickled.
        world_size: number of processes.
        args: picklable.
        backend: gloo, or nccl with a device for each rank.

    Raises:
        RuntimeError: a rank raised; the message holds its traceback.
        TimeoutError: a rank did not answer in time, as when one waits for the others.
    """
    # Forked from a clean process: no threads to inherit. It has imported once what would cost
    # each rank seconds; torch._dynamo is what DistributedDataParallel imports when it is built.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "pytest", "clip_ray.train.rundir", __name__])
    with tempfile.TemporaryDirectory() as folder:
        store, task = str(Path(folder) / "store"), pickle.dumps((function, args, backend))
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_rank, args=(rank, world_size, store, task, sender), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()
            return _results([receiver for receiver, _ in pipes])
        finally:
            for process in processes:
                process.kill()
                process.join(10)


def _results(receivers: list[Connection]) -> list[Any]:
    deadline = time.monotonic() + TIMEOUT_S
    found: dict[int, Any] = {}
    while len(found) < len(receivers):
        waiting = [r for rank, r in enumerate(receivers) if rank not in found]
        ready = multiprocessing.connection.wait(waiting, deadline - time.monotonic())
        if not ready:
            missing = sorted(set(range(len(receivers))) - found.keys())
            raise TimeoutError(f"no answer from ranks {missing} in {TIMEOUT_S} s")
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            try:
                error, found[rank] = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"rank {rank} died without an answer") from None
            if error:
                raise RuntimeError(f"rank {rank}:\n{error}")
    return [found[rank] for rank in range(len(receivers))]


def _rank(rank: int, world_size: int, store: str, task: bytes, sender: Connection) -> None:
    try:
        # Otherwise gloo looks the host's name up, which not every machine can.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        torch.set_num_threads(1)
        function, args, backend = pickle.loads(task)
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        answer = pickle.dumps(("", function(*args)))
    except BaseException:
        answer = pickle.dumps((traceback.format_exc(), None))
    sender.send_bytes(answer)
    # The parent ends this process: a rank that leaves early would break the others' goodbyes.
    time.sleep(TIMEOUT_S)
