"""Make a registered model version the champion, after verifying and trying it.

python jobs/promote.py --model clip                 # the latest version
python jobs/promote.py --model clip --version 3     # any other: also the way back
"""

from __future__ import annotations

import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
# This directory's scripts would shadow packages of the same name (evaluate).
sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]
sys.path.insert(0, os.path.dirname(HERE))

from clip_ray import registry  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402
from clip_ray.tracking import default_tracking_uri  # noqa: E402


def main() -> int:
    """Parse the command line and promote."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="registered model's name")
    parser.add_argument("--version", help="its version; default: the latest")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--tracking_uri", help="MLflow's address")
    where.add_argument("--storage", default="runs", help="run.storage, which holds mlflow.db")
    given = parser.parse_args()
    try:
        uri = default_tracking_uri(given.tracking_uri, given.storage)
        version = given.version or registry.latest_version(given.model, uri)
        done = registry.promote(given.model, version, uri)
    except ClipRayError as error:
        print(f"promote: {error}", file=sys.stderr)
        return 2
    before = "none" if done.previous is None else f"version {done.previous}"
    print(
        f"{done.name} version {done.version} is {registry.ALIAS} (was {before}), "
        f"digest {done.digest}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
