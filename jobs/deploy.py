"""Serve a model: `make serve`, or python jobs/deploy.py --profile local|gpu|cluster.

python jobs/deploy.py --profile local --model models:/clip@champion --serve.port 8001
python jobs/deploy.py --profile cluster --print     # the declarative config, for a RayService
python jobs/deploy.py --down                        # ends what --profile local or gpu started
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Not this directory: its evaluate.py would shadow Hugging Face's `evaluate`.
sys.path[0] = str(ROOT)

from clip_ray.config.load import load_config  # noqa: E402
from clip_ray.config.serving import ServeRecipe, stored_in  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402


def main(argv: list[str]) -> int:
    """Deploy, or end what was deployed; return the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--profile", choices=("local", "gpu", "cluster"), default="local")
    parser.add_argument("--model", help="short for --serve.model; default: the only champion")
    parser.add_argument(
        "--print", action="store_true", help="print the declarative config; store nothing"
    )
    parser.add_argument("--down", action="store_true", help="end the Serve that runs here")
    parser.add_argument("--tracking_uri", help="MLflow's address")
    parser.add_argument("--storage", default="runs", help="run.storage, which holds mlflow.db")
    own, flags = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(flags):
        print(__doc__, parser.format_help(), "The settings of a profile:\n", sep="\n")
    flags += ["--serve.model", own.model] if own.model else []
    try:
        recipe = load_config(
            flags,
            default_recipe=ROOT / f"serve/profiles/{own.profile}.yaml",
            program="jobs/deploy.py",
            defaults=stored_in(own.storage),
            schema=ServeRecipe,
        )
        from clip_ray.runtime.deployment import deploy, undeploy

        say = partial(print, flush=True)
        if own.down:
            return undeploy(own.storage, say)
        return deploy(recipe.serve, own.storage, say, own.tracking_uri, show=own.print)
    except ClipRayError as error:
        print(f"deploy: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
