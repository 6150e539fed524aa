"""Pre-train a CLIP: `python jobs/pretrain.py`, or the same behind `ray job submit`.

Without flags it runs the quickstart recipe on a Ray of its own. `--help` lists every setting.
"""

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Not this directory: its evaluate.py would shadow Hugging Face's `evaluate`.
sys.path[0] = str(ROOT)

from clip_ray.config.load import load_config  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402


def main(argv: list[str]) -> int:
    """Run the job; return its exit status."""
    try:
        config = load_config(
            argv, default_recipe=ROOT / "jobs/configs/quickstart.yaml", program="jobs/pretrain.py"
        )
        from clip_ray.runtime.train import pretrain

        ended = pretrain(config, [_python(), "jobs/pretrain.py", *map(shlex.quote, argv)])
    except ClipRayError as error:
        print(f"error: {error}", *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        return 2
    # 128 + N is how a shell reports a process that signal N ended.
    return 0 if ended.signal is None else 128 + ended.signal


def _python() -> str:
    """Return how the user can call this interpreter: its path below the current directory."""
    python = Path(sys.executable)
    return str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else "python"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
