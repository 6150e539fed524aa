"""Fetching images by URL, without becoming a way into the network that the server stands in.

Off unless hosts are listed. A URL is taken apart once, here, and what was checked is what is
fetched: two parsers that read one URL differently have opened such lists elsewhere
(CVE-2026-24779). Then the name's addresses are looked up, all of them must be public, and the
connection goes to one of these very addresses. Left out: what the bytes are (the decoder says).
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from clip_ray.config.serving import ImageUrls
from clip_ray.errors import ConfigError
from serve.errors import ApiError

_PORT = 443
_URL_CHARS = 8192
# Printable ASCII without the backslash, which browsers read as a slash and others do not.
_URL = re.compile(
    r"https://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::443)?(?P<rest>[/?#][!-\[\]-~]*)?",
    re.IGNORECASE | re.ASCII,  # without ASCII, the Kelvin sign is a k
)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# What `is_global` of one Python or another (3.11 to 3.13) calls public; 168.63.129.16 is Azure's
# host service, on every machine there.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        ["192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2002::/16"]
        + ["3fff::/20"],
    )
)
# All global unicast addresses handed out so far. Outside are the forms that wrap an IPv4 address,
# private ones too (::ffff:0:0/96, 64:ff9b::/96); 6to4 and Teredo are inside, and listed above.
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")

Resolve = Callable[[str], Awaitable[Sequence[str]]]


class Fetcher:
    """Fetches files over https from listed hosts; serves one event loop.

    Args:
        urls: the listed hosts and the time for a fetch. `*.example.com` stands for every name
            below example.com, and not for example.com itself; an address must be listed as it is.
        max_bytes: largest file.
        resolve: name -> all its addresses; default: the system's. For tests.
        connect: checked address -> where to connect to; default: the address, port 443. For tests.
        tls: trusted certificates; default: the system's. For tests.

    Raises:
        ConfigError: an entry of urls.hosts that is neither a host nor `*.` and a domain.
    """

    def __init__(
        self,
        urls: ImageUrls,
        max_bytes: int,
        resolve: Resolve | None = None,
        connect: Callable[[str], tuple[str, int]] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts, self._domains = _listed(urls.hosts)
        self._timeout_s = urls.timeout_s
        self._max_bytes = max_bytes
        # A name server that hangs must not fill the threads that others' work waits for.
        self._threads = ThreadPoolExecutor(8, "resolve") if resolve is None else None
        self._resolver = _PublicResolver(
            resolve or self._look_up, connect or (lambda address: (address, _PORT))
        )
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    async def get(self, url: str) -> bytes:
        """Return the bytes of the file at `url`.

        Raises:
            ApiError: 400 image_url_off without listed hosts; 400 image_url_refused for a URL,
                address or redirect that is not allowed; 413 image_too_large; 422 image_url_failed
                where nothing whole and plain comes in time.
        """
        host, target = self.check(url)
        try:
            # Over all of it: the lookup, the wait for a free connection, every byte.
            async with asyncio.timeout(self._timeout_s):
                async with self._opened().get(target, allow_redirects=False) as answer:
                    return await self._body(host, answer)
        except TimeoutError:
            raise _failed(f"{host}: not fetched within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            # The kind alone: the text may hold addresses of the server's network.
            raise _failed(f"{host}: cannot be fetched ({type(error).__name__})") from error

    async def close(self) -> None:
        """Close kept connections; the fetcher may be used again."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def check(self, url: str) -> tuple[str, URL]:
        """Return host and URL as they will be asked for, without asking anybody.

        Raises:
            ApiError: 400 where fetching is off, or this URL is not allowed.
        """
        if not self._hosts and not self._domains:
            raise ApiError(
                400,
                "image_url_off",
                "this server fetches no images by URL; send the bytes, as a data URI or base64",
            )
        match = _URL.fullmatch(url) if len(url) <= _URL_CHARS else None
        if match is None:
            raise _refused(
                f"expected https://HOST/PATH of at most {_URL_CHARS} printable ASCII characters, "
                "without user, password or a port other than 443; percent-encode the path, and "
                "write the host in its xn-- form"
            )
        host = _canonical(match["host"])
        if host is None:
            raise _refused(
                f"host {match['host'][:255]!r} is neither a name nor an address in its usual form"
            )
        # Only a name can end like a domain: addresses end in a number, and domains do not.
        if host not in self._hosts and not host.endswith(self._domains):
            raise _refused(f"host {host} is not on this server's list of image hosts")
        if _is_address(host) and not is_public(host):
            raise _not_public(host)
        path, _, query = (match["rest"] or "").partition("#")[0].partition("?")
        # Encoded as given: a signature over the URL must still fit.
        netloc = f"[{host}]" if ":" in host else host
        return host, URL.build(
            scheme="https", host=netloc, path=path or "/", query_string=query, encoded=True
        )

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=self._resolver,
                # What was checked a while ago may be false now: each connection asks anew.
                use_dns_cache=False,
                ssl=self._tls or True,
                limit=32,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                # Neither proxies nor passwords of the server's own environment.
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                # Decompression would multiply what the byte cap has let in.
                auto_decompress=False,
                headers={
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                    "User-Agent": "clip-ray",
                },
            )
        return self._session

    async def _body(self, host: str, answer: aiohttp.ClientResponse) -> bytes:
        """Read an answer whole; on leaving early its connection is closed by aiohttp."""
        if 300 <= answer.status < 400:
            raise _refused(f"{host}: answers with a redirect; give the URL that it leads to")
        if answer.status != 200:
            raise _failed(f"{host}: answers with status {answer.status}")
        encodings = answer.headers.getall("Content-Encoding", [])
        if any(encoding.strip().lower() != "identity" for encoding in encodings):
            raise _failed(f"{host}: sends the file compressed, though it was asked not to")
        if (answer.content_length or 0) > self._max_bytes:
            raise self._too_large(host)
        data = bytearray()
        async for chunk in answer.content.iter_any():
            data += chunk
            if len(data) > self._max_bytes:
                raise self._too_large(host)
        return bytes(data)

    def _too_large(self, host: str) -> ApiError:
        limit = f"{self._max_bytes / 1e6:g} MB"
        return ApiError(
            413, "image_too_large", f"image URL: {host}: the file has more than {limit}"
        )

    async def _look_up(self, host: str) -> list[str]:
        infos = await asyncio.get_running_loop().run_in_executor(
            # Bytes: names are ASCII here, and Python would encode a str once more.
            self._threads,
            lambda: socket.getaddrinfo(host.encode(), _PORT, type=socket.SOCK_STREAM),
        )
        return [str(info[4][0]) for info in infos]


class _PublicResolver(AbstractResolver):
    """Answers aiohttp, once for each connection, with addresses that are all checked."""

    def __init__(self, resolve: Resolve, connect: Callable[[str], tuple[str, int]]) -> None:
        self._resolve = resolve
        self._connect = connect

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = list(dict.fromkeys(await self._resolve(host)))
        # One that is not public spoils all: such a mix is how rebinding begins.
        if not all(map(is_public, addresses)):
            raise _not_public(host)
        if not addresses:
            raise OSError(f"{host} has no address")
        return [self._result(host, *self._connect(address)) for address in addresses]

    def _result(self, host: str, address: str, port: int) -> ResolveResult:
        return ResolveResult(
            hostname=host,
            host=address,
            port=port,
            family=socket.AF_INET6 if ":" in address else socket.AF_INET,
            proto=0,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        )

    async def close(self) -> None:
        """Do nothing: it holds nothing."""


def is_public(address: str) -> bool:
    """Tell whether an IPv4 or IPv6 address is one of the open internet, and of one machine.

    What wraps an IPv4 address (mapped, NAT64, 6to4, Teredo) is not, whatever it wraps.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6 and ip not in _GLOBAL_V6:
        return False
    is_special = ip.is_multicast or any(ip in net for net in _NOT_PUBLIC)
    return ip.is_global and not is_special


def _is_address(host: str) -> bool:
    return ":" in host or host.rpartition(".")[2].isdigit()


def _canonical(host: str) -> str | None:
    """Return a host as it is compared and asked for: lower case; None if it is none.

    What ends in a number must be a full IPv4 address: 2130706433 and 127.1 are addresses to some
    libraries and names to others.
    """
    host = host.lower()
    try:
        if ":" in host:
            return str(ipaddress.IPv6Address(host.removeprefix("[").removesuffix("]")))
        if _is_address(host):
            return str(ipaddress.IPv4Address(host))
    except ValueError:
        return None
    # A trailing dot leaves an empty label: the same host under another name.
    is_name = len(host) <= 253 and all(map(_LABEL.fullmatch, host.split(".")))
    return host if is_name else None


def _listed(hosts: Sequence[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the exact hosts, and the endings (`.example.com`) of those with a star."""
    exact, endings = set(), set()
    for entry in hosts:
        has_star = entry.startswith("*.")
        host = _canonical(entry.removeprefix("*."))
        if host is None or (has_star and (_is_address(host) or "." not in host)):
            raise ConfigError(
                f"image_urls.hosts: {entry!r}: expected a host like images.example.com, *. and a "
                "domain like *.example.com, or an address; no scheme, port or path, and other "
                "letters than ASCII in their xn-- form"
            )
        if has_star:
            endings.add(f".{host}")
        else:
            exact.add(host)
    return frozenset(exact), tuple(sorted(endings))


def _refused(message: str) -> ApiError:
    return ApiError(400, "image_url_refused", f"image URL: {message}")


def _not_public(host: str) -> ApiError:
    return _refused(f"host {host} has an address that is not of the open internet")


def _failed(message: str) -> ApiError:
    return ApiError(422, "image_url_failed", f"image URL: {message}")
