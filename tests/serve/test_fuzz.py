"""Thousands of broken requests: none is an error of ours, and valid ones answer as ever."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from clip_ray import keys
from clip_ray.registry import ServedModel
from tests.serve.fuzz import Fuzzed, Fuzzer
from tests.serve.models import picture
from tests.serve.support import JSON, Answer, Client, Site, call, data_uri, running

# Every status that the API has for what a client does wrong. 408 and 5xx are ours to avoid.
EXPECTED = {200, 304, 400, 401, 403, 404, 405, 409, 413, 415, 422, 429}
# Small, so that they are full after the warm-up: what grows then is a leak.
CACHES = {"text_cache": 64, "classifier_cache": 4}
_PROBE_IMAGE = data_uri(picture(77))
PROBES = [
    ("/v1/embeddings", {"input": "the probe's own text", "encoding_format": "base64"}),
    ("/v1/embeddings", {"input": {"image": _PROBE_IMAGE}}),
    ("/v1/classify", {"input": _PROBE_IMAGE, "classifier": "probe", "scoring": "sigmoid"}),
    ("/v1/rank", {"query": {"image": _PROBE_IMAGE}, "documents": ["the probe's own text"]}),
]


class Lines(logging.Handler):
    """Reads the access log as a machine would: one JSON object a line."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        assert "\n" not in text and set(json.loads(text)) >= {"id", "route", "status"}
        self.count += 1


@contextlib.contextmanager
def counted_log() -> Iterator[Lines]:
    """Count the lines of the access log, and keep none: pytest would, and that is memory.

    Inside a test only: what does not propagate when a test begins, pytest listens to as well.
    """
    access, handler = logging.getLogger("clip_ray.access"), Lines()
    before = access.level, access.propagate
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False
    try:
        yield handler
    finally:
        access.setLevel(before[0])
        access.propagate = before[1]
        access.removeHandler(handler)


class Attack:
    """A replica with keys, its fuzzer, and what came back."""

    def __init__(self, folder: Path, model: ServedModel, seed: int) -> None:
        file = str(folder / "keys.json")
        key, _ = keys.create(file, "fuzz", keys.SCOPES)
        settings = {"auth": "keys", "keys_file": file, **CACHES}
        self.site = Site(folder, model, settings, keys=keys.KeyRing(file))
        self.fuzzer = Fuzzer(seed, key)
        self.headers = {**JSON, "authorization": f"Bearer {key}"}
        self.statuses: Counter[int] = Counter()
        self.codes: Counter[str] = Counter()
        self.mutated = 0
        self.answered: list[bytes] = []

    async def ask(self, request: Fuzzed) -> None:
        client = Client(request.chunks)
        answer = await call(
            self.site.app, request.method, request.path, headers=request.headers, client=client
        )
        self.statuses[answer.status] += 1
        self.mutated += request.is_mutated_body
        assert answer.status in EXPECTED, (request.method, request.path, request.body[:500], answer)
        if answer.status >= 400:
            self.codes[answer.error["code"]] += 1
        elif answer.headers["content-type"] == "application/octet-stream":
            assert np.isfinite(np.frombuffer(answer.body, "<f4")).all()
        elif answer.headers["content-type"] == "application/json":
            json.loads(answer.body, parse_constant=pytest.fail)

    async def probe(self) -> None:
        """Ask what is right, and compare with what was answered before anything was wrong."""
        found = [await self._valid(path, body) for path, body in PROBES]
        answers = [_without_cached(answer) for answer in found]
        self.answered = self.answered or answers
        assert answers == self.answered

    async def _valid(self, path: str, body: object, method: str = "POST") -> Answer:
        answer = await call(self.site.app, method, path, [json.dumps(body).encode()], self.headers)
        assert answer.status == 200, answer
        return answer

    async def rounds(self, count: int) -> None:
        for number in range(count):
            if number % 50 == 0:
                await self.probe()
            await self.ask(self.fuzzer.next())
        await self.probe()

    async def begin(self) -> None:
        await self._valid("/v1/classifiers/probe", {"labels": ["x", "y"]}, "PUT")


def _without_cached(answer: Answer) -> bytes:
    return answer.body.replace(b'"cached":true', b'"cached":false')


def resident_mb() -> float:
    """Return this process' memory, after giving back what can be given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss / 1e6


def test_2000_broken_requests(tmp_path: Path, served: ServedModel) -> None:
    attack = Attack(tmp_path, served, seed=1)
    with running(attack.site), counted_log() as log:
        attack.site.run(attack.begin())
        attack.site.run(attack.rounds(2000), timeout=300)
        assert attack.site.gate().in_flight == 0 and attack.site.engine.budget.in_use == 0
    assert sum(attack.statuses.values()) == 2000 and attack.mutated >= 1000
    assert log.count == 2000 + 41 * len(PROBES) + 1
    # It did reach every corner: what is refused, and also what is let through.
    assert {200, 400, 401, 404, 405, 413, 415, 422} <= attack.statuses.keys()
    expected = """
        invalid_json invalid_form invalid_type unknown_field token_ids empty
        undecodable_image unsupported_image too_many_items text_too_long invalid_unicode
        unsupported_media_type missing_key invalid_key
    """
    assert set(expected.split()) <= attack.codes.keys(), attack.codes
    assert attack.statuses[200] > 100


@pytest.mark.slow
def test_10000_broken_requests_leave_no_memory_behind(tmp_path: Path, served: ServedModel) -> None:
    attack = Attack(tmp_path, served, seed=2)
    memory = []
    with running(attack.site), counted_log():
        attack.site.run(attack.begin())
        for _ in range(10):
            attack.site.run(attack.rounds(1000), timeout=600)
            memory.append(resident_mb())
    assert sum(attack.statuses.values()) == 10_000 and attack.mutated >= 5000
    warm = memory[3:]
    slope = float(np.polyfit(range(len(warm)), warm, 1)[0])
    assert slope < 1.0, f"MB after each 1,000: {[round(mb, 1) for mb in memory]}"
