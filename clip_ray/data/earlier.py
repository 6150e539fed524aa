"""Results of earlier indexes: shards that have not changed are not scanned again.

They come from manifests (the run's own, one that lies beside the data) and from the parts that an
index leaves in the run's directory while it goes on: one that was killed resumes with them. A
result is used for a shard of the same path, size, version, sidecar and settings; whatever else a
manifest holds does no harm.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from clip_ray.config.schema import DataConfig
from clip_ray.data.details import Spool
from clip_ray.data.indexing import Entry, Job, read_notes
from clip_ray.data.manifest import Manifest, gather
from clip_ray.data.manifest_file import load_manifest, save_manifest
from clip_ray.errors import DataError
from clip_ray.storage import Store, open_store

MANIFEST = "manifest.parquet"
PARTS = "index"  # directory in the run's
BESIDE = "manifest.clip-ray"  # no suffix of a shard: it lies among shards
PART_SHARDS = 256
PART_S = 10.0  # seconds of work that a kill may cost

Record = Callable[[Job, Entry], None]


class Earlier:
    """What earlier indexes found, by shard, and the place for what this one finds.

    Args:
        store: the run's directory.
        manifests: results at hand; of two about one shard the later in the list counts.
        part_s: seconds between parts.
    """

    def __init__(
        self, store: Store, manifests: Sequence[Manifest] = (), part_s: float = PART_S
    ) -> None:
        self._store, self._part_s = store, part_s
        self._rows: dict[tuple[str, str, str, str], tuple[Manifest, int]] = {}
        self._empty: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        self.kept = self.scanned = 0
        for manifest in manifests:
            self._add(manifest)

    def _add(self, manifest: Manifest) -> None:
        evidence = manifest.evidence
        if evidence is None:
            return  # of format 1
        for row, (source, size) in enumerate(
            zip(manifest.source.tolist(), manifest.sizes.tolist(), strict=True)
        ):
            version = f"{size} {manifest.versions.text(row)}"
            sidecar = evidence.sidecars.text(row)
            key = (manifest.paths.text(row), version, sidecar, evidence.settings[source])
            self._rows[key] = manifest, row
        for entry in evidence.empty:
            version = f"{entry['size']} {entry['version']}"
            settings = evidence.settings[entry["source"]]
            self._empty[entry["path"], version, entry["sidecar"], settings] = entry

    def find(self, job: Job, settings: str) -> Entry | None:
        """Return what an earlier index found in a shard; None where it must be scanned."""
        key = (*job.identity, settings)
        entry: Entry | None = None
        if key in self._rows:
            manifest, row = self._rows[key]
            # Damaged, or replaced by another index meanwhile: a scan says the same.
            with suppress(DataError, FileNotFoundError):
                entry = manifest.entry(row)
        elif key in self._empty:
            entry = _empty_entry(self._empty[key])
        self.kept += entry is not None
        return entry

    @contextmanager
    def recording(self, settings: tuple[str, ...]) -> Iterator[Record]:
        """Yield a function that takes results; they are written in parts, the last one at exit."""
        waiting: list[tuple[Job, Entry]] = []
        written = time.monotonic()

        def write() -> None:
            nonlocal written
            if waiting:
                jobs, entries = zip(*waiting, strict=True)
                spool = Spool()
                for entry in entries:
                    spool.add(entry.record)
                part = gather(jobs, entries, spool.details(), [""] * len(settings), settings, {})
                save_manifest(part, self._store.child(PARTS), f"{uuid.uuid4().hex}.parquet")
            waiting.clear()
            written = time.monotonic()

        def record(job: Job, entry: Entry) -> None:
            waiting.append((job, entry))
            self.scanned += 1
            if len(waiting) >= PART_SHARDS or time.monotonic() - written >= self._part_s:
                write()

        try:
            yield record
        finally:
            write()


def read_earlier(store: Store, data: DataConfig, say: Callable[[str], None]) -> Earlier:
    """Return what is known of a data set: from beside the data, the run's manifest and parts.

    Args:
        store: the run's directory.
        data: the sources.
        say: told which file cannot be used.
    """
    folders = dict.fromkeys(folder_of(source.path) for source in data.sources)
    places = [(open_store(folder, data.s3), BESIDE) for folder in folders]
    parts = store.child(PARTS)
    places += [
        (store, MANIFEST),
        *((parts, name) for name in parts.files() if name.endswith(".parquet")),
    ]
    manifests = []
    for place, name in places:
        try:
            manifests.append(load_manifest(place, name))
        except FileNotFoundError:
            continue
        except DataError as error:
            say(f"{place.uri}/{name} is of no use to this index: {error}")
    return Earlier(store, manifests)


def folder_of(path: str) -> str:
    """Return the directory in which a source's shards lie, or the one above all of them."""
    fixed = path[: min((path.find(c) for c in "*?[{" if c in path), default=len(path))]
    if fixed == path and not path.lower().endswith((".tar", ".parquet")):
        return path.rstrip("/")
    return fixed.rpartition("/")[0]


def _empty_entry(entry: dict[str, Any]) -> Entry:
    return Entry(
        path=entry["path"],
        kind=entry["kind"],
        size=entry["size"],
        version=entry["version"],
        sidecar=entry["sidecar"],
        **read_notes(entry["notes"]),
    )
