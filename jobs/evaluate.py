"""Evaluate a model on data sets in CLIP_benchmark's layout.

python jobs/evaluate.py --model runs/clip --dataset data/cifar10 --json result.json
python jobs/evaluate.py --model models:/clip@champion --dataset s3://bucket/wds/flickr8k
"""

from __future__ import annotations

import argparse
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
# This file would shadow Hugging Face's evaluate.
sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]
sys.path.insert(0, os.path.dirname(HERE))

from tqdm import tqdm  # noqa: E402

from clip_ray.errors import ClipRayError  # noqa: E402
from clip_ray.eval.evaluate import evaluate  # noqa: E402
from clip_ray.eval.report import table  # noqa: E402
from clip_ray.inference import Encoder  # noqa: E402


def main() -> int:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory, s3://, runs:/ or models:/ URI")
    parser.add_argument("--dataset", required=True, action="append", help="directory or s3://")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--batch", type=int, default=256, help="images of one forward pass")
    parser.add_argument("--limit", type=int, help="first samples of each data set only")
    parser.add_argument("--tracking_uri", help="MLflow's address, for runs:/ and models:/")
    given = parser.parse_args()
    results = {}
    try:
        encoder = Encoder.load(given.model, tracking_uri=given.tracking_uri, batch=given.batch)
        for uri in given.dataset:
            with tqdm(unit=" samples", desc=uri, file=sys.stderr) as bar:
                result = evaluate(encoder, uri, given.batch, given.limit, bar.update)
            # Two data sets of one name are told apart by their paths.
            results[uri if result.dataset in results else result.dataset] = result.to_dict()
    except ClipRayError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    print(table(results))
    if given.json:
        origin = {"version": encoder.version, "digest": encoder.digest, "run_id": encoder.run_id}
        with open(given.json, "w") as file:
            json.dump({"model": given.model, **origin, "evaluation": results}, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
