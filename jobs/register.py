"""Register an export as a model version, as training does: after a loss of MLflow's store.

python jobs/register.py --from runs/clip/export --model clip
python jobs/register.py --from s3://bucket/runs/clip --model clip --tracking_uri http://mlflow:5000

The same export twice is one version; a version whose files are lost gets them again. Serving goes
on meanwhile: it needs no MLflow. jobs/promote.py then names the champion.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Not this directory: its evaluate.py would shadow Hugging Face's `evaluate`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from clip_ray.config import S3Options  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402
from clip_ray.registry.restore import restore  # noqa: E402


def main() -> int:
    """Parse the command line and register."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--from", dest="uri", required=True, help="export, or a run that holds one; or s3://")
    add("--model", required=True, help="registered model's name")
    add("--digest", help="refuse other bytes; default: the digest in the run's summary.json")
    add("--tracking_uri", help="MLflow's address; default: MLFLOW_TRACKING_URI, else --storage")
    add("--storage", default="runs", help="run.storage, which holds mlflow.db")
    add("--experiment", default="clip-ray", help="of the run made where the export's own is lost")
    add("--endpoint", help="S3 endpoint URL; default: the AWS chain's")
    given = vars(parser.parse_args())
    s3, name = S3Options(endpoint=given.pop("endpoint")), given.pop("model")
    try:
        done = restore(name=name, s3=s3, **given)
    except ClipRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{name} version {done.version} {done.how}, digest {done.digest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
