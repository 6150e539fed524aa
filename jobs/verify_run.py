"""Prove that a run saw each sample exactly once a pass: recompute every step from the manifest.

python jobs/verify_run.py --run runs/quickstart              # all steps that led to the weights
python jobs/verify_run.py --run runs/quickstart --step 17    # also list that step's samples
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from clip_ray.config import S3Options  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402
from clip_ray.storage import open_store  # noqa: E402
from clip_ray.train.verify import samples_of_step, verify  # noqa: E402


def main() -> int:
    """Verify a run; exit status 1 means that it is not what its manifest says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="the run's directory; local or s3://")
    parser.add_argument("--step", type=int, help="list the samples of this step (1 is the first)")
    parser.add_argument("--endpoint", help="S3 endpoint URL; default: the AWS chain's")
    given = parser.parse_args()
    try:
        store = open_store(given.run, S3Options(endpoint=given.endpoint))
        if given.step is not None:
            for line in samples_of_step(store, given.step):
                print(line)
        proof = verify(store)
    except ClipRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(proof.as_text())
    return 0 if proof.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
