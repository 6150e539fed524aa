"""MLflow runs whose job was killed: nobody is left who would say that they do not run any more.

The next job on the same storage says it, and so does `jobs/ui.py` when it starts. A run is taken
for abandoned where no live job holds the lease of its directory.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from clip_ray.config import S3Options
from clip_ray.storage import open_store
from clip_ray.tracking import RUN_DIR, mlflow_client
from clip_ray.train.lease import LOOK_S, Watch

_MOST = 1000  # runs that are looked at


def end_abandoned(uri: str, storage: str, s3: S3Options, wait: bool = False) -> list[str]:
    """Set the MLflow runs of killed jobs from RUNNING to KILLED.

    Args:
        uri: MLflow's address.
        storage: run.storage, absolute; other storages' runs are left alone.
        s3: options of the storage.
        wait: whether to watch, for a minute, those that a job on another machine may still write;
            else they are left to the next caller.

    Returns:
        The names of the runs that were ended.
    """
    client = mlflow_client(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    running = client.search_runs(
        experiments, filter_string="attributes.status = 'RUNNING'", max_results=_MOST
    )
    watched: list[tuple[Any, Watch]] = []
    for run in running:
        folder = run.data.tags.get(RUN_DIR, "")
        if folder.startswith(f"{storage.rstrip('/')}/"):
            watched.append((run.info, Watch(open_store(folder, s3))))
    ended = []
    while watched:
        unsure = []
        for info, watch in watched:
            if watch.look() is None:
                client.set_terminated(info.run_id, "KILLED")
                ended.append(info.run_name)
            elif not watch.renews:
                unsure.append((info, watch))
        watched = unsure if wait else []
        if watched:
            time.sleep(LOOK_S)
    return ended


def end_abandoned_in_background(uri: str, storage: str, s3: S3Options) -> threading.Thread:
    """Do it on a thread that nobody waits for; what fails is left to the next job."""

    def work() -> None:
        logger = logging.getLogger(__name__)
        try:
            names = end_abandoned(uri, storage, s3, wait=True)
        except Exception as error:  # noqa: BLE001 - the edge that keeps MLflow out of training
            logger.info("runs of killed jobs were not looked for: %s", error)
            return
        if names:
            logger.warning("ended in MLflow, their jobs being dead: %s", ", ".join(names))

    thread = threading.Thread(target=work, name="abandoned", daemon=True)
    thread.start()
    return thread
