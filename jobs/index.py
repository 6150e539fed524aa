"""Index shards and look at them before any GPU hour: `jobs/index.py --data.sources PATH --report`.

Takes the same settings as jobs/pretrain.py. The manifest goes into the run's directory, where
jobs/pretrain.py with the same run.name, sources and hold-out finds it; with --beside also into the
directory of the first source, where every run finds what it holds. Shards that are known from
either place, or from an index that was interrupted, are not read again.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from clip_ray.config.load import load_config  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402


def main(argv: list[str]) -> int:
    """Index, and report where asked to; return the exit status."""
    wants_report = "--report" in argv
    beside = "--beside" in argv
    argv = [argument for argument in argv if argument not in ("--report", "--beside")]
    if {"-h", "--help"} & set(argv):
        print(__doc__, "\nusage: jobs/index.py [--report] [--beside] [settings]\n", sep="\n")
    try:
        config = load_config(
            argv,
            default_recipe=None,
            program="jobs/index.py",
            defaults={"train": {"steps": 1}},
        )
        from clip_ray.runtime.jobs import index_job

        index_job(config, wants_report, beside)
    except ClipRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
