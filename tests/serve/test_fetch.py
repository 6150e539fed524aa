from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clip_ray.config.serving import ImageUrls
from clip_ray.errors import ConfigError
from serve.errors import ApiError
from serve.fetch import Fetcher, is_public

HOST = "images.example.com"
PUBLIC, OTHER = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
BODY = bytes(range(256)) * 40
MAX_BYTES = 20_000

NOT_PUBLIC = {
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fd00:ec2::254"],
    "loopback": ["127.0.0.1", "127.8.9.10", "::1"],
    "link-local": ["169.254.169.254", "169.254.0.1", "fe80::1", "fe80::1%eth0"],
    "unspecified": ["0.0.0.0", "0.1.2.3", "::"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"],
    "carrier-grade NAT": ["100.64.0.1", "100.100.100.200", "100.127.255.255"],
    "IPv4-mapped": ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::7f00:1"],
    "IPv4-translated": ["::ffff:0:7f00:1"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b::808:808", "64:ff9b:1::7f00:1"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:808:808::1"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:f5ff:fffe", "2001::1", "2001:20::1", "2001:1::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "192.0.0.8", "192.88.99.1", "198.18.0.1"],
    "site-local": ["fec0::1", "fc00::1", "100::1", "5f00::1", "4000::1"],
    "Azure's host service": ["168.63.129.16"],
    "no address": ["", "localhost", "1.2.3", "8.8.8.8/32"],
}


@pytest.mark.parametrize("kind", NOT_PUBLIC)
def test_addresses_that_are_not_public(kind: str) -> None:
    assert [address for address in NOT_PUBLIC[kind] if is_public(address)] == []


def test_addresses_that_are_public() -> None:
    addresses = [PUBLIC, OTHER, "8.8.8.8", "100.63.255.255", "100.128.0.0", "2001:4860:4860::8888"]
    assert all(map(is_public, addresses))


# What a local TLS server answers, and what it saw.


@dataclass
class Site:
    """A TLS server on loopback that stands for the open internet.

    Attributes:
        port: where it listens.
        tls: trusts its certificate, made for images.example.com alone.
        answer: writes the answer to a request whose head is given.
        heads: of the requests, as they came.
        names: that clients named in the handshake.
        connections: how many there were.
    """

    port: int
    tls: ssl.SSLContext
    answer: Callable[[asyncio.StreamWriter], Awaitable[None]]
    heads: list[str] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    connections: int = 0
    connected_to: list[str] = field(default_factory=list)

    def fetcher(
        self,
        answers: Sequence[Sequence[str]] = ((PUBLIC,),),
        hosts: Sequence[str] = (HOST,),
        timeout_s: float = 5,
        tls: ssl.SSLContext | None = None,
    ) -> Fetcher:
        """Return a fetcher that is sent here whatever the address; `answers` of the resolver."""
        pending = list(answers)

        async def resolve(host: str) -> Sequence[str]:
            return pending.pop(0) if len(pending) > 1 else pending[0]

        def connect(address: str) -> tuple[str, int]:
            self.connected_to.append(address)
            return "127.0.0.1", self.port

        urls = ImageUrls(hosts=tuple(hosts), timeout_s=timeout_s)
        return Fetcher(urls, MAX_BYTES, resolve, connect, tls or self.tls)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "clip-ray test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def head(status: str = "200 OK", **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


async def plain(writer: asyncio.StreamWriter) -> None:
    writer.write(head(Content_Length=len(BODY)) + BODY)


@contextlib.asynccontextmanager
async def site(certificate: Path, answer=plain) -> AsyncIterator[Site]:
    trusted = ssl.create_default_context(cafile=certificate)
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate)
    made = Site(0, trusted, answer)
    own.sni_callback = lambda _, name, __: made.names.append(name)
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        made.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            while True:
                made.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
                await made.answer(writer)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=own)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 10))


async def refused(fetcher: Fetcher, url: str = f"https://{HOST}/a.png") -> ApiError:
    """Return the error of a fetch; close the fetcher."""
    try:
        with pytest.raises(ApiError) as raised:
            await fetcher.get(url)
    finally:
        await fetcher.close()
    return raised.value


def is_refused(hosts: Sequence[str], url: str) -> bool:
    """Tell whether a URL is refused before any lookup; one that is not ends at the lookup."""

    async def no_address(host: str) -> Sequence[str]:
        raise OSError("looked up")

    async def main() -> ApiError:
        return await refused(Fetcher(ImageUrls(hosts=tuple(hosts)), MAX_BYTES, no_address), url)

    error = asyncio.run(main())
    assert (error.status, error.code) in [(400, "image_url_refused"), (422, "image_url_failed")]
    return error.status == 400


def test_off_unless_hosts_are_listed() -> None:
    error = asyncio.run(refused(Fetcher(ImageUrls(), MAX_BYTES)))
    assert (error.status, error.code) == (400, "image_url_off")


def test_a_file_arrives_over_a_pinned_connection_under_its_hosts_name(certificate) -> None:
    async def main() -> None:
        async with site(certificate) as there:
            fetcher = there.fetcher([[PUBLIC]])
            url = "HTTPS://Images.Example.COM:443/a%2Fb/c.png?sig=%2B+x&y=%C3%A4#part"
            assert await fetcher.get(url) == BODY
            assert await fetcher.get(f"https://{HOST}") == BODY
            await fetcher.close()
            assert there.names == [HOST] and there.connections == 1
            assert there.connected_to == [PUBLIC]
            first, second = there.heads
            assert first.startswith("GET /a%2Fb/c.png?sig=%2B+x&y=%C3%A4 HTTP/1.1\r\n")
            assert second.startswith("GET / HTTP/1.1\r\n")
            assert f"\r\nHost: {HOST}\r\n" in first
            assert "\r\nAccept-Encoding: identity\r\n" in first
            assert "Cookie" not in second and "Authorization" not in first

    run(main())


def test_cookies_are_not_kept(certificate) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(Content_Length=1, Set_Cookie="who=me; Path=/") + b"x")

    async def main() -> None:
        async with site(certificate, answer) as there:
            fetcher = there.fetcher()
            await fetcher.get(f"https://{HOST}/")
            await fetcher.get(f"https://{HOST}/")
            await fetcher.close()
            assert len(there.heads) == 2 and "ookie" not in "".join(there.heads)

    run(main())


@pytest.mark.parametrize("kind", [kind for kind in NOT_PUBLIC if kind != "no address"])
def test_names_with_such_addresses_are_refused(certificate, kind: str) -> None:
    async def main() -> None:
        async with site(certificate) as there:
            for address in NOT_PUBLIC[kind]:
                # Alone, and among public ones: wherever it stands.
                for answer in [[address], [PUBLIC, address], [address, OTHER]]:
                    error = await refused(there.fetcher([answer]))
                    assert (error.status, error.code) == (400, "image_url_refused"), answer
                    assert address not in error.message
            assert there.connected_to == [] and there.connections == 0

    run(main())


def test_rebinding_reaches_only_what_was_checked(certificate) -> None:
    async def closing(writer: asyncio.StreamWriter) -> None:
        writer.write(head(Content_Length=len(BODY), Connection="close") + BODY)

    async def main() -> None:
        async with site(certificate, closing) as there:
            # A second lookup, between check and connection, would give the second answer.
            fetcher = there.fetcher([[PUBLIC], ["127.0.0.1"]])
            assert await fetcher.get(f"https://{HOST}/") == BODY
            assert there.connected_to == [PUBLIC]
            # The next connection asks anew, and is refused.
            error = await refused(fetcher)
            assert error.code == "image_url_refused"
            assert there.connected_to == [PUBLIC] and there.connections == 1

    run(main())


def test_the_systems_resolver_is_checked_too() -> None:
    fetcher = Fetcher(ImageUrls(hosts=("localhost",)), MAX_BYTES)
    error = asyncio.run(refused(fetcher, "https://localhost/"))
    assert error.code == "image_url_refused" and "open internet" in error.message


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 304])
def test_redirects_are_refused(certificate, status: int) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(f"{status} Moved", Location=f"https://{HOST}/b", Content_Length=0))

    async def main() -> None:
        async with site(certificate, answer) as there:
            error = await refused(there.fetcher())
            assert (error.status, error.code) == (400, "image_url_refused")
            assert len(there.heads) == 1

    run(main())


URLS = {
    "http": f"http://{HOST}/",
    "other schemes": f"ftp://{HOST}/",
    "file": "file:///etc/passwd",
    "no scheme": f"//{HOST}/",
    "data": "data:image/png;base64,AAAA",
    "one slash": f"https:/{HOST}/",
    "three slashes": f"https:///{HOST}/",
    "user": f"https://me@{HOST}/",
    "user and password": f"https://me:secret@{HOST}/",
    "the host as a user": f"https://{HOST}@127.0.0.1/",
    "the host as a user, encoded": f"https://{HOST}%40127.0.0.1/",
    "the host as a user, backslash": f"https://{HOST}\\@127.0.0.1/",
    "backslash": f"https://127.0.0.1\\.{HOST}/",
    "backslash in the path": f"https://{HOST}/a\\b",
    "port 80": f"https://{HOST}:80/",
    "port 8443": f"https://{HOST}:8443/",
    "port 0443": f"https://{HOST}:0443/",
    "empty port": f"https://{HOST}:/",
    "port 443@": f"https://{HOST}:443@127.0.0.1/",
    "trailing dot": f"https://{HOST}./",
    "leading dot": f"https://.{HOST}/",
    "two dots": "https://images..example.com/",
    "space before": f" https://{HOST}/",
    "newline after": f"https://{HOST}/\n",
    "newline in the path": f"https://{HOST}/a\r\nX-Evil: 1",
    "tab in the host": "https://images.exam\tple.com/",
    "zero byte": f"https://{HOST}/\0",
    "space in the path": f"https://{HOST}/a b",
    "percent in the host": "https://images%2eexample.com/",
    "full-width dot": "https://images\uff0eexample.com/",
    "ideographic dot": "https://images\u3002example.com/",
    "circled letters": "https://images.example.\u24d2\u24de\u24dc/",
    "Kelvin sign": "https://\u212ac.example.com/",
    "long s": f"http\u017f://{HOST}/",
    "soft hyphen": "https://images.exam\u00adple.com/",
    "umlaut": "https://b\u00fccher.example.com/",
    "umlaut in the path": f"https://{HOST}/\u00e4",
    "another host": "https://example.org/",
    "the host in front": f"https://{HOST}.example.org/",
    "the host behind": f"https://not{HOST}/",
    "the domain": "https://example.com/",
    "the host in the query": f"https://example.org/?{HOST}",
    "the host in the fragment": f"https://example.org#{HOST}/",
    "hyphen first": "https://-a.wild.example.net/",
    "a label of 64": f"https://{'a' * 64}.wild.example.net/",
    "a name of 254": f"https://{'a.' * 119}wild.example.net/",
    "only the star's domain": "https://wild.example.net/",
    "like the star's domain": "https://notwild.example.net/",
    "a star": "https://*.wild.example.net/",
    "too long": f"https://{HOST}/{'a' * 8192}",
    "nothing": "",
}
ADDRESSES = {
    "public IPv4": "https://93.184.215.14/",
    "loopback IPv4": "https://127.0.0.1/",
    "decimal": "https://2130706433/",
    "hexadecimal": "https://0x7f000001/",
    "hexadecimal parts": "https://0x7f.0.0.0x1/",
    "octal": "https://0177.0.0.1/",
    "short": "https://127.1/",
    "IPv4 with a dot": "https://127.0.0.1./",
    "a name that ends in a number": "https://a.wild.example.net.1/",
    "IPv6": f"https://[{OTHER}]/",
    "loopback IPv6": "https://[::1]/",
    "mapped": "https://[::ffff:127.0.0.1]/",
    "scope": "https://[fe80::1%25eth0]/",
    "no brackets": "https://::1/",
    "empty brackets": "https://[]/",
    "name in brackets": f"https://[{HOST}]/",
}
HOSTS = (HOST, "*.wild.example.net", "kc.example.com")


@pytest.mark.parametrize("kind", [*URLS, *ADDRESSES])
def test_urls_that_are_refused_unasked(kind: str) -> None:
    assert is_refused(HOSTS, {**URLS, **ADDRESSES}[kind])


@pytest.mark.parametrize(
    "url",
    [
        f"https://{HOST}/a.png",
        f"https://{HOST.upper()}/a.png",
        f"https://{HOST}:443?a=b",
        f"https://{HOST}#x",
        f"https://{HOST}/~a/[1]/%5C?b=c@d:e&f=https://g",
        "https://a.wild.example.net/",
        "https://a.b-c.d_e.WILD.example.net/",
        "https://xn--bcher-kva.wild.example.net/",
        f"https://{HOST}/{'a' * 8000}",
    ],
)
def test_urls_that_are_let_through(url: str) -> None:
    assert not is_refused(HOSTS, url)


def test_a_listed_address_must_still_be_public() -> None:
    listed = ["127.0.0.1", "::1", "[fe80::1]", "2130706433.example.com", "*.0.1.example.com"]
    assert is_refused(listed, "https://127.0.0.1/")
    assert is_refused(listed, "https://[::1]/")
    assert is_refused(listed, "https://[0:0::0:1]/")
    assert is_refused(listed, "https://[fe80::1]/")
    assert is_refused(listed, "https://2130706433/")


def test_a_listed_public_address_is_connected_to_without_a_lookup(monkeypatch) -> None:
    asked = []

    async def start_connection(addr_infos: Any, **_: Any) -> socket.socket:
        asked.extend(info[4][:2] for info in addr_infos)
        raise OSError("no network in tests")

    async def resolve(host: str) -> Sequence[str]:
        raise AssertionError("looked up")

    monkeypatch.setattr("aiohappyeyeballs.start_connection", start_connection)
    for listed, url in [(PUBLIC, f"https://{PUBLIC}/"), (OTHER, f"https://[{OTHER.upper()}]/")]:
        error = asyncio.run(refused(Fetcher(ImageUrls(hosts=(listed,)), 1, resolve), url))
        assert error.code == "image_url_failed" and "no network" not in error.message
    assert asked == [(PUBLIC, 443), (OTHER, 443)]


@pytest.mark.parametrize(
    "entry",
    ["", "*", "*.", "*.com", "*.*.com", "a.*.com", "https://a.example.com", "a.example.com:443"]
    + ["a.example.com/", "b\u00fccher.example", "a.example.com.", "*.1.2.3.4", "127.1", " a.b"],
)
def test_entries_of_the_list_that_cannot_be_meant(entry: str) -> None:
    with pytest.raises(ConfigError, match="image_urls.hosts.*expected a host") as raised:
        Fetcher(ImageUrls(hosts=(entry,)), MAX_BYTES)
    assert repr(entry) in str(raised.value)


def chunked(size: int) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(Transfer_Encoding="chunked"))
        for start in range(0, size, 1000):
            part = bytes(min(1000, size - start))
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    return answer


def announced(size: int) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(Content_Length=size))
        writer.write(bytes(min(size, MAX_BYTES)))

    return answer


def until_closed(size: int) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(Connection="close") + bytes(size))
        await writer.drain()
        raise ConnectionError

    return answer


@pytest.mark.parametrize("way", [announced, chunked, until_closed])
def test_the_byte_cap(certificate, way) -> None:
    async def main() -> None:
        async with site(certificate, way(MAX_BYTES)) as there:
            fetcher = there.fetcher()
            assert await fetcher.get(f"https://{HOST}/") == bytes(MAX_BYTES)
            there.answer = way(MAX_BYTES + 1)
            error = await refused(fetcher)
            assert (error.status, error.code) == (413, "image_too_large")
            assert "more than 0.02 MB" in error.message

    run(main())


def test_an_endless_file_is_cut_off(certificate) -> None:
    sent = []

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(head())
        while True:
            writer.write(bytes(50_000))
            await writer.drain()
            sent.append(50_000)

    async def main() -> None:
        async with site(certificate, endless) as there:
            fetcher = there.fetcher()
            with pytest.raises(ApiError, match="more than 0.02 MB"):
                await fetcher.get(f"https://{HOST}/")
            seen = -1
            while seen < len(sent):  # the connection is closed: the server gets no further
                seen = len(sent)
                await asyncio.sleep(0.05)
            assert sum(sent) < 20e6  # what fits in buffers between the two
            await fetcher.close()

    run(main())


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "x", "identity, gzip"])
def test_compressed_answers_are_refused(certificate, encoding: str) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(Content_Length=len(BODY), Content_Encoding=encoding) + BODY)

    async def main() -> None:
        async with site(certificate, answer) as there:
            error = await refused(there.fetcher())
            assert (error.status, error.code) == (422, "image_url_failed")
            assert "compressed" in error.message

    run(main())


def test_an_answer_that_says_identity_is_taken(certificate) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(Content_Length=len(BODY), Content_Encoding="Identity") + BODY)

    async def main() -> None:
        async with site(certificate, answer) as there:
            fetcher = there.fetcher()
            assert await fetcher.get(f"https://{HOST}/") == BODY
            await fetcher.close()

    run(main())


async def slow_body(writer: asyncio.StreamWriter) -> None:
    writer.write(head(Content_Length=1000))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def slow_head(writer: asyncio.StreamWriter) -> None:
    for number in range(1000):
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n" if number % 2 else head("100 Continue"))
        await writer.drain()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("answer", [slow_body, slow_head])
def test_slow_answers_hit_the_time_bound(certificate, answer) -> None:
    async def main() -> None:
        async with site(certificate, answer) as there:
            began = asyncio.get_running_loop().time()
            error = await refused(there.fetcher(timeout_s=0.3))
            assert (error.status, error.code) == (422, "image_url_failed")
            assert "within 0.3 s" in error.message
            assert asyncio.get_running_loop().time() - began < 2

    run(main())


def test_a_slow_lookup_hits_the_time_bound() -> None:
    async def resolve(host: str) -> Sequence[str]:
        await asyncio.sleep(60)
        raise AssertionError

    fetcher = Fetcher(ImageUrls(hosts=(HOST,), timeout_s=0.1), MAX_BYTES, resolve)
    error = asyncio.run(refused(fetcher))
    assert error.code == "image_url_failed" and "within 0.1 s" in error.message


@pytest.mark.parametrize("status", [204, 206, 401, 404, 500])
def test_other_statuses_fail(certificate, status: int) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(f"{status} Whatever", Content_Length=0))

    async def main() -> None:
        async with site(certificate, answer) as there:
            error = await refused(there.fetcher())
            assert (error.status, error.code) == (422, "image_url_failed")
            assert f"status {status}" in error.message

    run(main())


async def truncated(writer: asyncio.StreamWriter) -> None:
    writer.write(head(Content_Length=100) + b"x")
    await writer.drain()
    writer.close()


async def no_http(writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello\r\n\r\n")


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()


@pytest.mark.parametrize("answer", [truncated, no_http, closed])
def test_broken_answers_fail(certificate, answer) -> None:
    async def main() -> None:
        async with site(certificate, answer) as there:
            error = await refused(there.fetcher())
            assert (error.status, error.code) == (422, "image_url_failed")

    run(main())


def test_the_certificate_must_be_the_hosts_and_trusted(certificate) -> None:
    async def main() -> None:
        async with site(certificate) as there:
            for hosts, tls in [
                (["other.example.com"], None),
                ([HOST], ssl.create_default_context()),
            ]:
                error = await refused(there.fetcher(hosts=hosts, tls=tls), f"https://{hosts[0]}/")
                assert (error.status, error.code) == (422, "image_url_failed")
                assert "Certificate" in error.message
            assert there.heads == []

    run(main())


def test_the_environments_proxies_are_ignored(certificate, monkeypatch, tmp_path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {HOST} login me password secret\n")
    netrc.chmod(0o600)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(netrc))

    async def main() -> None:
        async with site(certificate) as there:
            fetcher = there.fetcher()
            assert await fetcher.get(f"https://{HOST}/") == BODY
            await fetcher.close()
            assert "Authorization" not in there.heads[0]

    run(main())


def test_a_name_without_addresses_fails(certificate) -> None:
    async def main() -> None:
        async with site(certificate) as there:
            assert (await refused(there.fetcher([[]]))).code == "image_url_failed"

    run(main())


def test_a_cancelled_fetch_ends(certificate) -> None:
    async def main() -> None:
        async with site(certificate, slow_body) as there:
            fetcher = there.fetcher()
            task = asyncio.create_task(fetcher.get(f"https://{HOST}/"))
            while not there.heads:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await fetcher.close()

    run(main())


def test_many_at_once(certificate) -> None:
    async def main() -> None:
        async with site(certificate) as there:
            fetcher = there.fetcher([[PUBLIC, OTHER]])
            got = await asyncio.gather(*(fetcher.get(f"https://{HOST}/{i}") for i in range(100)))
            await fetcher.close()
            assert got == [BODY] * 100 and there.connections <= 32
            assert set(there.connected_to) == {PUBLIC, OTHER}
            assert all(ipaddress.ip_address(address).is_global for address in there.connected_to)

    run(main())
