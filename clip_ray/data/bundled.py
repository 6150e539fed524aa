"""The data that the package brings along, for the quickstart.

`bundled:starter/...` in a path stands for a copy of it in the run's storage: the package's own
directory may be one that Ray unpacked for a single job, gone with the next edited line.
"""

from __future__ import annotations

from pathlib import Path

import clip_ray
from clip_ray.errors import ConfigError
from clip_ray.storage import Store

PREFIX = "bundled:"


def unbundle(path: str, storage: Store) -> str:
    """Return `path`, or for `bundled:SET/REST` the path of REST in a copy of SET in `storage`.

    Raises:
        ConfigError: no such set is bundled.
    """
    if not path.startswith(PREFIX):
        return path
    name, _, rest = path.removeprefix(PREFIX).partition("/")
    root = Path(clip_ray.__file__).parent / "bundled"
    origin = root / name
    if not name or not origin.is_dir():
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir()))
        raise ConfigError(f"{path}: no such bundled data set; there is: {there}")
    copy = storage.child(f"bundled/{name}")
    for file in sorted(origin.iterdir()):
        data = file.read_bytes()
        if not copy.exists(file.name) or copy.read(file.name) != data:
            copy.write(file.name, data)
    return f"{copy.uri}/{rest}" if rest else copy.uri
