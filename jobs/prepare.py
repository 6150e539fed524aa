"""Make shards from your own pictures: a folder with .txt captions, or a table of path and caption.

Or from other shards: of which only some samples are wanted, or whose samples' members lie apart.

python jobs/prepare.py --source pictures/ --out shards/
python jobs/prepare.py --source captions.csv --out s3://bucket/shards --longest_side 512
python jobs/prepare.py --shards "s3://bucket/all/{00000..01023}.tar" --select keys.txt --out few/
python jobs/prepare.py --shards laion/ --where "similarity >= 0.3" --where "width > 255" --out few/
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from clip_ray.config import S3Options  # noqa: E402
from clip_ray.config.conditions import parse_condition  # noqa: E402
from clip_ray.data.prepare import PrepareOptions  # noqa: E402
from clip_ray.data.rewrite import Wanted, make_shards  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402


def condition(text: str) -> str:
    """Return a condition as it is, or have argparse say why it is none."""
    try:
        parse_condition(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def main() -> int:
    """Parse the command line and make the shards; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made_of = parser.add_mutually_exclusive_group(required=True)
    made_of.add_argument("--source", help="folder or table; local or s3://")
    made_of.add_argument("--shards", help="shards: file, directory, glob or {000..123} pattern")
    add = parser.add_argument
    add("--out", required=True, help="directory of the shards; local or s3://")
    add("--image", help="column (or suffix in shards) of images; default: usual names")
    add("--caption", help="column (or suffix) of captions; default: usual names")
    add("--select", help="with --shards: file of sample keys to take, one a line")
    help_ = 'with --shards: condition on a Parquet column, as "similarity >= 0.3"; repeatable'
    add("--where", action="append", default=[], type=condition, help=help_)
    add("--exclude", help="with --shards: file of sample keys to leave out")
    add("--samples_per_shard", type=int, default=10_000)
    add("--bytes_per_shard", type=int, default=256 << 20)
    add("--longest_side", type=int, help="shrink larger images to this, in pixels")
    add("--endpoint", help="S3 endpoint URL; default: the AWS chain's")
    given = vars(parser.parse_args())
    given["where"] = tuple(given["where"])
    if given["source"] and (given["select"] or given["exclude"] or given["where"]):
        parser.error("--select, --where and --exclude go with --shards, not with --source")
    out, s3 = given.pop("out"), S3Options(endpoint=given.pop("endpoint"))
    wanted = Wanted(**{name: given.pop(name) for name in Wanted.__annotations__})
    try:
        made = make_shards(wanted, out, PrepareOptions(**given), s3)
    except ClipRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(made.as_text())
    print(f"next: python jobs/index.py --data.sources {out} --report")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
