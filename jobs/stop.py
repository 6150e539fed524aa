"""Ask a running pre-training for a commit and its end, through the run's storage; wait for it.

python jobs/stop.py runs/clip                      # commit, then end: nothing is computed twice
python jobs/stop.py s3://bucket/runs/clip --commit # commit, and go on

Exit status: 0 it has happened, 1 it has not (nothing runs there, or not in time), 2 an error.
"""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

# Not this directory: its evaluate.py would shadow Hugging Face's `evaluate`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from clip_ray.config import S3Options  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402
from clip_ray.storage import open_store  # noqa: E402
from clip_ray.tracking import user  # noqa: E402
from clip_ray.train.requests import ask  # noqa: E402


def main() -> int:
    """Ask, and wait."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="the run's directory; local or s3://")
    parser.add_argument("--commit", action="store_true", help="a commit only; the job goes on")
    parser.add_argument(
        "--timeout", type=float, default=900, help="seconds to wait for it (default 900)"
    )
    parser.add_argument("--endpoint", help="S3 endpoint URL; default: the AWS chain's")
    given = parser.parse_args()
    wish = "commit" if given.commit else "stop"
    by = f"{user()}@{socket.gethostname()}"
    try:
        run = open_store(given.run, S3Options(endpoint=given.endpoint))
        return 0 if ask(run, wish, by, given.timeout, lambda line: print(line, flush=True)) else 1
    except ClipRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
