"""Make shards from your own pictures: a folder with .txt captions, or a table of path and caption.

Or from other shards, of which only some samples are wanted.

python jobs/prepare.py --source pictures/ --out shards/
python jobs/prepare.py --source captions.csv --out s3://bucket/shards --longest_side 512
python jobs/prepare.py --shards "s3://bucket/all/{00000..01023}.tar" --select keys.txt --out few/
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from clip_ray.config import S3Options, SourceConfig  # noqa: E402
from clip_ray.data.prepare import PrepareOptions, prepare  # noqa: E402
from clip_ray.data.rewrite import rewrite  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402


def main() -> int:
    """Parse the command line and make the shards; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made_of = parser.add_mutually_exclusive_group(required=True)
    made_of.add_argument("--source", help="folder or table; local or s3://")
    made_of.add_argument("--shards", help="shards: file, directory, glob or {000..123} pattern")
    parser.add_argument("--out", required=True, help="directory of the shards; local or s3://")
    parser.add_argument("--image", help="column (or suffix in shards) of images; default: usual")
    parser.add_argument("--caption", help="column (or suffix) of captions; default: usual names")
    parser.add_argument("--select", help="with --shards: file of sample keys to take, one a line")
    parser.add_argument("--exclude", help="with --shards: file of sample keys to leave out")
    parser.add_argument("--samples_per_shard", type=int, default=10_000)
    parser.add_argument("--bytes_per_shard", type=int, default=256 << 20)
    parser.add_argument("--longest_side", type=int, help="shrink larger images to this, in pixels")
    parser.add_argument("--endpoint", help="S3 endpoint URL; default: the AWS chain's")
    given = parser.parse_args()
    if given.source and (given.select or given.exclude):
        parser.error("--select and --exclude go with --shards: rows of a source have no keys")
    from tqdm import tqdm

    bar = tqdm(desc="packing", unit="img")

    def progress(done: int, total: int) -> None:
        bar.total, bar.n = total, done
        bar.refresh()

    try:
        s3 = S3Options(endpoint=given.endpoint)
        options = PrepareOptions(
            image=given.image if given.source else None,
            caption=given.caption if given.source else None,
            samples_per_shard=given.samples_per_shard,
            bytes_per_shard=given.bytes_per_shard,
            longest_side=given.longest_side,
        )
        if given.source:
            made = prepare(given.source, given.out, options, s3, progress)
        else:
            shards = SourceConfig(
                path=given.shards, image=given.image, caption=given.caption, select=given.select
            )
            made = rewrite(shards, given.exclude, given.out, options, s3, progress)
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
