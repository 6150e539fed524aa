"""API keys of a serving: make one (it is shown once), list them, revoke one.

python jobs/keys.py create --file keys.json --name search --scopes infer --rate 50 --expires 30d
python jobs/keys.py list --file keys.json
python jobs/keys.py revoke --file keys.json --key search
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from clip_ray import keys  # noqa: E402
from clip_ray.errors import ClipRayError  # noqa: E402


def main() -> int:
    """Parse the command line and do it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key and print it, once")
    create.add_argument("--name", required=True, help="for logs; unique in the file")
    create.add_argument("--scopes", default="infer", help=f"of {','.join(keys.SCOPES)}")
    create.add_argument("--rate", type=float, help="requests/s at each replica; default: no limit")
    create.add_argument("--expires", help="30d, 12h, or an ISO moment; default: never")
    shown = commands.add_parser("list", help="what the file says of its keys")
    revoke = commands.add_parser("revoke", help="take a key out; replicas refuse it within 10 s")
    revoke.add_argument("--key", required=True, help="its id or its name")
    for command in (create, shown, revoke):
        command.add_argument("--file", required=True, help="keys file (serve.keys_file)")
    given = parser.parse_args()
    now = datetime.now(UTC)
    try:
        if given.command == "create":
            expires = keys.parse_expiry(given.expires, now) if given.expires else None
            key, made = keys.create(
                given.file, given.name, given.scopes.split(","), given.rate, expires
            )
            print(key)  # alone on stdout, for $(...)
            print(f"key {made.name} ({made.id}): kept as a hash, not shown again", file=sys.stderr)
        elif given.command == "list":
            print(keys.table(keys.listed(given.file), now))
        else:
            gone = keys.revoke(given.file, given.key)
            print(f"key {gone.name} ({gone.id}) is revoked")
    except ClipRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
