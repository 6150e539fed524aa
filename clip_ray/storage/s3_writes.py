"""Writes to S3, each request of which is repeated within the same bounds as a read.

s3fs writes too, but waits half an hour for a store that hangs, and takes a delete that was refused
for one that was done. A large file goes up in parts, some at a time: each part has the time of
one request, so that a file of any size may be written, and one that gets nowhere is given up.

What is known of an upload that is given up is aborted; where the store does not even answer that,
its parts stay. A rule of the bucket for incomplete uploads clears them away.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.asyn import sync
from s3fs import S3FileSystem

from clip_ray.errors import StorageError
from clip_ray.storage.s3_reads import Reader, status_of

PART = 16 << 20  # bytes of an upload's part, at least; a file below two of them is one request
_PARTS = 4  # parts of one file on their way at a time
_MOST_PARTS = 10_000  # S3's limit
_KEYS = 1000  # that one request may delete: S3's limit
_ABORT_S = 5.0  # an upload that is given up has taken its time already
_TOKEN = "clip-ray-upload"  # metadata by which an upload is known again
_REFUSED = ("AccessDenied", "AllAccessDisabled")


class Client(Reader):
    """The client of a store: it reads as `Reader` does, and writes."""

    def write_bytes(self, path: str, data: bytes, exclusive: bool = False) -> None:
        """Write an object.

        Args:
            path: s3:// URI.
            data: its content.
            exclusive: it must not exist yet; a status of 412 says that it does, or that an
                earlier try of ours arrived.

        Raises:
            StorageError: the store failed for longer than the bound.
            OSError: it refused the request.
        """

        async def part(start: int, stop: int) -> bytes:
            return data[start:stop]

        sync(self.loop, self._write, path, len(data), part, exclusive)

    def write_file(self, path: str, local: Path) -> None:
        """Write an object from a local file. Raises what `write_bytes` raises."""

        def read(start: int, stop: int) -> bytes:
            with open(local, "rb") as file:
                file.seek(start)
                return file.read(stop - start)

        async def part(start: int, stop: int) -> bytes:
            return await asyncio.to_thread(read, start, stop)

        sync(self.loop, self._write, path, local.stat().st_size, part, False)

    def delete_below(self, path: str) -> None:
        """Delete an object, or all below a prefix; nothing there is no error.

        Raises:
            PermissionError: the store refuses.
            StorageError: it failed for longer than the bound.
        """
        sync(self.loop, self._delete_below, path)

    async def _write(
        self,
        path: str,
        size: int,
        part: Callable[[int, int], Awaitable[bytes]],
        exclusive: bool,
    ) -> None:
        bucket, key, _ = self.split_path(path)
        target = {"Bucket": bucket, "Key": key}
        condition = {"IfNoneMatch": "*"} if exclusive else {}
        if size < 2 * PART:
            await self._call_s3("put_object", Body=await part(0, size), **target, **condition)
            return
        token = uuid.uuid4().hex
        upload = await self._call_s3("create_multipart_upload", Metadata={_TOKEN: token}, **target)
        target["UploadId"] = upload["UploadId"]
        try:
            parts = await self._upload_parts(target, size, part)
            await self._complete(target, parts, token, condition)
        except Exception:
            # One attempt: the bound has been spent.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_ABORT_S):
                    await S3FileSystem._call_s3(self, "abort_multipart_upload", **target)
            raise

    async def _upload_parts(
        self,
        target: dict[str, str],
        size: int,
        part: Callable[[int, int], Awaitable[bytes]],
    ) -> list[dict[str, Any]]:
        length = max(PART, -(-size // _MOST_PARTS))
        free = asyncio.Semaphore(_PARTS)

        async def send(number: int, start: int) -> dict[str, Any]:
            async with free:
                body = await part(start, min(start + length, size))
                answer = await self._call_s3("upload_part", PartNumber=number, Body=body, **target)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        tasks = [
            asyncio.ensure_future(send(number, start))
            for number, start in enumerate(range(0, size, length), 1)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _complete(
        self,
        target: dict[str, str],
        parts: list[dict[str, Any]],
        token: str,
        condition: dict[str, str],
    ) -> None:
        try:
            await self._call_s3(
                "complete_multipart_upload",
                MultipartUpload={"Parts": parts},
                **target,
                **condition,
            )
        except OSError as error:
            # 404, 412: the answer to an earlier try may be what got lost, not the upload.
            if status_of(error) not in (404, 412) or not await self._is_there(target, token):
                if isinstance(error, FileNotFoundError):
                    raise StorageError(
                        f"s3://{target['Bucket']}/{target['Key']}: the store has lost the upload "
                        f"({error}); is there a rule that aborts uploads early?"
                    ) from error
                raise

    async def _is_there(self, target: dict[str, str], token: str) -> bool:
        """Tell whether the object is the one of this upload."""
        try:
            found = await self._call_s3("head_object", Bucket=target["Bucket"], Key=target["Key"])
        except FileNotFoundError:
            return False
        return bool(found.get("Metadata", {}).get(_TOKEN) == token)

    async def _delete_below(self, path: str) -> None:
        found = await self._find(path)
        for first in range(0, len(found), _KEYS):
            some = [self.split_path(name)[:2] for name in found[first : first + _KEYS]]
            bucket, keys = some[0][0], [key for _, key in some]
            what = f"deleting {len(keys)} objects of s3://{bucket}, from {keys[0]} on"
            await self._persist(what, partial(self._delete_keys, bucket, keys))

    async def _delete_keys(self, bucket: str, keys: list[str]) -> None:
        """Delete some objects with one request; those that are gone are no error."""
        answer = await S3FileSystem._call_s3(
            self,
            "delete_objects",
            Bucket=bucket,
            Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True},
        )
        for failed in answer.get("Errors", []):
            said = f"{failed.get('Code')}: {failed.get('Message')} ({failed.get('Key')})"
            # The request itself was answered with 200.
            raise PermissionError(said) if failed.get("Code") in _REFUSED else ConnectionError(said)
