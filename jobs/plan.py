"""Plan a run on GPUs: memory, batch, speed, CPUs, network, storage, days and cost.

python jobs/plan.py --model ViT-L-14 --gpus 64xH100 --samples 12.8e9
python jobs/plan.py --config jobs/configs/vit-b-32-laion400m.yaml --gpus 32xA100-40 --samples 12e9

--config FILE and every --section.key of jobs/pretrain.py are taken too. Without --config,
train.global_batch is 32768 and train.precision bf16. No GPU, data or Ray is used.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from clip_ray.errors import ClipRayError  # noqa: E402
from clip_ray.sizing import Question, answer  # noqa: E402
from clip_ray.sizing.report import anchor_table, gpu_table, write  # noqa: E402


def main() -> int:
    """Parse the command line and print the plan; return the exit status."""
    # No abbreviations: --model.name is a setting, not a way to write --model.
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag in fields(Question):
        parser.add_argument(f"--{flag.name}", default=flag.default, **flag.metadata)
    parser.add_argument("--json", metavar="FILE", help="write the figures there: bytes, seconds")
    parser.add_argument("--anchors", action="store_true", help="print the published runs; end")
    parser.add_argument("--types", action="store_true", help="print the known GPU types; end")
    given, settings = parser.parse_known_args()
    if given.anchors or given.types:
        print(anchor_table() if given.anchors else gpu_table())
        return 0
    question = Question(**{flag.name: getattr(given, flag.name) for flag in fields(Question)})
    try:
        answered = answer(question, settings)
        print(answered.text)
        if given.json:
            write(given.json, answered)
    except ClipRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
