"""Make shards from your own pictures: a folder with .txt captions, or a table of path and caption.

python jobs/prepare.py --source pictures/ --out shards/
python jobs/prepare.py --source captions.csv --out s3://bucket/shards --longest_side 512
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from clip_ray.config import S3Options  # noqa: E402
from clip_ray.data.prepare import PrepareOptions, prepare  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402


def main() -> int:
    """Parse the command line and make the shards; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="folder or table; local or s3://")
    parser.add_argument("--out", required=True, help="directory of the shards; local or s3://")
    parser.add_argument("--image", help="the table's column of image paths; default: usual names")
    parser.add_argument("--caption", help="its column of captions; default: the usual names")
    parser.add_argument("--samples_per_shard", type=int, default=10_000)
    parser.add_argument("--longest_side", type=int, help="shrink larger images to this, in pixels")
    parser.add_argument("--endpoint", help="S3 endpoint URL; default: the AWS chain's")
    given = parser.parse_args()
    from tqdm import tqdm

    bar = tqdm(desc="packing", unit="img")

    def progress(done: int, total: int) -> None:
        bar.total, bar.n = total, done
        bar.refresh()

    try:
        options = PrepareOptions(
            image=given.image,
            caption=given.caption,
            samples_per_shard=given.samples_per_shard,
            longest_side=given.longest_side,
        )
        s3 = S3Options(endpoint=given.endpoint)
        made = prepare(given.source, given.out, options, s3, progress)
    except ClipRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        bar.close()
    print(made.as_text())
    print(f"next: python jobs/index.py --data.sources {given.out} --report")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
