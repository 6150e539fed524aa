"""Fixtures that several tests share: an S3 server of our own, a browser."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_ray.config import S3Options
from tests.browser import Browser, find_chromium

BUCKET = "bucket"
_START_S = 60


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Options]:
    """Options of a moto server over HTTP that holds the empty bucket `bucket`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p"]
    log = tmp_path_factory.mktemp("moto") / "log"
    with pytest.MonkeyPatch.context() as patch, open(log, "wb") as output:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # The developer's own files must neither help nor hinder.
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        patch.delenv("AWS_PROFILE", raising=False)
        server = subprocess.Popen([*command, str(port)], stdout=output, stderr=output)
        try:
            _wait(endpoint, server, log)
            import boto3

            boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
            yield S3Options(endpoint=endpoint)
        finally:
            server.kill()
            server.wait(10)


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """A headless Chromium; where none is on PATH the tests that want it are skipped together."""
    executable = find_chromium()
    if executable is None:
        lost = [i for i in request.session.items if "browser" in getattr(i, "fixturenames", ())]
        reason = f"no Chromium on PATH: {len(lost)} browser tests skipped"
        for item in lost:  # the summary folds what is skipped by a mark into one line
            item.add_marker(pytest.mark.skip(reason=reason))
        pytest.skip(reason)
    with Browser(executable) as running:
        yield running


def _wait(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"moto_server does not answer at {endpoint}: {log.read_text()[-2000:]}")
