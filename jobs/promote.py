"""Make a registered model version the champion: verified, served by every replica, then named so.

python jobs/promote.py --model clip                 # the latest version
python jobs/promote.py --model clip --version 3     # any other: also the way back
python jobs/promote.py --model clip --check         # does every replica serve the champion?

A Serve that runs here and serves the model gets it first; without one only the alias moves.
With --target file or rayservice the alias moves if a Serve can be asked (--address HEAD:6379).
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

HERE = os.path.dirname(os.path.abspath(__file__))
# This directory's scripts would shadow packages of the same name (evaluate).
sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]
sys.path.insert(0, os.path.dirname(HERE))

from clip_ray.errors import ClipRayError  # noqa: E402
from clip_ray.runtime.deployment import home  # noqa: E402
from clip_ray.runtime.promotion import Request, check, promote  # noqa: E402
from clip_ray.tracking import default_tracking_uri  # noqa: E402


def main() -> int:
    """Parse the command line and promote."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="registered model's name")
    add("--version", help="its version; default: the latest, with --drop-previous the served one")
    add("--target", choices=("serve", "rayservice", "file", "none"), help="where it goes")
    add("--file", help="YAML file of --target file: a Serve config, or a RayService's manifest")
    add("--rayservice", help="[NAMESPACE/]NAME of --target rayservice, patched with kubectl")
    add("--address", help="of the Ray whose Serve is meant; default: this machine's own")
    add("--app", help="application; default: the only one that serves a model")
    add("--model_store", help="where the export is copied; default: beside the served one")
    add("--drop-previous", action="store_true", help="the model before it need not be answerable")
    add("--timeout_s", type=float, default=300, help="seconds in which all replicas must serve it")
    add("--check", action="store_true", help="compare what is served with the champion; 0 = same")
    add("--tracking_uri", help="MLflow's address")
    add("--storage", default="runs", help="run.storage, which holds mlflow.db")
    given = vars(parser.parse_args())
    storage, job = given.pop("storage"), check if given.pop("check") else promote
    try:
        given["tracking_uri"] = default_tracking_uri(given["tracking_uri"], storage)
        return job(Request(**given, home=home(storage)), partial(print, flush=True))
    except ClipRayError as error:
        print(f"promote: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
