"""Open the MLflow UI over a storage directory, on the loopback interface.

It is an MLflow server too: jobs on this machine take its address as tracking.uri.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

# Not this directory: its evaluate.py would shadow Hugging Face's `evaluate`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from clip_ray.config import S3Options  # noqa: E402
from clip_ray.train.abandoned import end_abandoned  # noqa: E402


def main() -> int:
    """Become the MLflow server; ends with Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="runs", help="the runs' directory (run.storage)")
    parser.add_argument("--port", type=int, default=0, help="port; 0 = a free one")
    parser.add_argument(
        "--create", action="store_true", help="begin an empty store where none is, for runs to come"
    )
    options = parser.parse_args()
    storage = Path(options.storage).absolute()
    if options.create:
        storage.mkdir(parents=True, exist_ok=True)
    elif not (storage / "mlflow.db").exists():
        print(
            f"error: {storage}: no mlflow.db; run `make quickstart` first, or give --create",
            file=sys.stderr,
        )
        return 2
    database = f"sqlite:///{storage}/mlflow.db"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", options.port))
        port = probe.getsockname()[1]
    try:
        end_abandoned(database, str(storage), S3Options())
    except Exception as error:  # the page is of use without
        print(f"warning: killed jobs may be shown as running: {error}", file=sys.stderr)
    # Without these the server starts eight more processes and phones home.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    print(f"MLflow: http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
    arguments = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", database, "--workers", "1"),
        *("--default-artifact-root", str(storage / "mlartifacts")),
    ]
    os.execv(sys.executable, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
