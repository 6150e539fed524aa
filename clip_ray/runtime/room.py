"""Watching the cluster while a group of workers trains: does it grow, or lose a node?"""

from __future__ import annotations

import time
from collections.abc import Set
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group

from clip_ray.config import ClusterConfig
from clip_ray.runtime.cluster import (
    Share,
    is_local,
    job_actors,
    leaving_nodes,
    whole_share,
    worker_bundles,
)

LOOK_S = 2.0
SETTLE_S = 6.0  # a node that has come stays for as long before it is counted on
TRY_S = 10.0  # what is free is there by then: a reading task gives its CPU back
AGAIN_S = 60.0  # before room that others had taken is looked for again


class Room:
    """Tells when a group of workers had better make way for another.

    Args:
        config: the range of workers.
        share: what the group uses.
    """

    def __init__(self, config: ClusterConfig, share: Share) -> None:
        self._config, self._share = config, share
        self._begun = time.time()
        self._driver_told = False
        self._deadline_ms = 0
        self._leaving: dict[str, int] = {}  # as of the last look
        self._looked = time.monotonic()
        self._larger_since: float | None = None
        self._not_before = 0.0
        self._more: int | None = None  # workers that were last tried for, in vain
        self._try: tuple[Any, float] | None = None

    def why_yield(self, nodes: set[str]) -> str:
        """Return why the group should yield, "" where it should not.

        Args:
            nodes: ids of the nodes that the workers are on.
        """
        now = time.monotonic()
        if is_local(self._config) or now - self._looked < LOOK_S:
            return ""
        self._looked = now
        leaving = self._leaving = leaving_nodes()
        going = nodes & leaving.keys()
        what = ""
        if leaving and not going:
            dealing = {node for node, _ in job_actors("SplitCoordinator", self._begun)}
            going, what = dealing & leaving.keys(), ", which deals the data,"
        if going:
            self._deadline_ms = min(leaving[node] for node in going)
            return f"node {_hosts(going)}{what} is to be taken away"
        return self._grown(now)

    def driver_goes(self) -> str:
        """Return, once, that this job's own node is to be taken away: nothing can go on then."""
        if self._driver_told or not self._leaving:
            return ""
        here = ray.get_runtime_context().get_node_id()
        if here not in self._leaving:
            return ""
        self._driver_told, self._deadline_ms = True, self._leaving[here]
        return f"node {_hosts({here})}, which this job runs on, is to be taken away"

    @property
    def left_s(self) -> float | None:
        """Seconds until the node is taken away that was spoken of last; none = nobody said."""
        return self._deadline_ms / 1000 - time.time() if self._deadline_ms else None

    def close(self) -> None:
        """Give back what was tried."""
        if self._try is not None:
            remove_placement_group(self._try[0])
            self._try = None

    def _grown(self, now: float) -> str:
        if self._try is not None:
            group, since = self._try
            if group.wait(0):
                self.close()
                return f"there is room for {self._share.num_workers + (self._more or 0)} workers"
            if now - since > TRY_S:
                self.close()
                self._not_before = now + AGAIN_S
            return ""
        whole = whole_share(self._config, bool(self._share.worker_gpus))
        most = whole.num_workers if whole else 0
        if most <= self._share.num_workers or now < self._not_before:
            self._larger_since = None
            return ""
        self._larger_since = self._larger_since or now
        if now - self._larger_since >= SETTLE_S:
            # The sum of the nodes' CPUs says nothing of who else uses them, and how they lie.
            more = most - self._share.num_workers
            self._more = more if self._more is None else max(min(self._more // 2, more), 1)
            cpus, gpu = self._share.worker_cpus, bool(self._share.worker_gpus)
            self._try = placement_group(worker_bundles(self._more, cpus, gpu)), now
        return ""


def _hosts(nodes: Set[str]) -> str:
    return ", ".join(
        sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in nodes)
    )
