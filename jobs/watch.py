"""Export to Prometheus whether every replica serves what the alias champion names.

python jobs/watch.py --model clip --every 60          # beside Serve, on its Ray, until it is ended
ray job submit --no-wait --address http://HEAD:8265 -- python /app/jobs/watch.py --model clip

Each look is `jobs/promote.py --check`, in a process of its own: what it prints is printed. A look
that gets no answer (MLflow or Serve is down) leaves the metric as it was, and says so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Not this directory: its evaluate.py would shadow Hugging Face's `evaluate`.
sys.path[0] = str(ROOT)

import ray  # noqa: E402

from clip_ray.runtime.metrics import ALIAS_SERVED, Gauges, make_in_ray  # noqa: E402

LOOK_S = 300.0


def main() -> int:
    """Look again and again; with --times so often."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="registered model's name")
    parser.add_argument("--every", type=float, default=60, help="seconds between two looks")
    parser.add_argument("--times", type=int, help="looks; default: without end")
    parser.add_argument("--address", help="of Serve's Ray; default: RAY_ADDRESS")
    given, more = parser.parse_known_args()
    command = [sys.executable, str(ROOT / "jobs/promote.py"), "--check", "--model", given.model]
    command += ["--address", given.address, *more] if given.address else more
    ray.init(given.address or "auto", log_to_driver=False)
    served, gauges, looks = make_in_ray(ALIAS_SERVED), Gauges(), 0
    while given.times is None or looks < given.times:
        time.sleep(given.every if looks else 0)
        looks += 1
        status = look(command)
        if status in (0, 1):
            gauges.set(served, 1 - status, {"model": given.model})
        else:
            print(f"no answer (status {status}); the metric stays as it was", flush=True)
    return 0


def look(command: list[str]) -> int:
    """Return the exit status of a check: 0 the same, 1 not, else it got no answer."""
    try:
        return subprocess.run(command, timeout=LOOK_S, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


if __name__ == "__main__":
    raise SystemExit(main())
