"""The routes on a real replica: its numbers, shapes, headers, log lines, and who may call."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

from clip_ray.config.serving import AppSettings
from clip_ray.eval.prompts import DEFAULT_TEMPLATES
from clip_ray.inference import Encoder
from clip_ray.registry import ServedModel, Target
from serve import answers, middleware, schemas
from serve.engine import Engine
from serve.errors import ApiError
from serve.metrics import Metrics
from serve.routes import create_app
from tests.serve.models import export, picture
from tests.serve.support import Answer, Site, call, data_uri, form, running

PICTURES = [picture(seed) for seed in range(4)]
URIS = [data_uri(image) for image in PICTURES]
EMBED = "/v1/embeddings"


def vectors(answer: Answer) -> np.ndarray:
    """Return the embeddings of a JSON answer, (N, E), after holding it against its schema."""
    assert answer.status == 200, answer.body
    document = answer.json()
    jsonschema.validate(document, schemas.EMBEDDINGS_ANSWER)
    assert [row["index"] for row in document["data"]] == list(range(len(document["data"])))
    rows = [row["embedding"] for row in document["data"]]
    if isinstance(rows[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in rows])
    return np.array(rows, np.float32)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    assert a.shape == b.shape
    return (a * b).sum(axis=1)


# Embeddings


def test_embeddings_are_the_encoders_own(site: Site, encoder: Encoder) -> None:
    texts = ["a cat", "zwei Hunde", "a very long text " * 50]
    answer = site.post(EMBED, {"input": texts})
    assert (cosines(vectors(answer), encoder.encode_texts(texts)) > 0.99999).all()
    tokens = int((encoder.tokenizer(texts)[0] != 0).sum())
    assert answer.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "images": 0}
    answer = site.post(EMBED, {"input": URIS, "modality": "image"})
    assert (cosines(vectors(answer), encoder.encode_images(PICTURES)) > 0.99999).all()
    assert answer.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0, "images": 4}


def test_mixed_lists_keep_their_order(site: Site, encoder: Encoder) -> None:
    items = [{"image": URIS[0]}, "a cat", {"text": "b"}, {"image": URIS[1]}]
    answer = site.post(EMBED, {"input": items})
    image, text = encoder.encode_images(PICTURES[:2]), encoder.encode_texts(["a cat", "b"])
    expected = np.stack([image[0], text[0], text[1], image[1]])
    assert (cosines(vectors(answer), expected) > 0.99999).all()
    modalities = [row["modality"] for row in answer.json()["data"]]
    assert modalities == ["image", "text", "text", "image"]
    assert answer.json()["usage"]["images"] == 2


def test_every_form_of_request_and_answer_has_the_same_bits(site: Site) -> None:
    image = PICTURES[0]
    data, headers = form(("image", image, "a.png"))
    raw = {"content-type": "image/png"}
    binary = {"accept": "application/octet-stream"}
    as_json = {"input": {"image": URIS[0]}}
    expected = vectors(site.post(EMBED, as_json))
    for answer in (
        site.post(EMBED, {**as_json, "encoding_format": "base64"}),
        site.post(EMBED, {"input": URIS[0], "modality": "image", "encoding_format": "float"}),
        site.post(EMBED, data, headers=headers),
        site.post(EMBED, image, headers=raw),
        site.post(f"{EMBED}?encoding_format=base64&model=clip", image, headers=raw),
    ):
        assert np.array_equal(vectors(answer), expected)
    for answer in (
        site.post(EMBED, as_json, headers=binary),
        site.post(EMBED, data, headers={**headers, **binary}),
        site.post(EMBED, image, headers={**raw, **binary}),
    ):
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/octet-stream"
        assert (answer.headers["x-clip-dim"], answer.headers["x-clip-count"]) == ("16", "1")
        assert np.array_equal(np.frombuffer(answer.body, "<f4")[None], expected)


def test_many_embeddings_as_bytes(site: Site) -> None:
    answer = site.post(
        EMBED, {"input": ["a", "b", "c"]}, headers={"accept": "application/octet-stream"}
    )
    assert answer.headers["x-clip-count"] == "3" and len(answer.body) == 3 * 16 * 4


def test_a_form_mixes_texts_and_images(site: Site, encoder: Encoder) -> None:
    data, headers = form(("text", "a cat"), ("files", PICTURES[1], "b.png"), ("model", "clip"))
    expected = np.concatenate(
        [encoder.encode_texts(["a cat"]), encoder.encode_images(PICTURES[1:2])]
    )
    found = vectors(site.post(EMBED, data, headers=headers))
    assert (cosines(found, expected) > 0.99999).all()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "PNG"])
def test_all_formats(site: Site, encoder: Encoder, kind: str) -> None:
    image = picture(5, kind)
    found = vectors(site.post(EMBED, {"input": {"image": data_uri(image)}}))
    assert (cosines(found, encoder.encode_images([image])) > 0.99999).all()


def test_a_moving_gif_is_its_first_frame(site: Site, encoder: Encoder) -> None:
    frames = [Image.open(io.BytesIO(picture(seed))).convert("P") for seed in (5, 6)]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=100)
    still = io.BytesIO()
    frames[0].save(still, "GIF")
    found = vectors(site.post(EMBED, {"input": {"image": data_uri(data.getvalue())}}))
    expected, other = encoder.encode_images([still.getvalue(), picture(6)])
    assert cosines(found, expected[None])[0] > 0.99999 > cosines(found, other[None])[0]


@pytest.mark.parametrize(
    ("size", "told"),
    [((3, 40), "side allowed 4"), ((40, 3), "side allowed 4"), ((101, 5), "20-fold")],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_without_a_picture(site: Site, kind: str, size: Any, told: str) -> None:
    image = {"image": data_uri(picture(0, kind, size))}
    answer = site.post(EMBED, {"input": ["a", image]})
    assert (answer.status, answer.error["code"]) == (422, "undecodable_image")
    assert answer.error["param"] == "input[1]"
    assert f"{size[0]}x{size[1]}" in answer.error["message"] and told in answer.error["message"]


def test_a_body_that_is_read_in_a_thread(site: Site, encoder: Encoder) -> None:
    image = picture(6, "PNG", (1200, 900))
    assert len(image) > 300_000
    found = vectors(site.post(EMBED, {"input": {"image": data_uri(image)}}))
    assert (cosines(found, encoder.encode_images([image])) > 0.99999).all()
    wrong = site.post(EMBED, {"input": [{"image": data_uri(image)}, 5]})
    assert wrong.status == 400 and wrong.error["param"] == "input[1]"


def test_dimensions_are_the_models_own(site: Site) -> None:
    assert site.post(EMBED, {"input": "a", "dimensions": 16}).status == 200
    error = site.post(EMBED, {"input": "a", "dimensions": 8})
    assert error.status == 400 and error.error["param"] == "dimensions"
    assert "16" in error.error["message"]


def test_one_bad_image_is_named_and_the_others_are_not_blamed(site: Site) -> None:
    half = PICTURES[0][: len(PICTURES[0]) // 2]
    answer = site.post(
        EMBED, {"input": ["a", *({"image": data_uri(i)} for i in (PICTURES[1], half))]}
    )
    assert answer.status == 422
    assert (answer.error["code"], answer.error["param"]) == ("undecodable_image", "input[2]")
    data, headers = form(("image", PICTURES[1], "a"), ("image", half, "b"))
    answer = site.post(EMBED, data, headers=headers)
    assert (answer.status, answer.error["param"]) == (422, "input[1]")
    answer = site.post(EMBED, half, headers={"content-type": "image/png"})
    assert (answer.status, answer.error["param"]) == (422, "input")


def test_a_packed_body_is_refused(site: Site) -> None:
    for encoding, status in (("gzip", 415), ("identity", 200)):
        headers = {"content-encoding": encoding}
        assert site.post(EMBED, {"input": "a"}, headers=headers).status == status


# Which model


@pytest.mark.parametrize("name", [None, "clip", "clip@champion", "clip/7"])
def test_names_of_the_model(site: Site, name: str | None) -> None:
    answer = site.post(EMBED, {"input": "a", "model": name})
    assert answer.status == 200 and answer.json()["model"] == "clip/7"


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("clip/8", 409, "model_not_loaded"), ("text-embedding-3-small", 404, "model_not_found")],
)
def test_other_models(site: Site, name: str, status: int, code: str) -> None:
    for path, fields in (
        (EMBED, {"input": "a"}),
        ("/v1/classify", {"input": URIS[0], "labels": ["a"]}),
        ("/v1/rank", {"query": "a", "documents": ["b"]}),
    ):
        answer = site.post(path, {**fields, "model": name})
        assert (answer.status, answer.error["code"]) == (status, code)
        assert answer.error["param"] == "model" and "clip/7" in answer.error["message"]
    assert site.call("GET", f"/v1/models/{name}").status == status


def test_every_answer_of_a_model_says_which_it_was(site: Site, served: ServedModel) -> None:
    site.call("PUT", "/v1/classifiers/told", {"labels": ["a", "b"]})
    expected = {
        "name": "clip",
        "version": "7",
        "run_id": "run1",
        "digest": served.digest,
        "logit_scale": site.engine.pick(None).logit_scale,
        "logit_bias": 0.0,
        "dim": 16,
    }
    calls: list[tuple[str, str, dict[str, Any] | None]] = [
        ("POST", EMBED, {"input": "a"}),
        ("POST", "/v1/classify", {"input": URIS[0], "labels": ["a"]}),
        ("POST", "/v1/classify", {"input": URIS[0], "classifier": "told"}),
        ("POST", "/v1/rank", {"query": "a", "documents": ["b"]}),
        ("PUT", "/v1/classifiers/told", {"labels": ["a"]}),
        ("GET", "/v1/classifiers/told", None),
        ("GET", "/v1/classifiers", None),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/clip/7", None),
        ("DELETE", "/v1/classifiers/told", None),
    ]
    headers = {
        "x-clip-model": "clip/7",
        "x-clip-version": "7",
        "x-clip-run-id": "run1",
        "x-clip-digest": served.digest,
    }
    for method, path, fields in calls:
        answer = site.call(method, path, fields)
        assert answer.status == 200, (path, answer.body)
        assert answer.json()["clip"] == expected, path
        assert {name: answer.headers[name] for name in headers} == headers, path
    # The binary answer has nothing but its headers.
    answer = site.post(EMBED, {"input": "a"}, headers={"accept": "application/octet-stream"})
    assert {name: answer.headers[name] for name in headers} == headers
    # So do refusals, once the model was picked.
    answer = site.post(EMBED, {"input": "a", "dimensions": 3})
    assert answer.status == 400 and answer.headers["x-clip-digest"] == served.digest


def test_a_request_picks_its_model_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.call("PUT", "/v1/classifiers/once", {"labels": ["a", "b"]})
    picks: list[str | None] = []
    pick = site.engine.pick

    def counted(model: str | None) -> Any:
        picks.append(model)
        return pick(model)

    monkeypatch.setattr(site.engine, "pick", counted)
    for path, fields in (
        (EMBED, {"input": ["a", {"image": URIS[0]}]}),
        ("/v1/classify", {"input": URIS, "classifier": "once"}),
        ("/v1/rank", {"query": "a", "documents": ["b", {"image": URIS[0]}]}),
    ):
        picks.clear()
        assert site.post(path, fields).status == 200
        assert picks == [None]


# Classify


def classify(site: Site, **fields: Any) -> dict[str, Any]:
    answer = site.post("/v1/classify", fields)
    assert answer.status == 200, answer.body
    jsonschema.validate(answer.json(), schemas.CLASSIFY_ANSWER)
    return answer.json()


def logits(site: Site, encoder: Encoder, labels: list[str], templates: list[str]) -> np.ndarray:
    """Return (images, labels), the slow way: a mean over templates, a label at a time."""
    columns = []
    for label in labels:
        rows = encoder.encode_texts(
            [t.replace("{c}", label).replace("{}", label) for t in templates]
        )
        mean = rows.astype(np.float64).mean(axis=0)
        columns.append(mean / np.linalg.norm(mean))
    images = encoder.encode_images(PICTURES).astype(np.float64)
    return site.engine.pick(None).logit_scale * images @ np.stack(columns, axis=1)


def test_classify_by_hand(site: Site, encoder: Encoder) -> None:
    labels = [f"{n}" for n in range(9)]  # short: 12 tokens are all there is
    templates = ["a {c}.", "{} b"]
    expected = logits(site, encoder, labels, templates)
    answer = classify(site, input=URIS, labels=labels, templates=templates, top_k=9)
    for row, result in zip(expected, answer["data"], strict=True):
        found = result["predictions"]
        order = np.argsort(-row)
        probabilities = np.exp(row) / np.exp(row).sum()
        assert [p["label_index"] for p in found] == order.tolist()
        assert [p["label"] for p in found] == [labels[i] for i in order]
        np.testing.assert_allclose([p["logit"] for p in found], row[order], atol=1e-4)
        np.testing.assert_allclose([p["score"] for p in found], probabilities[order], atol=1e-5)
    answer = classify(
        site, input=URIS, labels=labels, templates=templates, scoring="sigmoid", top_k=2
    )
    for row, result in zip(expected, answer["data"], strict=True):
        best = np.sort(row)[::-1][:2]
        scores = [p["score"] for p in result["predictions"]]
        np.testing.assert_allclose(scores, 1 / (1 + np.exp(-best)), atol=1e-5)
    assert answer["scoring"] == "sigmoid"


def test_a_sigmoid_has_the_models_bias(tmp_path: Path) -> None:
    """A model of the sigmoid loss; a softmax does not change by it."""
    with_bias = export(tmp_path / "model", 0, "1", bias=-2.5)
    encoder = Encoder.load(with_bias.uri, device="cpu")
    logits = encoder.model.logit_scale.exp().item() * (
        encoder.encode_images(PICTURES[:1]) @ encoder.encode_texts(["cat", "dog"]).T
    )
    expected = 1 / (1 + np.exp(2.5 - logits[0]))
    site = Site(tmp_path, with_bias)
    try:
        found, plain = (
            {
                p["label"]: p["score"]
                for p in site.post(
                    "/v1/classify",
                    {"input": URIS[:1], "labels": ["cat", "dog"], "templates": ["{}"],
                     "scoring": scoring},
                ).json()["data"][0]["predictions"]
            }
            for scoring in ("sigmoid", "softmax")
        )  # fmt: skip
        assert site.post("/v1/embeddings", {"input": "a"}).json()["clip"]["logit_bias"] == -2.5
    finally:
        site.close()
    assert [found["cat"], found["dog"]] == pytest.approx(expected.tolist(), rel=1e-4)
    assert plain["cat"] + plain["dog"] == pytest.approx(1)


def test_classify_defaults(site: Site) -> None:
    labels = ["a", "b", "c", "d", "e", "f", "g"]
    answer = classify(site, input=URIS[0], labels=labels)
    assert answer["scoring"] == "softmax" and answer["classifier"] is None
    assert [len(result["predictions"]) for result in answer["data"]] == [5]
    assert len(classify(site, input=URIS[0], labels=labels[:2])["data"][0]["predictions"]) == 2
    same = classify(site, input=URIS[0], labels=labels, templates=list(DEFAULT_TEMPLATES[:1]))
    assert same["data"] == answer["data"]


def test_the_same_labels_are_cached(site: Site) -> None:
    fields: dict[str, Any] = {"input": URIS[0], "labels": ["seen", "twice"]}
    assert [classify(site, **fields)["cached"] for _ in range(2)] == [False, True]
    assert classify(site, **{**fields, "templates": ["other {c}"]})["cached"] is False
    assert classify(site, **{**fields, "scoring": "sigmoid"})["cached"] is True


def test_a_form_to_classify(site: Site) -> None:
    data, headers = form(
        ("image", PICTURES[0], "a.png"), ("image", PICTURES[1], "b.png"), ("labels", '["a", "b"]')
    )
    answer = site.post("/v1/classify", data, headers=headers)
    assert answer.status == 200
    expected = classify(site, input=URIS[:2], labels=["a", "b"])
    assert [r["predictions"][0]["label"] for r in answer.json()["data"]] == [
        r["predictions"][0]["label"] for r in expected["data"]
    ]


def test_more_labels_asked_for_than_there_are(site: Site) -> None:
    answer = site.post("/v1/classify", {"input": URIS[0], "labels": ["a", "b"], "top_k": 3})
    assert (answer.status, answer.error["param"]) == (400, "top_k")


def test_large_answers_are_made_off_the_event_loop(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    scored = answers.classify

    def noted(*args: Any) -> Any:
        threads.append(threading.get_ident())
        return scored(*args)

    monkeypatch.setattr(answers, "classify", noted)
    loop = site.call("GET", "/health") and site.run(_thread())
    labels = [f"n{n}" for n in range(600)]
    fields: dict[str, Any] = {"input": URIS[:2], "labels": labels, "templates": ["{}"]}
    small = classify(site, **fields, top_k=500)
    large = classify(site, **fields, top_k=501)
    assert threads[0] == loop != threads[1]
    assert small["data"][0]["predictions"] == large["data"][0]["predictions"][:500]


async def _thread() -> int:
    return threading.get_ident()


def test_answers_of_long_labels_are_bounded(site: Site) -> None:
    """The labels of an answer may be many times those of its request."""
    long = [f"{n} {'x' * 1900}" for n in range(30)]
    body = {"input": URIS[:1] * 40, "labels": [*long, "a"], "templates": ["{}"], "top_k": 28}
    answer = site.post("/v1/classify", body)
    assert (answer.status, answer.error["code"]) == (413, "too_many_predictions")
    assert answer.error["param"] == "top_k" and "characters" in answer.error["message"]
    body = {**body, "labels": [long[0], *(f"n{n}" for n in range(30))]}  # one alone is fine
    assert site.post("/v1/classify", body).status == 200


def test_many_labels(site: Site, encoder: Encoder) -> None:
    labels = [f"n{n}" for n in range(300)]  # several blocks of the classifier's computation
    expected = logits(site, encoder, labels, ["{}"])[0]
    answer = classify(site, input=URIS[0], labels=labels, templates=["{}"], top_k=3)
    order = np.argsort(-expected)[:3].tolist()
    assert [p["label_index"] for p in answer["data"][0]["predictions"]] == order


# Rank


def ranked(site: Site, **fields: Any) -> dict[str, Any]:
    answer = site.post("/v1/rank", fields)
    assert answer.status == 200, answer.body
    jsonschema.validate(answer.json(), schemas.RANK_ANSWER)
    return answer.json()


def test_rank_by_hand(site: Site, encoder: Encoder) -> None:
    documents = ["a cat", {"image": URIS[1]}, "b", {"image": URIS[2]}]
    rows = np.concatenate(
        [encoder.encode_texts(["a cat", "b"]), encoder.encode_images(PICTURES[1:3])]
    )[[0, 2, 1, 3]]
    queries = np.stack(
        [encoder.encode_texts(["some query"])[0], encoder.encode_images(PICTURES[:1])[0]]
    )
    expected = queries @ rows.T
    answer = ranked(site, queries=["some query", {"image": URIS[0]}], documents=documents)
    for row, result in zip(expected, answer["results"], strict=True):
        assert [r["index"] for r in result] == np.argsort(-row).tolist()
        np.testing.assert_allclose(
            [r["relevance_score"] for r in result], np.sort(row)[::-1], atol=1e-5
        )
    assert answer["usage"]["images"] == 3
    single = ranked(site, query="some query", documents=documents, top_n=2)
    assert [r["index"] for r in single["results"]] == [r["index"] for r in answer["results"][0][:2]]


def test_documents_are_returned_where_they_are_texts(site: Site) -> None:
    documents = ["a cat", {"image": URIS[1]}, {"text": "b"}]
    answer = ranked(site, query="a", documents=documents, return_documents=True, top_n=50)
    returned = {r["index"]: r.get("document") for r in answer["results"]}
    assert returned == {0: {"text": "a cat"}, 1: None, 2: {"text": "b"}}
    answer = ranked(site, query="a", documents=documents)
    assert all("document" not in r for r in answer["results"])


# Stored classifiers


def test_a_classifier_is_stored_shown_used_listed_and_deleted(site: Site) -> None:
    path = "/v1/classifiers/my-set.1"
    assert site.call("GET", path).status == 404
    definition = {"labels": ["x", "y", "z"], "templates": ["a {c}"], "scoring": "sigmoid"}
    stored = site.call("PUT", path, definition)
    assert stored.status == 200
    jsonschema.validate(stored.json(), schemas.CLASSIFIER_ANSWER)
    shown = site.call("GET", path).json()
    assert {name: shown[name] for name in definition} == definition and shown["id"] == "my-set.1"
    listed = site.call("GET", "/v1/classifiers").json()
    jsonschema.validate(listed, schemas.CLASSIFIERS_ANSWER)
    assert "my-set.1" in [entry["id"] for entry in listed["data"]]
    first = classify(site, input=URIS[0], classifier="my-set.1")
    assert (first["classifier"], first["scoring"], first["cached"]) == (
        "my-set.1",
        "sigmoid",
        False,
    )
    again = classify(site, input=URIS[0], classifier="my-set.1")
    assert again["cached"] is True and again["data"] == first["data"]
    inline = classify(site, input=URIS[0], **definition)
    assert inline["data"] == first["data"]
    softmax = classify(site, input=URIS[0], classifier="my-set.1", scoring="softmax")
    assert sum(p["score"] for p in softmax["data"][0]["predictions"]) == pytest.approx(1)
    deleted = site.call("DELETE", path)
    assert deleted.status == 200 and deleted.json()["deleted"] is True
    for answer in (
        site.call("DELETE", path),
        site.call("GET", path),
        site.post("/v1/classify", {"input": URIS[0], "classifier": "my-set.1"}),
    ):
        assert (answer.status, answer.error["code"]) == (404, "classifier_not_found")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_impossible_ids(site: Site, method: str) -> None:
    answer = site.call(method, "/v1/classifiers/..", {"labels": ["a"]} if method == "PUT" else None)
    assert (answer.status, answer.error["code"]) == (400, "invalid_classifier_id")


def test_stored_classifiers_are_ready_before_another_model_serves(
    tmp_path: Path, served: ServedModel
) -> None:
    other = export(tmp_path / "other", 2, "8")
    with running(Site(tmp_path, served)) as site:
        assert site.call("PUT", "/v1/classifiers/pets", {"labels": ["a", "b"]}).status == 200
        body = json.dumps({"input": URIS[0], "classifier": "pets"}).encode()

        async def promote() -> Answer:
            site.engine.retarget(Target(**other.model_dump()).model_dump())
            async with asyncio.timeout(30):
                while site.engine.pick(None).id != "clip/8":
                    await asyncio.sleep(0)
            headers = {"content-type": "application/json"}
            return await call(site.app, "POST", "/v1/classify", [body], headers)

        answer = site.run(promote()).json()
        assert (answer["model"], answer["cached"]) == ("clip/8", True)


# Models, health


def test_models(site: Site) -> None:
    answer = site.call("GET", "/v1/models").json()
    jsonschema.validate(answer, schemas.MODELS_ANSWER)
    assert [model["id"] for model in answer["data"]] == ["clip/7"]
    for name in ("clip", "clip/7", "clip@champion"):
        one = site.call("GET", f"/v1/models/{name}").json()
        jsonschema.validate(one, schemas.MODEL_ANSWER)
        assert one == answer["data"][0]


def test_health_and_ready(site: Site) -> None:
    assert site.call("GET", "/health").json() == {"status": "ok"}
    assert site.call("GET", "/ready").json() == {"status": "ready", "model": "clip/7"}
    assert site.call("HEAD", "/ready").status == 200


def test_before_a_model_is_loaded(site: Site, tmp_path: Path) -> None:
    async def ask() -> None:
        engine = Engine(AppSettings(device="cpu"), 1, Metrics(), tmp_path)
        app = create_app(
            engine, engine.settings, site.classifiers, None, site.fetcher, engine.metrics
        )
        assert (await call(app, "GET", "/health")).status == 200
        body = json.dumps({"input": "a"}).encode()
        headers = {"content-type": "application/json"}
        for answer in (
            await call(app, "GET", "/ready"),
            await call(app, "GET", "/v1/models"),
            await call(app, "POST", EMBED, [body], headers),
        ):
            assert (answer.status, answer.error["code"]) == (503, "loading")
            assert int(answer.headers["retry-after"]) >= 1
        engine.close()

    site.run(ask())


# Images by URL


class Web:
    """Stands in for the fetcher, which has tests of its own."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes | ApiError] = {}
        self.asked: list[str] = []
        self.refused: set[str] = set()

    def check(self, url: str) -> None:
        if url in self.refused:
            raise ApiError(400, "image_url_refused", "not this one")

    async def get(self, url: str) -> bytes:
        self.asked.append(url)
        page = self.pages[url]
        if isinstance(page, ApiError):
            raise page
        return page

    async def close(self) -> None:
        pass


def test_urls_are_off_by_default(site: Site) -> None:
    answer = site.post(EMBED, {"input": ["a", {"image": "https://example.com/a.png"}]})
    assert (answer.status, answer.error["code"]) == (400, "image_url_off")
    assert answer.error["param"] == "input[1]"


@pytest.fixture(scope="module")
def web(
    tmp_path_factory: pytest.TempPathFactory, served: ServedModel
) -> Iterator[tuple[Site, Web]]:
    web = Web()
    limits = {"body_mb": 0.05, "image_mb": 0.02}
    with running(Site(tmp_path_factory.mktemp("web"), served, {"limits": limits}, web)) as site:
        yield site, web


def test_images_by_url(web: tuple[Site, Web], encoder: Encoder) -> None:
    site, pages = web
    urls = [f"https://x.org/{n}.png" for n in range(4)]
    pages.pages = dict(zip(urls, PICTURES, strict=True))
    answer = site.post(EMBED, {"input": ["a", *({"image": url} for url in urls)]})
    expected = encoder.encode_images(PICTURES)
    assert (cosines(vectors(answer)[1:], expected) > 0.99999).all()
    answer = site.post(EMBED, {"input": {"type": "image_url", "image_url": {"url": urls[2]}}})
    assert (cosines(vectors(answer), expected[2:3]) > 0.99999).all()
    assert site.post("/v1/classify", {"input": urls[0], "labels": ["a"]}).status == 200
    assert site.engine.budget.in_use == 0


def test_urls_that_are_refused_take_no_memory(web: tuple[Site, Web]) -> None:
    site, pages = web
    budget = site.engine.budget
    pages.asked.clear()
    pages.refused = {"https://x.org/b"}
    items = [{"image": f"https://x.org/{name}"} for name in "ab"]
    body = json.dumps({"input": items}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    budget.peak = 0
    answer = site.post(EMBED, body, headers=headers)
    pages.refused = set()
    assert (answer.status, answer.error["code"]) == (400, "image_url_refused")
    assert answer.error["param"] == "input[1]"
    assert pages.asked == [] and budget.peak == len(body)


def test_urls_never_wait_for_memory_that_only_they_can_free(web: tuple[Site, Web]) -> None:
    """When all who hold memory need more, one is told at once and the others go on."""
    site, pages = web
    pages.pages = {"https://x.org/a": PICTURES[0]}
    body = json.dumps({"input": {"image": "https://x.org/a"}}).encode().ljust(20_000)
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    budget = site.engine.budget

    async def run() -> list[int]:
        before, budget.total = budget.total, 50_000  # two bodies; an image is up to 20,000
        try:
            async with asyncio.timeout(2):  # nobody waits for queue_s, which is 5
                go = asyncio.Event()
                chunks = [body[:10], go, body[10:]]
                asked = [
                    asyncio.create_task(call(site.app, "POST", EMBED, chunks, headers))
                    for _ in range(2)
                ]
                while budget.in_use < 2 * len(body):
                    await asyncio.sleep(0.001)
                go.set()
                return sorted(one.status for one in await asyncio.gather(*asked))
        finally:
            budget.total = before

    assert site.run(run()) == [200, 429]
    assert budget.in_use == 0


@pytest.mark.parametrize(
    ("page", "status", "code"),
    [
        (ApiError(422, "image_url_failed", "m"), 422, "image_url_failed"),
        (b"<html>", 422, "unsupported_image"),
        (PICTURES[0].ljust(20_001, b"0"), 413, "image_too_large"),
        (PICTURES[0][:100], 422, "undecodable_image"),
    ],
)
def test_urls_that_give_no_image(web: Any, page: Any, status: int, code: str) -> None:
    site, pages = web
    pages.pages = {"https://x.org/a": PICTURES[0], "https://x.org/b": page}
    items = [{"image": url} for url in pages.pages]
    answer = site.post(EMBED, {"input": items})
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.error["param"] == "input[1]"
    assert site.engine.budget.in_use == 0


def test_images_by_url_are_bounded_like_a_body(web: tuple[Site, Web]) -> None:
    site, pages = web
    image = picture(0, "JPEG").ljust(19_000, b"\0")
    pages.asked.clear()
    pages.pages = {f"https://x.org/{n}": image for n in range(40)}
    answer = site.post(EMBED, {"input": [{"image": url} for url in pages.pages]})
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert len(pages.asked) < 10
    assert 0 < site.engine.budget.peak <= 50_000 + (50_000 + 4 * 20_000)  # body, fetched


# Documentation


def test_every_example_works_and_every_answer_has_its_schema(site: Site) -> None:
    document = site.call("GET", "/openapi.json").json()
    seen = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
            jsonschema.Draft202012Validator.check_schema(schema)
            content = operation.get("requestBody", {}).get("content", {})
            examples = content.get("application/json", {}).get(
                "examples", {"none": {"value": None}}
            )
            for example in examples.values():
                if example["value"] is not None:
                    jsonschema.validate(example["value"], content["application/json"]["schema"])
                target = path.replace("{id}", "clip" if "models" in path else "colours")
                answer = site.call(method.upper(), target, example["value"])
                assert answer.status == 200, (method, path, answer.body)
                jsonschema.validate(answer.json(), schema)
                seen += 1
    assert seen >= 15
    refusal = site.post(EMBED, {"input": []}).json()
    jsonschema.validate(refusal, schemas.ERROR_ANSWER)


def test_every_route_is_documented(site: Site) -> None:
    document = site.call("GET", "/openapi.json").json()
    keyed = {path for path in document["paths"] if path.startswith("/v1/")}
    known = {*middleware._KEYED, *middleware._KEYED_BELOW.values()}
    assert keyed == known  # the log's templates are the router's
    assert set(document["paths"]) - keyed == {"/health", "/ready"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"] and "HTTPValidationError" not in json.dumps(operation)
            assert ("security" in operation) == path.startswith("/v1/")
            assert ("{" in path) == bool(operation.get("parameters"))
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
