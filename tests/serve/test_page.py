"""The pages: what a browser shows of them, held against what the API says.

The app is the real one, with a tiny random model, under uvicorn and without Ray. What it does not
do on demand (a proxy's refusal, a model that changes between two requests) is arranged by holding
the browser's requests.
"""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from clip_ray import keys
from clip_ray.registry import ServedModel, Target
from serve import pages
from tests.browser import Browser, Page
from tests.serve.models import export
from tests.serve.support import Site, data_uri, running

STATIC = Path(pages.__file__).parent / "static"
FIRST = list(pages.GALLERY[:12])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    """Return clip/7 and clip/8."""
    folder = tmp_path_factory.mktemp("models")
    return [export(folder / str(seed), seed, str(seed)) for seed in (7, 8)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, models: list[ServedModel]) -> Iterator[Site]:
    """A replica of clip/7 on a socket, auth off."""
    with running(Site(tmp_path_factory.mktemp("site"), models[0])) as site:
        site.listen()
        yield site


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return a file of keys and the one key in it."""
    file = str(tmp_path_factory.mktemp("keys") / "keys.json")
    return file, keys.create(file, "reader")[0]


@pytest.fixture(scope="module")
def keyed_site(
    tmp_path_factory: pytest.TempPathFactory,
    models: list[ServedModel],
    key_file: tuple[str, str],
) -> Iterator[Site]:
    """A replica of clip/7 on a socket that wants a key."""
    file = key_file[0]
    settings = {"auth": "keys", "keys_file": file}
    folder = tmp_path_factory.mktemp("keyed")
    with running(Site(folder, models[0], settings, keys=keys.KeyRing(file))) as site:
        site.listen()
        yield site


def ask(site: Site, path: str, body: dict[str, Any] | None = None) -> Any:
    """Return the answer of the API; without a body to a GET."""
    answer = site.call("GET" if body is None else "POST", path, body)
    assert answer.status == 200, answer.body
    return answer.json()


def swap(site: Site, model: ServedModel) -> None:
    """Have a replica serve another model, and wait until it does."""
    target = Target(**model.model_dump()).model_dump()
    site.loop.call_soon_threadsafe(site.engine.retarget, target)
    deadline = time.monotonic() + 10
    while ask(site, "/v1/models")["model"] != model.id:
        assert time.monotonic() < deadline, site.engine.status()
        time.sleep(0.02)


def image_bytes(data_uri: str) -> bytes:
    head, _, data = data_uri.partition(",")
    assert re.fullmatch(r"data:image/jpeg;base64", head), head
    return base64.b64decode(data)


class Visit:
    """Opens pages of the site; afterwards all of them must have been clean."""

    def __init__(self, browser: Browser, origin: str) -> None:
        self.browser = browser
        self.origin = origin
        self.pages: list[Page] = []
        self.expected: list[str] = []  # parts of messages that the browser itself logs

    def __call__(self, path: str = "/", **viewport: Any) -> Page:
        page = self.browser.page(**viewport)
        self.pages.append(page)
        page.go(self.origin + path)
        return page

    def check(self) -> None:
        for page in self.pages:
            found = page.problems()
            assert [p for p in found if not any(e in p for e in self.expected)] == []
            assert [r for r in page.requests if not r.startswith(self.origin + "/")] == []
            page.close()


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Visit]:
    opened = Visit(browser, site.url)
    yield opened
    opened.check()


def shown_bars(page: Page) -> tuple[list[str], list[float]]:
    """Return the labels and their percentages, from top to bottom."""
    values = page.texts("#bars .value")
    assert all(re.fullmatch(r"\d+\.\d %", value) for value in values)
    return page.texts("#bars .name"), [float(value.removesuffix(" %")) for value in values]


def expected_bars(site: Site, image: bytes, labels: list[str], **more: Any) -> Any:
    body = {
        "input": {"image": data_uri(image, "jpeg")},
        "labels": labels,
        "top_k": len(labels),
        **more,
    }
    found = ask(site, "/v1/classify", body)["data"][0]["predictions"]
    # Half a unit of what is shown, and what float32 in another batch may move.
    percent = pytest.approx([100 * p["score"] for p in found], abs=0.051)
    return [p["label"] for p in found], percent


def wait_for_bars(page: Page, nth: int = 1) -> None:
    """Wait until the answer to the n-th classification is shown."""
    deadline = time.monotonic() + 10
    while len(sent(page, "/v1/classify")) < nth:
        assert time.monotonic() < deadline, page.problems()
        time.sleep(0.01)
    page.wait("document.getElementById('classify-status').textContent")


def sent(page: Page, path: str) -> list[Any]:
    """Return the bodies of the requests to a route."""
    return [body for url, _, body in page.sent if url.endswith(path)]


def test_bars_show_what_the_api_says(visit: Visit, site: Site) -> None:
    page = visit()
    wait_for_bars(page)
    assert page.evaluate("document.getElementById('labels').value") == ", ".join(FIRST)
    labels, values = shown_bars(page)
    assert (labels, values) == expected_bars(site, pages.gallery()[0].image, FIRST)
    assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(100, abs=0.7)
    widths = page.evaluate(
        "[...document.querySelectorAll('.fill')].map((fill) => parseFloat(fill.style.width))"
    )
    assert widths == pytest.approx(values, abs=0.051)
    assert page.text("#classify-status") == f"{labels[0]} fits best, {values[0]:.1f} %"
    assert page.text("#model") == "clip/7"
    digest = site.model.digest
    assert page.text("#digest") == digest[:12]
    assert page.evaluate("document.getElementById('digest').title") == digest


def test_latency_and_cache_hits_are_shown(visit: Visit, site: Site) -> None:
    page = visit()
    wait_for_bars(page)
    page.fill("#labels", "never, asked, before")
    page.click("#classify-form .primary")
    wait_for_bars(page, 2)
    assert re.fullmatch(r"\d+ ms · label cache miss", page.text("#classify-meta"))
    page.click("#strip button:nth-child(3)")
    wait_for_bars(page, 3)
    assert re.fullmatch(r"\d+ ms · label cache hit", page.text("#classify-meta"))
    labels = ["never", "asked", "before"]
    assert shown_bars(page) == expected_bars(site, pages.gallery()[2].image, labels)
    pressed = "document.querySelector('#strip [aria-pressed=true] img').alt"
    assert page.evaluate(pressed) == "rocket"
    images = [image_bytes(body["input"]["image"]) for body in sent(page, "/v1/classify")]
    assert images == [pages.gallery()[n].image for n in (0, 0, 2)]  # byte for byte


def test_a_file_is_made_small_and_put_on_white(visit: Visit, site: Site, tmp_path: Path) -> None:
    pixels = np.zeros((900, 1600, 4), np.uint8)
    pixels[:, 800:] = (200, 30, 30, 255)  # the left half is transparent
    Image.fromarray(pixels).save(tmp_path / "big.png")
    page = visit()
    wait_for_bars(page)
    page.fill("#labels", " cat, dog\n\nred car ,dog,, <img src=x onerror=alert(1)>")
    page.fill("#template", "a photo of a {c}.")
    page.upload("#file", tmp_path / "big.png")
    wait_for_bars(page, 2)
    body = sent(page, "/v1/classify")[-1]
    labels = ["cat", "dog", "red car", "<img src=x onerror=alert(1)>"]
    assert (body["labels"], body["templates"]) == (labels, ["a photo of a {c}."])
    image = image_bytes(body["input"]["image"])
    decoded = Image.open(io.BytesIO(image))
    assert (decoded.format, decoded.size) == ("JPEG", (512, 288))
    assert np.asarray(decoded)[100, 50].min() > 250
    assert np.abs(np.asarray(decoded)[100, 400].astype(int) - (200, 30, 30)).max() < 8
    assert shown_bars(page) == expected_bars(site, image, labels, templates=body["templates"])
    assert page.evaluate("document.getElementById('preview').alt") == "big.png"
    assert page.evaluate("document.querySelector('#strip [aria-pressed=true]')") is None


def test_of_many_labels_the_best_are_shown(visit: Visit, site: Site) -> None:
    page = visit()
    wait_for_bars(page)
    labels = [f"thing {n}" for n in range(60)]
    page.fill("#labels", "\n".join(labels))
    page.click("#classify-form .primary")
    wait_for_bars(page, 2)
    best, percent = expected_bars(site, pages.gallery()[0].image, labels)
    shown, values = shown_bars(page)
    assert shown == best[:20] and len(values) == 20
    assert page.text("#classify-meta").endswith(" · best 20 of 60")


GIVE_FILE = """(async () => {
  const transfer = new DataTransfer();
  transfer.items.add(new File(["x"], "note.txt", {type: "text/plain"}));
  if (WIDTH) {
    const canvas = Object.assign(document.createElement("canvas"), {width: WIDTH, height: 20});
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    transfer.items.add(new File([blob], "shot.png", {type: "image/png"}));
  }
  document.dispatchEvent(new EVENT);
})()"""


def give_file(page: Page, event: str, width: int) -> None:
    """Drop or paste a text file and, if it has a width, a picture."""
    field = "clipboardData" if event == "paste" else "dataTransfer"
    kind = "ClipboardEvent" if event == "paste" else "DragEvent"
    made = f"{kind}('{event}', {{{field}: transfer, bubbles: true, cancelable: true}})"
    page.evaluate(GIVE_FILE.replace("EVENT", made).replace("WIDTH", str(width)))


def test_a_picture_may_be_dropped_or_pasted(visit: Visit) -> None:
    page = visit()
    wait_for_bars(page)
    for nth, event, width in ((2, "drop", 40), (3, "paste", 60)):
        give_file(page, event, width)
        wait_for_bars(page, nth)
        image = image_bytes(sent(page, "/v1/classify")[-1]["input"]["image"])
        assert Image.open(io.BytesIO(image)).size == (width, 20)  # nothing is made larger


def test_what_is_no_picture_is_refused(visit: Visit, tmp_path: Path) -> None:
    page = visit()
    wait_for_bars(page)
    give_file(page, "drop", 0)
    assert "no picture" in page.text("#classify-problem")
    (tmp_path / "broken.jpg").write_bytes(b"no jpeg")
    page.upload("#file", tmp_path / "broken.jpg")
    page.wait("document.getElementById('classify-problem').innerText.includes('broken.jpg')")
    assert len(sent(page, "/v1/classify")) == 1


def shown_ranking(page: Page) -> tuple[list[str], list[float]]:
    """Return names and scores of the gallery, in its order."""
    names = page.evaluate("[...document.querySelectorAll('#gallery img')].map((i) => i.alt)")
    return names, [float(value) for value in page.texts("#gallery .value")]


def expected_ranking(site: Site, query: str) -> Any:
    documents = [{"image": data_uri(picture.image, "jpeg")} for picture in pages.gallery()]
    body = {"queries": [{"text": query}], "documents": documents}
    (found,) = ask(site, "/v1/rank", body)["results"]
    scores = pytest.approx([result["relevance_score"] for result in found], abs=0.00051)
    return [pages.GALLERY[result["index"]] for result in found], scores


def rank(page: Page, sentence: str) -> None:
    page.fill("#sentence", sentence)
    page.press("Enter", 13, "\r")
    wait_for_ranking(page, sentence)


def wait_for_ranking(page: Page, sentence: str) -> None:
    shown = "document.getElementById('rank-status').textContent"
    page.wait(f"{shown}.startsWith({json.dumps(f'For {sentence}:')})")


def embedded(page: Page) -> list[int]:
    """Return the number of items of each request for embeddings."""
    return [len(body["input"]) for body in sent(page, "/v1/embeddings")]


def test_pictures_line_up_as_the_api_ranks_them(visit: Visit, site: Site) -> None:
    page = visit()
    wait_for_bars(page)
    before = page.evaluate("[...document.querySelectorAll('#gallery img')].map((i) => i.alt)")
    assert before == list(pages.GALLERY)
    rank(page, "something sweet")
    assert shown_ranking(page) == expected_ranking(site, "something sweet")
    assert embedded(page) == [1, len(pages.GALLERY)]
    page.click("#chips button:nth-child(2)")
    wait_for_ranking(page, "an animal")
    assert shown_ranking(page) == expected_ranking(site, "an animal")
    assert shown_ranking(page)[0] != expected_ranking(site, "something sweet")[0]
    assert embedded(page) == [1, len(pages.GALLERY), 1]  # the gallery once
    assert re.fullmatch(r"\d+ ms · pictures encoded before", page.text("#rank-meta"))


def test_another_model_means_another_gallery(
    visit: Visit, site: Site, models: list[ServedModel]
) -> None:
    """Features of two models are never compared, not even when it changes in between."""
    page = visit()
    wait_for_bars(page)
    rank(page, "one")
    before, after = models
    try:
        swap(site, after)
        rank(page, "two")
        assert shown_ranking(page) == expected_ranking(site, "two")
        assert (page.text("#model"), page.text("#digest")) == ("clip/8", after.digest[:12])
        assert embedded(page) == [1, len(pages.GALLERY)] * 2
        swap(site, before)
        page.hold("*/v1/embeddings")
        page.fill("#sentence", "three")
        page.press("Enter", 13, "\r")
        page.let_go()  # the sentence, answered by 7
        page.wait("document.getElementById('rank-meta').innerText.includes('once')")
        swap(site, after)
        page.hold("")  # the gallery
        visit.expected = ["status of 409"]  # 7 is gone: the page starts again, with 8
        wait_for_ranking(page, "three")
        assert shown_ranking(page) == expected_ranking(site, "three")
        assert page.text("#model") == "clip/8"
    finally:
        swap(site, before)


def test_a_key_is_asked_for_and_kept_in_the_tab(
    visit: Visit, keyed_site: Site, key_file: tuple[str, str]
) -> None:
    key = key_file[1]
    visit.origin = keyed_site.url
    visit.expected = ["status of 401"]
    page = visit()
    page.wait("document.getElementById('key-dialog').open")
    assert not page.visible("#key-problem")
    page.fill("#key", "cr-wrong")
    page.press("Enter", 13, "\r")
    page.wait("document.getElementById('key-problem').innerText.includes('unknown, revoked')")
    assert re.search(r"HTTP 401, request [0-9a-f]{32}", page.text("#key-problem"))
    page.fill("#key", f" {key} ")
    page.click("#key-form .primary")
    wait_for_bars(page)
    assert page.sent[-1][1]["authorization"] == f"Bearer {key}"
    assert page.evaluate("Object.values(sessionStorage)") == [key]
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    assert page.evaluate("document.getElementById('key').value") == ""
    rank(page, "with a key")
    page.go(visit.origin + "/")  # the same tab
    wait_for_bars(page, 2)
    assert not page.evaluate("document.getElementById('key-dialog').open")


def test_without_a_key_the_page_says_so(
    visit: Visit, keyed_site: Site, key_file: tuple[str, str]
) -> None:
    visit.origin = keyed_site.url
    visit.expected = ["status of 401"]
    page = visit()
    page.wait("document.getElementById('key-dialog').open")
    page.press("Escape", 27)
    page.wait("document.getElementById('classify-problem').innerText.includes('No API key')")
    assert re.search(r"HTTP 401, request [0-9a-f]{32}", page.text("#classify-problem"))
    assert page.evaluate("sessionStorage.length") == 0
    page.fill("#sentence", "again")
    page.press("Enter", 13, "\r")
    page.wait("document.getElementById('key-dialog').open")
    page.fill("#key", key_file[1])  # who has one now goes on
    page.press("Enter", 13, "\r")
    wait_for_ranking(page, "again")
    page.click("#classify-form .primary")
    wait_for_bars(page)


def test_refusals_are_readable(visit: Visit) -> None:
    visit.expected = ["status of 400", "status of 413", "status of 503", "ERR_FAILED"]
    page = visit()
    wait_for_bars(page)
    problem = "document.getElementById('classify-problem').innerText"
    page.fill("#labels", f"cat, {'x' * 2001}")
    page.click("#classify-form .primary")
    page.wait(f"{problem}.includes('HTTP 4')")
    pattern = r".*2000.* \(labels\[1\], HTTP 4\d\d, request [0-9a-f]{32}\)"
    assert re.fullmatch(pattern, page.text("#classify-problem"))
    page.fill("#labels", "a, b")
    page.hold("*/v1/classify")
    page.click("#classify-form .primary")
    page.answer(503, {"retry-after": "2", "content-type": "text/plain"}, "<b>no</b> replica")
    page.wait(f"{problem}.includes('HTTP 503')")
    assert page.texts("#bars li") == []  # nothing of before stands beside it
    assert page.text("#classify-problem") == (
        "The server refused the request. Try again in 2 s. (HTTP 503)"
    )
    page.hold("")
    page.fill("#template", "no place")
    page.press("Enter", 13, "\r")
    page.wait(f"{problem}.includes('needs {{c}}')")
    page.fill("#template", "")
    page.fill("#labels", " , ")
    page.click("#classify-form .primary")
    page.wait(f"{problem}.includes('at least one label')")
    page.fill("#labels", "a, b")
    page.press("Enter", 13, "\r")  # a new line
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", modifiers=2)
    page.wait("document.querySelectorAll('#bars li').length === 2")
    assert not page.visible("#classify-problem")


def test_a_newer_request_overtakes(visit: Visit) -> None:
    page = visit()
    wait_for_bars(page)
    page.hold("*/v1/classify")
    page.fill("#labels", "old")
    page.click("#classify-form .primary")
    page.fill("#labels", "new")
    page.click("#classify-form .primary")
    page.hold("")  # both go on; the first was given up
    page.wait("document.querySelector('#bars .name').innerText === 'new'")
    assert not page.evaluate("document.getElementById('bars').getAttribute('aria-busy')")
    assert not page.visible("#classify-problem")


TOO_SMALL = """[...document.querySelectorAll("button, a, input, textarea, .drop")]
  .filter((e) => e.offsetParent && !e.classList.contains("unseen"))
  .map((e) => [e.outerHTML.slice(0, 80), e.getBoundingClientRect()])
  .filter(([, box]) => box.width < 44 || box.height < 44)"""
# WCAG 2.2, 1.4.3: relative luminance and contrast of every element that holds text of its own.
TOO_FAINT = """(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = parse(color).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    while (e && (parse(getComputedStyle(e).backgroundColor)[3] ?? 1) === 0) e = e.parentElement;
    return getComputedStyle(e ?? document.documentElement).backgroundColor;
  };
  const ratio = (e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const speaks = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  return [...document.body.querySelectorAll("*")]
    .filter((e) => e.offsetParent && speaks(e))
    .map((e) => [ratio(e), e.textContent.trim().slice(0, 40)])
    .filter(([ratio]) => !(ratio >= 4.5));
})()"""


def test_a_phone_shows_all_of_it(visit: Visit, tmp_path: Path) -> None:
    page = visit(width=390, height=844)
    wait_for_bars(page)
    rank(page, "something sweet")
    shot = Image.open(page.screenshot(tmp_path / "phone.png"))
    assert shot.width == 2 * 390 and shot.height > 2 * 844
    for width in (390, 320):
        page.view(width, 844)
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1] == width
        assert page.evaluate(TOO_SMALL) == []


def test_light_and_dark(visit: Visit, tmp_path: Path) -> None:
    page = visit()
    wait_for_bars(page)
    rank(page, "something sweet")
    lightness = []
    for dark in (False, True):
        page.view(1200, 900, dark)
        assert page.evaluate(TOO_FAINT) == []
        shot = Image.open(page.screenshot(tmp_path / f"{dark}.png")).convert("L")
        lightness.append(np.median(np.asarray(shot)))
    assert lightness[0] > 220 and lightness[1] < 50


def test_every_control_has_a_name_and_the_keyboard_reaches_it(visit: Visit) -> None:
    page = visit()
    wait_for_bars(page)
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "searchbox", "link", "image", "list", "region", "search"}
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert len([name for role, name in named if role == "button"]) >= 12 + 2 + 4
    assert [pair for pair in named if not pair[1] and pair[0] != "search"] == []
    reached = []
    page.evaluate("document.activeElement.blur()")
    for _ in range(28):
        page.press("Tab", 9)
        active = "document.activeElement"
        reached.append(page.evaluate(f"{active}.id || {active}.innerText || {active}.title"))
    wanted = ["file", "pizza", "labels", "template", "Classify", "sentence", "Rank"]
    assert [r for r in dict.fromkeys(reached) if r in wanted] == wanted


def test_docs_show_the_operations(visit: Visit, site: Site) -> None:
    paths = ask(site, "/openapi.json")["paths"]
    operations = {
        (method.upper(), path, operation["summary"])
        for path, methods in paths.items()
        for method, operation in methods.items()
    }
    page = visit("/docs")
    page.wait(f"document.querySelectorAll('.opblock').length === {len(operations)}")
    shown = {
        tuple(block.replace("\u200b", "").split("\n"))
        for block in page.texts(".opblock-summary-control")
    }
    assert shown == operations
    assert ("POST", "/v1/embeddings") in {operation[:2] for operation in operations}
    page.click(".opblock-post .opblock-summary-control")
    page.wait("document.querySelector('.opblock-body .try-out__btn')")


def test_the_checks_see_violations(browser: Browser, site: Site) -> None:
    """The negative control: what the other tests count as zero is counted here."""
    page = browser.page()
    page.go(site.url + "/")
    page.evaluate(
        """(() => {
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          document.body.append(script);
          document.body.append(Object.assign(new Image(), {src: "https://example.com/x.png"}));
          document.body.setAttribute("style", "color: red");
          console.error("said");
          setTimeout(() => { throw new Error("thrown"); });
        })()"""
    )
    page.wait("window.__violations.length === 3")
    assert page.evaluate("window.ran") is None
    problems = "\n".join(page.problems())
    for part in ("script-src", "img-src", "style-src", "said", "thrown"):
        assert part in problems
    page.close()


# Without a browser.


@pytest.fixture
def client(keyed_site: Site) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=keyed_site.url) as keyless:  # pages need no key
        yield keyless


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_are_strict(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    rules = answer.headers["content-security-policy"].split("; ")
    assert "default-src 'self'" in rules and "frame-ancestors 'none'" in rules
    assert {"base-uri 'none'", "form-action 'self'", "style-src 'self'"} <= set(rules)
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    # Nothing inline, nothing from elsewhere, and all that is named exists.
    assert not re.search(r"<script(?![^>]*\bsrc=)|\sstyle=|\son\w+=|<style", answer.text)
    named = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert not [name for name in named if "//" in name]
    for name in named:
        assert client.get(f"/{name}").status_code == 200, name


def test_static_files_are_an_allow_list(client: httpx.Client) -> None:
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    own = [file.name for file in STATIC.iterdir() if file.suffix != ".html"]
    for name in [*own, "swagger-ui-bundle.js", "swagger-ui.css"]:
        answer = client.get(f"/static/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["content-type"].split(";")[0] == kinds[Path(name).suffix]
        assert answer.headers["x-content-type-options"] == "nosniff"
        known = {"if-none-match": f'"other", W/{answer.headers["etag"]}'}
        again = client.get(f"/static/{name}", headers=known)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == answer.headers["etag"]
    for name in ("index.html", "%2e%2e/pages.py", "..%2fpages.py", "nothing", ""):
        assert client.get(f"/static/{name}").status_code == 404, name


def test_the_gallery(client: httpx.Client) -> None:
    listing = client.get("/gallery.json").json()
    assert listing["count"] == len(listing["items"]) == len(set(pages.GALLERY)) == 40
    assert [item["name"] for item in listing["items"]] == list(pages.GALLERY)
    for item, picture in zip(listing["items"], pages.gallery(), strict=True):
        answer = client.get(f"/{item['url']}")
        assert answer.content == picture.image
        assert answer.headers["content-type"] == "image/jpeg"
        assert "max-age" in answer.headers["cache-control"]
        assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
    for n in ("40", "-1", "x", "1.0", "0x1", "٣", "99999999999"):
        answer = client.get(f"/gallery/{n}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_a_gallery_out_of_date_is_named() -> None:
    with pytest.raises(ValueError, match="no pictures named .'unicorn'.; the gallery"):
        pages.gallery(names=["pizza", "unicorn"])
