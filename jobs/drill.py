"""Rehearse faults on your own cluster: small runs that are killed, stopped and damaged.

python jobs/drill.py --config mine.yaml --run.storage s3://bucket/drills

Takes the settings of jobs/pretrain.py; of those, `cluster`, `run.storage`, `run.s3`,
`tracking.uri` and `train.device` count. Some ten minutes.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Not this directory: its evaluate.py would shadow Hugging Face's `evaluate`.
sys.path[0] = str(ROOT)

from clip_ray.config.load import load_config  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402


def main(argv: list[str]) -> int:
    """Run the drills; exit status 1 means that one did not end as it should."""
    try:
        config = load_config(
            argv, default_recipe=ROOT / "jobs/configs/quickstart.yaml", program="jobs/drill.py"
        )
        from clip_ray.runtime.drill import drill, table
        from clip_ray.runtime.train import resolve

        findings = drill(resolve(config), print)
    except ClipRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(findings))
    return 0 if all(one.held for one in findings) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
