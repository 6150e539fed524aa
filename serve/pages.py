"""The pages for people: the demo at /, the API reference at /docs, and the gallery's pictures.

All of it is read once, when the router is made, and served from memory by an allow-list of names:
no path of a request ever reaches the file system. No page needs a key; the demo asks for one when
the API does. Left out: anything that answers with a model's numbers, which is `serve.routes`.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

import clip_ray
from clip_ray.data.samples import IMAGE_SUFFIXES, JSON_KEYS, Sample, Suffixes
from clip_ray.data.tar import Slab, read_tar
from serve.errors import ApiError

CSP = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; object-src 'none'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}

# The first twelve are what the demo offers to classify, and their names its labels.
GALLERY = tuple(
    "pizza,panda,rocket,sunflower,violin,castle,turtle,strawberry,ambulance,ghost,teapot,"
    "basketball,lion,giraffe,frog,octopus,parrot,crab,spouting whale,teddy bear,croissant,"
    "pineapple,cupcake,watermelon,broccoli,tractor,racing car,airplane departure,passenger ship,"
    "tulip,palm tree,four leaf clover,full moon,camera with flash,trumpet,Christmas tree,"
    "heart with arrow,hot face,thinking face,crying cat".split(",")
)
CREDIT = (
    "Pictures: Twemoji, Copyright 2020 Twitter, Inc and other contributors, CC-BY 4.0; "
    "rescaled, flattened on white"
)
_HERE = Path(__file__).parent / "static"
_SHARD = "test-0000.tar"
_OWN = {
    "app.js": "text/javascript",
    "api.js": "text/javascript",
    "pictures.js": "text/javascript",
    "docs.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
_SWAGGER = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
# Pages and scripts belong together: after an upgrade none may come from a browser's cache. The
# large rest changes with its address (pictures) or hardly ever (Swagger UI).
_REVALIDATE = "no-cache"
_KEEP = "public, max-age=86400"


@dataclass(frozen=True)
class Asset:
    """A file as it is answered: `headers` hold its ETag and for how long browsers keep it."""

    data: bytes
    media_type: str
    headers: dict[str, str]

    def answer(self, request: Request) -> Response:
        """Return the file, or 304 where the browser has this very content."""
        known = request.headers.get("if-none-match", "")
        if self.headers["etag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=self.headers)
        return Response(self.data, media_type=self.media_type, headers=self.headers)


@dataclass(frozen=True)
class Picture:
    """A picture of the gallery and the name of what it shows."""

    name: str
    image: bytes
    media_type: str


def gallery(shard: Path | None = None, names: Iterable[str] = GALLERY) -> list[Picture]:
    """Return the named pictures of the bundled test shard, in the order of the names.

    Raises:
        ValueError: the shard has no sample with one of the captions.
    """
    if shard is None:
        shard = Path(clip_ray.__file__).parent / "bundled" / "starter" / _SHARD
    data = shard.read_bytes()
    suffixes = Suffixes(IMAGE_SUFFIXES, ("txt",), JSON_KEYS)
    # One sample takes at least four blocks of 512 bytes: two headers and their payloads.
    samples = read_tar(str(shard), Slab(0, data), suffixes, 0, set(range(len(data) // 2048)))
    images = {s.caption: s.image for s in samples.values() if isinstance(s, Sample)}
    missing = [name for name in names if name not in images]
    if missing:
        raise ValueError(f"{shard}: no pictures named {missing}; the gallery is out of date")
    return [Picture(name, images[name], _media_type(images[name])) for name in names]


def router() -> APIRouter:
    """Return the routes of the pages: /, /docs, /static/{name}, /gallery.json, /gallery/{n}."""
    pictures = gallery()
    shown = [_asset(p.image, p.media_type, _KEEP) for p in pictures]
    static = _static()
    demo = _asset((_HERE / "index.html").read_bytes(), "text/html", _REVALIDATE, CSP)
    docs = _asset((_HERE / "docs.html").read_bytes(), "text/html", _REVALIDATE, CSP)
    listing = {
        "count": len(pictures),
        "credit": CREDIT,
        # The tag in the address: an upgrade may put another picture in a place.
        "items": [
            {
                "name": picture.name,
                "url": f"gallery/{n}?v={hashlib.sha256(picture.image).hexdigest()[:8]}",
            }
            for n, picture in enumerate(pictures)
        ],
    }
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def show_demo(request: Request) -> Response:
        return demo.answer(request)

    @routes.get("/docs")
    async def show_docs(request: Request) -> Response:
        return docs.answer(request)

    @routes.get("/static/{name}")
    async def show_static(request: Request, name: str) -> Response:
        if name not in static:
            raise ApiError(404, "not_found", f"no file static/{name}")
        return static[name].answer(request)

    @routes.get("/gallery.json")
    async def list_gallery() -> Response:
        return JSONResponse(listing, headers={**HEADERS, "cache-control": _REVALIDATE})

    @routes.get("/gallery/{n}")
    async def show_picture(request: Request, n: str) -> Response:
        # Not an int parameter: the answer to "gallery/x" is 404 too, not a schema error.
        if not (n.isascii() and n.isdecimal() and len(n) < 5 and int(n) < len(shown)):
            raise ApiError(404, "not_found", f"no picture {n}; there are 0 to {len(shown) - 1}")
        return shown[int(n)].answer(request)

    return routes


def _static() -> dict[str, Asset]:
    # From a package and not from a CDN: the CSP forbids those, and clusters often have no way out.
    swagger = importlib.resources.files("fastapi_offline") / "static"
    files = {n: _asset((_HERE / n).read_bytes(), kind, _REVALIDATE) for n, kind in _OWN.items()}
    for name, kind in _SWAGGER.items():
        files[name] = _asset((swagger / name).read_bytes(), kind, _KEEP)
    return files


def _asset(data: bytes, media_type: str, cache: str, csp: str = "") -> Asset:
    headers = {
        **HEADERS,
        "etag": f'"{hashlib.sha256(data).hexdigest()[:16]}"',
        "cache-control": cache,
    }
    if csp:
        headers["content-security-policy"] = csp
    return Asset(data, media_type, headers)


def _media_type(image: bytes) -> str:
    return "image/png" if image.startswith(b"\x89PNG") else "image/jpeg"
