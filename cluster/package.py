"""The code as one zip, for `working_dir` on clusters without our image: `make package DEST=...`.

`serve deploy` and a declarative config take a working_dir only from a store that the nodes read.
The name holds the digest of the content, so that one address is never two codes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from clip_ray.config import S3Options  # noqa: E402
from clip_ray.errors import ClipRayError, ConfigError  # noqa: E402
from clip_ray.storage import open_store  # noqa: E402
from clip_ray.tracking import source_version  # noqa: E402

PARTS = ("clip_ray", "jobs", "serve", "constraints.txt", "LICENSE", "NOTICE")
_LEFT_OUT = {"__pycache__"}


def main(argv: list[str]) -> int:
    """Write the package; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--dest", required=True, help="directory or s3:// prefix")
    parser.add_argument("--endpoint", help="of an S3 store other than AWS")
    own = parser.parse_args(argv)
    try:
        if not own.dest:
            raise ConfigError("say where it goes: make package DEST=s3://bucket/clip-ray/code")
        print(write_package(own.dest, S3Options(endpoint=own.endpoint)))
    except ClipRayError as error:
        print(f"package: {error}", file=sys.stderr)
        return 2
    return 0


def write_package(dest: str, s3: S3Options) -> str:
    """Write the package below `dest` unless it is there; return its address.

    Args:
        dest: directory or s3:// prefix.
        s3: access to an s3:// prefix.
    """
    data = package(ROOT)
    name = f"clip-ray-{hashlib.sha256(data).hexdigest()[:16]}.zip"
    store = open_store(dest, s3)
    if not store.exists(name):
        store.write(name, data)
    uri = f"{store.uri}/{name}"
    return uri if "://" in uri else f"file://{uri}"


def package(root: Path) -> bytes:
    """Return the zip; equal code gives equal bytes.

    Ray takes the content of a remote zip from below its one top directory.
    """
    source = source_version(root)
    build = f"{source['commit']}{' dirty' if source['dirty'] else ''}\n"
    files = {"BUILD": build.encode()}
    for part in PARTS:
        found = [root / part] if (root / part).is_file() else sorted((root / part).rglob("*"))
        for path in found:
            if path.is_file() and not _LEFT_OUT & set(path.parts):
                files[path.relative_to(root).as_posix()] = path.read_bytes()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            # A fixed time: the bytes must not depend on when they were packed.
            entry = zipfile.ZipInfo(f"clip-ray/{name}", date_time=(2020, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name])
    return out.getvalue()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
