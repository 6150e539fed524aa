"""Plan a run on GPUs: memory, batch, speed, CPUs, network, storage, days and cost; no GPU is used.

python jobs/plan.py --model ViT-L-14 --gpus 64xH100 --samples 12.8e9
python jobs/plan.py --config jobs/configs/vit-b-32-laion400m.yaml --gpus 32xA100-40 --samples 12e9
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Not this directory: its evaluate.py would shadow Hugging Face's `evaluate`.
sys.path[0] = str(ROOT)

from clip_ray.errors import ClipRayError  # noqa: E402
from clip_ray.sizing import Question, answer, report  # noqa: E402


def main() -> int:
    """Parse the command line and print the plan; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        epilog="--config FILE and every --section.key of jobs/pretrain.py are taken too; without "
        "--config, train.global_batch is 32768 and train.precision bf16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--gpus", help="COUNTxTYPE, e.g. 64xH100; required but for the two tables")
    add("--model", help="architecture, as --model.name; default: the recipe's, else ViT-B-32")
    add("--samples", type=float, help="length, as --train.samples; default: the recipe's")
    add(
        "--utilization",
        type=float,
        help="share of the peak that all executed FLOPs reach, "
        "recomputed ones too (0.35); default: by published runs, see --anchors",
    )
    add(
        "--decode_ms",
        type=float,
        default=Question.decode_ms,
        help="CPU ms to read, decode and "
        "crop an image; default: 1.2, JPEG of 256 px (512 to 1,024 px: 3)",
    )
    add(
        "--storage_mb_s",
        type=float,
        default=Question.storage_mb_s,
        help="MB/s at which a checkpoint is written; default: 200, an assumption",
    )
    add("--price_per_gpu_hour", type=float, help="in any currency; default: no cost is said")
    add("--price_per_node_hour", type=float, help="in its place: of a whole machine")
    add("--gpus_per_node", type=int, help="GPUs of a machine; default: the type's usual machine")
    add("--cpus_per_node", type=int, help="its virtual CPUs; default likewise")
    add("--memory_per_node", type=float, help="its main memory, GB; default likewise")
    add("--network_gbit", type=float, help="its network, Gbit/s; default likewise (TCP is slower)")
    add("--json", metavar="FILE", help="write the figures there, in bytes and seconds")
    add("--anchors", action="store_true", help="print the published runs beside the rule; end")
    add("--types", action="store_true", help="print the GPU types that are known; end")
    given, settings = parser.parse_known_args()  # fmt: skip
    flags = vars(given)
    file, anchors, types = flags.pop("json"), flags.pop("anchors"), flags.pop("types")
    try:
        if anchors or types:
            print(report.anchor_table() if anchors else report.gpu_table())
            return 0
        if given.gpus is None:
            parser.error("--gpus is required, e.g. --gpus 64xH100; --types lists the types")
        answered = answer(Question(**flags), settings)
        print(answered.text)
        if file:
            report.write(file, answered)
    except ClipRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
