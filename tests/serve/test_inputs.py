"""Requests from bytes: what is taken, and what is refused with which status, code and place."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from clip_ray.config.serving import Limits
from clip_ray.eval.prompts import DEFAULT_TEMPLATES
from serve import inputs
from serve.documents import MAX_COMMAS, Body
from serve.errors import ApiError
from serve.items import Item
from tests.serve.models import picture
from tests.serve.support import data_uri, form

PNG, JPEG = picture(0), picture(0, "JPEG")
BARE = base64.b64encode(PNG).decode()
URI = data_uri(PNG)
LIMITS = Limits()
SMALL = Limits(
    items=3, image_mb=0.01, text_chars=20, prompts=6, stored_prompts=8, body_mb=1, ongoing=1,
    predictions=21,
)  # fmt: skip


def body(document: Any, content_type: str = "application/json") -> Body:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Body(data, content_type)


def refusal(
    read: Callable[[Body, Limits], Any], document: Any, limits: Limits = LIMITS
) -> ApiError:
    given = document if isinstance(document, Body) else body(document)
    with pytest.raises(ApiError) as caught:
        read(given, limits)
    return caught.value


def items(document: dict[str, Any]) -> list[Item]:
    return inputs.read_embeddings(body(document), LIMITS).items


# The forms of an item


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", [Item("input", text="a cat")]),
        (
            ["a cat", "ein Kätzchen 🐱"],
            [Item("input[0]", "a cat"), Item("input[1]", "ein Kätzchen 🐱")],
        ),
        ({"text": "a cat"}, [Item("input", "a cat")]),
        ({"type": "text", "text": "a cat"}, [Item("input", "a cat")]),
        ({"image": URI}, [Item("input", image=PNG)]),
        ({"image": BARE}, [Item("input", image=PNG)]),
        (
            {"image": data_uri(JPEG, "jpeg").replace("data:image", "DATA:IMAGE")},
            [Item("input", image=JPEG)],
        ),
        ({"image": "https://x.org/a.png"}, [Item("input", url="https://x.org/a.png")]),
        ({"type": "image_url", "image_url": {"url": URI}}, [Item("input", image=PNG)]),
        (
            ["a", {"image": URI}, {"text": "b"}],
            [Item("input[0]", "a"), Item("input[1]", image=PNG), Item("input[2]", "b")],
        ),
        ("data: a text that only begins so", [Item("input", "data: a text that only begins so")]),
        ("\0 \ud83d\ude00", [Item("input", "\0 😀")]),
    ],
)
def test_items(value: Any, expected: list[Item]) -> None:
    assert items({"input": value}) == expected


def test_modality_says_what_plain_strings_are() -> None:
    assert items({"input": BARE, "modality": "image"}) == [Item("input", image=PNG)]
    assert items({"input": [URI], "modality": "image"}) == [Item("input[0]", image=PNG)]
    url = "https://x.org/a.png"
    assert items({"input": url, "modality": "image"}) == [Item("input", url=url)]
    assert items({"input": url}) == [Item("input", text=url)]
    assert items({"input": {"text": "a"}, "modality": "image"}) == [Item("input", text="a")]
    assert items({"input": "a", "modality": None}) == [Item("input", text="a")]


def test_base64_with_line_ends_is_forgiven() -> None:
    assert items({"input": {"image": base64.encodebytes(PNG).decode()}})[0].image == PNG


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats_that_are_taken(kind: str) -> None:
    image = picture(1, kind)
    assert items({"input": {"image": data_uri(image)}})[0].image == image


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "ICO"])
def test_formats_that_are_not(kind: str) -> None:
    error = refusal(inputs.read_embeddings, {"input": ["a", {"image": data_uri(picture(1, kind))}]})
    assert (error.status, error.code, error.param) == (422, "unsupported_image", "input[1]")
    assert "JPEG, PNG, WebP or GIF" in error.message


@pytest.mark.parametrize(
    ("value", "status", "code", "param"),
    [
        (URI, 400, "image_as_text", "input"),
        (["a", URI], 400, "image_as_text", "input[1]"),
        ({"text": f"  {URI}"}, 400, "image_as_text", "input"),
        ([], 400, "empty", "input"),
        ("", 400, "empty", "input"),
        (["a", ""], 400, "empty", "input[1]"),
        ([1, 2, 3], 400, "token_ids", "input[0]"),
        ([[1, 2], [3]], 400, "token_ids", "input[0]"),
        (["a", [5]], 400, "token_ids", "input[1]"),
        (list(range(1000)), 400, "token_ids", "input"),
        ([[1]] * 1000, 400, "token_ids", "input"),
        (7, 400, "token_ids", "input"),
        (7.5, 400, "invalid_type", "input"),
        (True, 400, "invalid_type", "input"),
        ([None], 400, "invalid_type", "input[0]"),
        ([[]], 400, "invalid_type", "input[0]"),
        ([["a"]], 400, "invalid_type", "input[0]"),
        ({}, 400, "invalid_item", "input"),
        ({"text": "a", "image": BARE}, 400, "invalid_item", "input"),
        ({"text": None}, 400, "invalid_type", "input.text"),
        ({"image": 5}, 400, "invalid_type", "input.image"),
        ({"imag": BARE}, 400, "unknown_field", "input.imag"),
        ({"type": "audio", "text": "a"}, 400, "invalid_value", "input.type"),
        ({"type": ["text"], "text": "a"}, 400, "invalid_value", "input.type"),
        ({"type": "text", "image": BARE}, 400, "unknown_field", "input.image"),
        ({"type": "text"}, 400, "invalid_item", "input"),
        ({"type": "image_url"}, 400, "invalid_type", "input.image_url"),
        ({"type": "image_url", "image_url": URI}, 400, "invalid_type", "input.image_url"),
        ({"type": "image_url", "image_url": {}}, 400, "invalid_type", "input.image_url.url"),
        (
            {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
            400,
            "unknown_field",
            "input.image_url.detail",
        ),
        ({"image": ""}, 422, "unsupported_image", "input"),
        ({"image": "no base64!"}, 422, "undecodable_image", "input"),
        ({"image": BARE[:-1]}, 422, "undecodable_image", "input"),
        (
            {"image": BARE.replace("+", "-").replace("/", "_") + "-"},
            422,
            "undecodable_image",
            "input",
        ),
        ({"image": "Kätzchen"}, 422, "undecodable_image", "input"),
        ({"image": "\ud800"}, 422, "undecodable_image", "input"),
        ({"image": "data:image/png," + BARE}, 400, "invalid_data_uri", "input"),
        ({"image": "data:image/png;base64"}, 400, "invalid_data_uri", "input"),
        ({"image": "data:text/plain;base64,aGk="}, 422, "unsupported_image", "input"),
        ({"image": "https://x/" + "a" * 3000}, 400, "invalid_url", "input"),
        ({"image": "https://\udc00"}, 400, "invalid_unicode", "input"),
        (["fine", "\ud800"], 400, "invalid_unicode", "input[1]"),
    ],
)
def test_items_that_are_refused(value: Any, status: int, code: str, param: str) -> None:
    error = refusal(inputs.read_embeddings, {"input": value})
    assert (error.status, error.code, error.param) == (status, code, param), error.message


def test_token_ids_name_the_option_to_change() -> None:
    error = refusal(inputs.read_embeddings, {"input": [[1, 2]]})
    assert "check_embedding_ctx_length=False" in error.message and "OpenAI client" in error.message


def test_a_data_uri_as_text_says_how() -> None:
    error = refusal(inputs.read_embeddings, {"input": URI})
    assert '{"image": "data:..."}' in error.message and "modality" in error.message


# JSON


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "line 1 column 1"),
        (b"{", "line 1 column 2"),
        (b'{"input": "a"} x', "Extra data"),
        (b'{"input": "\xff"}', "byte 11 is not UTF-8"),
        ('{"input": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"input": "a", "input": "b"}', "'input' appears twice"),
        (b'{"input": [{"text": "a", "text": "b"}]}', "'text' appears twice"),
        (b'{"input": NaN}', "NaN is no JSON number"),
        (b'{"input": -Infinity}', "-Infinity is no JSON number"),
        (b'{"input": ' + b"1" * 5000 + b"}", "too many digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"input": ' * 50_000, "nested too deeply"),
        (b'"text"', "a string; expected a JSON object"),
        (b"[]", "a list; expected a JSON object"),
        (b"null", "null; expected a JSON object"),
        (b'{"input": "a\nb"}', "control character"),
    ],
)
def test_what_is_no_json_object(data: bytes, told: str) -> None:
    error = refusal(inputs.read_embeddings, data)
    assert (error.status, error.code, error.param) == (400, "invalid_json", None)
    assert told in error.message


def test_a_byte_order_mark_is_skipped() -> None:
    read = inputs.read_embeddings(body(b'\xef\xbb\xbf{"input": "a"}'), LIMITS)
    assert read.items == [Item("input", "a")]


def test_more_values_than_memory_should_be_spent_on() -> None:
    data = b'{"input": [' + b"{}," * (MAX_COMMAS + 1) + b"{}]}"
    error = refusal(inputs.read_embeddings, data)
    assert (error.status, error.code) == (413, "too_many_values")


@pytest.mark.parametrize(
    "charset", ["", "; charset=utf-8", '; charset="UTF-8"', ";charset=us-ascii"]
)
def test_character_sets(charset: str) -> None:
    given = body({"input": "a"}, f"application/json{charset}")
    assert inputs.read_embeddings(given, LIMITS).items == [Item("input", "a")]


def test_other_character_sets_are_refused() -> None:
    given = body('{"input": "ä"}'.encode("latin-1"), "application/json; charset=latin-1")
    assert refusal(inputs.read_embeddings, given).status == 415


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/xml", "image/bmp", "image/svg+xml", "application/jsonx"]
)
@pytest.mark.parametrize(
    "read", [inputs.read_embeddings, inputs.read_classify, inputs.read_rank, inputs.read_classifier]
)
def test_other_media_types(read: Any, kind: str) -> None:
    error = refusal(read, body({"input": "a"}, kind))
    assert (error.status, error.code) == (415, "unsupported_media_type")
    assert "application/json" in error.message


def test_what_curl_sends_by_default_is_told_how() -> None:
    error = refusal(inputs.read_rank, body({}, "application/x-www-form-urlencoded"))
    assert error.status == 415 and "-H 'content-type: application/json'" in error.message


# Fields


@pytest.mark.parametrize(
    ("fields", "code", "param", "told"),
    [
        ({}, "missing_field", "input", "'input' is needed"),
        ({"input": None}, "missing_field", "input", "'input' is needed"),
        (
            {"input": "a", "encoding": "float"},
            "unknown_field",
            "encoding",
            "mean 'encoding_format'",
        ),
        ({"input": "a", "zzz": 1}, "unknown_field", "zzz", "known: input, model"),
        ({"input": "a", "\ud800": 1}, "unknown_field", "\ud800", "known"),
        ({"input": "a", "model": 5}, "invalid_type", "model", "a number; expected a string"),
        ({"input": "a", "model": "m" * 201}, "invalid_value", "model", "200"),
        ({"input": "a", "model": "\udfff"}, "invalid_unicode", "model", "surrogate"),
        ({"input": "a", "modality": "audio"}, "invalid_value", "modality", "text or image"),
        ({"input": "a", "encoding_format": "hex"}, "invalid_value", "encoding_format", "base64"),
        ({"input": "a", "encoding_format": ["float"]}, "invalid_type", "encoding_format", "a list"),
        ({"input": "a", "dimensions": 0}, "invalid_value", "dimensions", "1 or more"),
        ({"input": "a", "dimensions": 10**30}, "invalid_value", "dimensions", "1 or more"),
        ({"input": "a", "dimensions": 1e400}, "invalid_type", "dimensions", "an integer"),
        ({"input": "a", "dimensions": 16.0}, "invalid_type", "dimensions", "an integer"),
        ({"input": "a", "dimensions": "16"}, "invalid_type", "dimensions", "an integer"),
        ({"input": "a", "dimensions": True}, "invalid_type", "dimensions", "an integer"),
        ({"input": "a", "normalize": False}, "unsupported_normalize", "normalize", "unit length"),
        ({"input": "a", "normalize": "true"}, "invalid_type", "normalize", "true or false"),
        ({"input": "a", "user": {}}, "invalid_type", "user", "a string"),
    ],
)
def test_fields_of_embeddings(fields: dict[str, Any], code: str, param: str, told: str) -> None:
    data = json.dumps(fields).replace("Infinity", "1e400").encode()
    error = refusal(inputs.read_embeddings, data)
    assert (error.status, error.code, error.param) == (400, code, param), error.message
    assert told in error.message


def test_options_of_embeddings() -> None:
    plain = inputs.read_embeddings(body({"input": "a"}), LIMITS)
    assert (plain.model, plain.base64, plain.dimensions) == (None, False, None)
    full = inputs.read_embeddings(
        body(
            {
                "input": "a",
                "model": "clip",
                "encoding_format": "base64",
                "dimensions": 16,
                "normalize": True,
                "user": "me",
            }
        ),
        LIMITS,
    )
    assert (full.model, full.base64, full.dimensions) == ("clip", True, 16)


# Limits


@pytest.mark.parametrize(
    ("value", "status", "code", "param"),
    [
        (["a"] * 4, 413, "too_many_items", "input"),
        ("a" * 21, 413, "text_too_long", "input"),
        (["a", "a" * 21], 413, "text_too_long", "input[1]"),
        (
            {"image": base64.b64encode(JPEG.ljust(10_001, b"0")).decode()},
            413,
            "image_too_large",
            "input",
        ),
        ({"image": "A" * 16_000}, 413, "image_too_large", "input"),
    ],
)
def test_limits_of_items(value: Any, status: int, code: str, param: str) -> None:
    error = refusal(inputs.read_embeddings, {"input": value}, SMALL)
    assert (error.status, error.code, error.param) == (status, code, param)


def test_what_is_just_within_the_limits() -> None:
    image = JPEG.ljust(10_000, b"0")
    value = ["a" * 20, {"image": data_uri(image)}, {"image": base64.encodebytes(image).decode()}]
    read = inputs.read_embeddings(body({"input": value}), SMALL)
    assert [len(item.image) for item in read.items] == [0, 10_000, 10_000]


# Classify


def test_classify() -> None:
    read = inputs.read_classify(
        body(
            {
                "input": [BARE, {"image": URI}],
                "labels": ["cat", "Hündin"],
                "templates": ["a {c}", "{}!"],
                "scoring": "sigmoid",
                "top_k": 2,
                "model": "clip/7",
                "modality": "image",
            }
        ),
        LIMITS,
    )
    assert read.items == [Item("input[0]", image=PNG), Item("input[1]", image=PNG)]
    assert (read.labels, read.templates) == (("cat", "Hündin"), ("a {c}", "{}!"))
    assert (read.scoring, read.top_k, read.model, read.classifier) == ("sigmoid", 2, "clip/7", None)


def test_classify_by_a_stored_classifier() -> None:
    read = inputs.read_classify(body({"input": URI, "classifier": "a.b_C-9"}), LIMITS)
    assert (read.classifier, read.labels, read.scoring, read.top_k) == ("a.b_C-9", (), None, None)


def test_one_template_is_the_default() -> None:
    read = inputs.read_classify(body({"input": URI, "labels": ["cat"]}), LIMITS)
    assert read.templates == DEFAULT_TEMPLATES[:1]


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"input": {"text": "a"}, "labels": ["a"]}, 400, "text_to_classify", "input"),
        (
            {"input": [URI, {"type": "text", "text": "a"}], "labels": ["a"]},
            400,
            "text_to_classify",
            "input[1]",
        ),
        ({"input": "a cat", "labels": ["a"]}, 422, "undecodable_image", "input"),
        ({"input": URI, "labels": ["a"], "modality": "text"}, 400, "invalid_value", "modality"),
        ({"input": URI}, 400, "missing_field", "labels"),
        ({"input": URI, "labels": []}, 400, "empty", "labels"),
        ({"input": URI, "labels": "cat"}, 400, "invalid_type", "labels"),
        ({"input": URI, "labels": ["a", 5]}, 400, "invalid_type", "labels[1]"),
        ({"input": URI, "labels": ["a", ""]}, 400, "empty", "labels[1]"),
        ({"input": URI, "labels": ["a", "\ud800"]}, 400, "invalid_unicode", "labels[1]"),
        ({"input": URI, "labels": ["a"], "templates": []}, 400, "empty", "templates"),
        (
            {"input": URI, "labels": ["a"], "templates": ["{c}", "x"]},
            400,
            "invalid_template",
            "templates[1]",
        ),
        ({"input": URI, "labels": ["a"], "classifier": "x"}, 400, "conflict", "labels"),
        ({"input": URI, "templates": ["{}"], "classifier": "x"}, 400, "conflict", "templates"),
        ({"input": URI, "classifier": "../x"}, 400, "invalid_classifier_id", "classifier"),
        ({"input": URI, "classifier": ""}, 400, "invalid_classifier_id", "classifier"),
        ({"input": URI, "labels": ["a"], "scoring": "cosine"}, 400, "invalid_value", "scoring"),
        ({"input": URI, "labels": ["a"], "top_k": 0}, 400, "invalid_value", "top_k"),
        (
            {"input": URI, "labels": ["a"] * 7, "templates": ["{}"]},
            413,
            "too_many_prompts",
            "labels",
        ),
        (
            {"input": URI, "labels": ["a"] * 4, "templates": ["{}", "a {}"]},
            413,
            "too_many_prompts",
            "labels",
        ),
        (
            {"input": URI, "labels": ["a" * 21], "templates": ["{}"]},
            413,
            "text_too_long",
            "labels[0]",
        ),
        (
            {"input": URI, "labels": ["a", "a" * 11], "templates": ["{}", "b" * 10 + "{c}"]},
            413,
            "text_too_long",
            "templates[1]",
        ),
        (
            {"input": URI, "labels": ["a" * 5, "b"], "templates": ["{}{}{}{}{}"]},
            413,
            "text_too_long",
            "templates[0]",
        ),
        ({"input": [URI] * 3, "labels": ["a"], "top_k": 8}, 413, "too_many_predictions", "top_k"),
    ],
)
def test_classify_refusals(fields: dict[str, Any], status: int, code: str, param: str) -> None:
    error = refusal(inputs.read_classify, fields, SMALL)
    assert (error.status, error.code, error.param) == (status, code, param), error.message


@pytest.mark.parametrize("template", ["{}" * 10, "{c}" * 6 + "{}", "a {}."])
def test_the_length_of_a_prompt_is_that_of_its_text(template: str) -> None:
    """The longest label that is taken fills a template to the limit, and one character more not."""
    place = "{c}" if "{c}" in template else "{}"
    fits = max(n for n in range(1, 20) if len(template.replace(place, "x" * n)) <= 20)
    for read, fields in ((inputs.read_classify, {"input": URI}), (inputs.read_classifier, {})):
        document = {**fields, "labels": ["x" * fits, "y"], "templates": [template]}
        read(body(document), SMALL)
        document["labels"] = ["x" * (fits + 1), "y"]
        error = refusal(read, document, SMALL)
        assert (error.status, error.code, error.param) == (413, "text_too_long", "templates[0]")
        assert f"{len(template.replace(place, 'x' * (fits + 1)))} characters" in error.message


def test_gigabytes_of_prompts_in_a_small_body_are_refused() -> None:
    fields = {"labels": ["x" * 999], "templates": ["{}" * 500] * 8000}
    error = refusal(inputs.read_classify, {"input": URI, **fields})
    assert (error.status, error.code) == (413, "text_too_long") and "499500" in error.message


def test_predictions_count_the_default_too() -> None:
    few = Limits(items=3, predictions=14)
    inputs.read_classify(body({"input": [URI] * 2, "labels": ["a"], "top_k": 7}), few)
    error = refusal(inputs.read_classify, {"input": [URI] * 3, "labels": ["a"]}, few)
    assert (error.status, error.code) == (413, "too_many_predictions")
    assert "3 images x top_k 5 = 15 predictions, limit 14" in error.message


def test_too_many_prompts_name_the_way_out() -> None:
    error = refusal(
        inputs.read_classify, {"input": URI, "labels": ["a"] * 7, "templates": ["{}"]}, SMALL
    )
    assert "7 labels x 1 templates = 7 prompts, limit 6" in error.message
    assert "PUT /v1/classifiers" in error.message


# Rank and stored classifiers


def test_rank() -> None:
    read = inputs.read_rank(body({"query": "a", "documents": ["b", {"image": URI}]}), LIMITS)
    assert read.single and read.queries == [Item("query", "a")]
    assert read.documents == [Item("documents[0]", "b"), Item("documents[1]", image=PNG)]
    assert (read.top_n, read.return_documents) == (None, False)
    read = inputs.read_rank(
        body(
            {
                "queries": ["a", {"image": URI}],
                "documents": ["b"],
                "top_n": 9,
                "return_documents": True,
            }
        ),
        LIMITS,
    )
    assert not read.single
    assert read.queries == [Item("queries[0]", "a"), Item("queries[1]", image=PNG)]
    assert (read.top_n, read.return_documents) == (9, True)


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"documents": ["a"]}, 400, "missing_field", "query"),
        ({"query": "a"}, 400, "missing_field", "documents"),
        ({"query": "a", "queries": ["a"], "documents": ["a"]}, 400, "conflict", "queries"),
        ({"query": ["a"], "documents": ["a"]}, 400, "invalid_type", "query"),
        ({"queries": "a", "documents": ["a"]}, 400, "invalid_type", "queries"),
        ({"queries": [], "documents": ["a"]}, 400, "empty", "queries"),
        ({"query": "a", "documents": "b"}, 400, "invalid_type", "documents"),
        ({"query": "a", "documents": []}, 400, "empty", "documents"),
        ({"query": "a", "documents": ["b", URI]}, 400, "image_as_text", "documents[1]"),
        ({"query": "a", "documents": ["b"] * 3}, 413, "too_many_items", "documents"),
        ({"query": "a", "documents": ["b"], "top_n": 0}, 400, "invalid_value", "top_n"),
        (
            {"query": "a", "documents": ["b"], "return_documents": 1},
            400,
            "invalid_type",
            "return_documents",
        ),
    ],
)
def test_rank_refusals(fields: dict[str, Any], status: int, code: str, param: str) -> None:
    error = refusal(inputs.read_rank, fields, SMALL)
    assert (error.status, error.code, error.param) == (status, code, param)


def test_a_classifier_to_store() -> None:
    read = inputs.read_classifier(body({"labels": ["a", "b"]}), SMALL)
    assert (read.labels, read.templates, read.scoring) == (
        ("a", "b"),
        DEFAULT_TEMPLATES[:1],
        "softmax",
    )
    read = inputs.read_classifier(
        body({"labels": ["a"] * 8, "templates": ["{}"], "scoring": "sigmoid"}), SMALL
    )
    assert len(read.labels) == 8 and read.scoring == "sigmoid"
    error = refusal(inputs.read_classifier, {"labels": ["a"] * 9, "templates": ["{}"]}, SMALL)
    assert (error.status, error.code) == (413, "too_many_prompts")


@pytest.mark.parametrize(
    "wrong", ["", ".", "..", "-a", ".a", "a" * 65, "a/b", "a b", "ä", "a\n", "a%2fb"]
)
def test_ids_that_are_none(wrong: str) -> None:
    with pytest.raises(ApiError) as caught:
        inputs.check_id(wrong, "id")
    assert (caught.value.status, caught.value.param) == (400, "id")


@pytest.mark.parametrize("right", ["a", "7", "imagenet-1k", "A.b_C-9", "a" * 64])
def test_ids(right: str) -> None:
    assert inputs.check_id(right, "id") == right


# Forms and files


def read_form(*parts: Any) -> inputs.EmbeddingsRequest:
    data, headers = form(*parts)
    return inputs.read_embeddings(Body(data, headers["content-type"]), LIMITS)


def test_a_form_keeps_the_order_of_its_parts() -> None:
    read = read_form(
        ("text", "ein Kätzchen"),
        ("image", PNG, "a.png"),
        ("model", "clip"),
        ("text", "b"),
        ("anything", JPEG, "Bild ä.jpg"),
        ("files", PNG, "x"),
        ("encoding_format", "base64"),
    )
    assert read.items == [
        Item("input[0]", "ein Kätzchen"),
        Item("input[1]", image=PNG),
        Item("input[2]", "b"),
        Item("input[3]", image=JPEG),
        Item("input[4]", image=PNG),
    ]
    assert (read.model, read.base64) == ("clip", True)


def test_a_form_to_classify() -> None:
    data, headers = form(
        ("image", PNG, "a.png"),
        ("labels", "cat"),
        ("labels", "dog, wet"),
        ("labels", '["x", "y"]'),
        ("templates", '["a {c}"]'),
        ("top_k", "3"),
        ("scoring", "sigmoid"),
    )
    read = inputs.read_classify(Body(data, headers["content-type"]), LIMITS)
    assert read.labels == ("cat", "dog, wet", "x", "y") and read.templates == ("a {c}",)
    assert (read.top_k, read.scoring, len(read.items)) == (3, "sigmoid", 1)


@pytest.mark.parametrize(
    ("parts", "status", "code", "param"),
    [
        ([("model", "clip")], 400, "empty", None),
        ([("image", BARE)], 400, "empty", None),
        ([("image", PNG, "a"), ("image", BARE)], 400, "invalid_form", "image"),
        ([("image", PNG, "a"), ("colour", "x")], 400, "unknown_field", "colour"),
        ([("image", PNG, "a"), ("model", "a"), ("model", "b")], 400, "invalid_form", "model"),
        ([("text", "a"), ("text", b"\xff")], 400, "invalid_unicode", "text"),
        ([("text", "a"), ("image", b"", "a")], 422, "unsupported_image", "input[1]"),
        ([("text", "a"), ("image", b"hello", "a")], 422, "unsupported_image", "input[1]"),
        ([("text", "a"), ("text", URI)], 400, "image_as_text", "input[1]"),
        ([("text", "a")] * 65, 413, "too_many_items", "input"),
        ([("image", JPEG.ljust(10_000_001, b"0"), "a")], 413, "image_too_large", "input[0]"),
    ],
)
def test_forms_that_are_refused(parts: Any, status: int, code: str, param: str | None) -> None:
    data, headers = form(*parts)
    error = refusal(inputs.read_embeddings, Body(data, headers["content-type"]))
    assert (error.status, error.code, error.param) == (status, code, param), error.message


@pytest.mark.parametrize("fields", [{"labels": '{"a": 1}'}, {"labels": "[1]"}, {"labels": "["}])
def test_labels_of_a_form_that_are_no_list_of_strings(fields: dict[str, str]) -> None:
    data, headers = form(("image", PNG, "a"), *fields.items())
    given = Body(data, headers["content-type"])
    if fields["labels"] == '{"a": 1}':  # a text that is a label
        assert inputs.read_classify(given, LIMITS).labels == ('{"a": 1}',)
    else:
        assert refusal(inputs.read_classify, given).status == 400


def test_a_text_field_to_classify_is_refused() -> None:
    data, headers = form(("image", PNG, "a"), ("text", "a"), ("labels", "b"))
    assert refusal(inputs.read_classify, Body(data, headers["content-type"])).status == 400


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (inputs.read_classify, ["labels", "templates", "classifier", "scoring", "top_k", "model"]),
        (inputs.read_embeddings, ["text", "model", "encoding_format", "user"]),
    ],
)
def test_a_text_field_that_is_sent_as_a_file_is_no_image(read: Any, names: list[str]) -> None:
    for name in names:
        data, headers = form(("image", PNG, "a"), (name, PNG, "labels.txt"))
        error = refusal(read, Body(data, headers["content-type"]))
        assert (error.status, error.code, error.param) == (400, "invalid_form", name)
        assert "as a file" in error.message


def test_too_many_parts() -> None:
    data, headers = form(*[("labels", "a")] * 40, ("image", PNG, "a"))
    error = refusal(inputs.read_classify, Body(data, headers["content-type"]), SMALL)
    assert (error.status, error.code) == (413, "too_many_parts")


FORM_X = "multipart/form-data; boundary=x"
_PART = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n'


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (b"", FORM_X),
        (b"junk", FORM_X),
        (b"--x\r\n", FORM_X),
        (_PART + b"a", FORM_X),
        (_PART + b"a\r\n--x--", "multipart/form-data"),
        (_PART.replace(b"form-data", b"attachment") + b"a\r\n--x--", FORM_X),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--", FORM_X),
        (b"--x\r\n\r\na\r\n--x--", FORM_X),
        (b"--x\r\nb\xe4d header\r\n\r\na\r\n--x--", FORM_X),
        (b"--x\r\n" + b"A" * 100_000 + b": 1\r\n\r\na\r\n--x--", FORM_X),
        (b"--x\r\n" + b"A: 1\r\n" * 100_000 + b"\r\na\r\n--x--", FORM_X),
        (b"a", f"multipart/form-data; boundary={'y' * 5000}"),
        (
            b'--x\r\nContent-Disposition: form-data; name="text"\r\n'
            b"Content-Transfer-Encoding: base64\r\n\r\nYQ==\r\n--x--\r\n",
            FORM_X,
        ),
    ],
)
def test_what_is_no_form(data: bytes, content_type: str) -> None:
    error = refusal(inputs.read_embeddings, Body(data, content_type))
    assert (error.status, error.code) == (400, "invalid_form"), error.message


def test_boundaries_inside_files_are_found_only_at_line_starts() -> None:
    image = PNG + b"--x--\r\n-x\r\n--"
    data = (
        b'preamble\r\n--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n'
        + image
        + b"\r\n--x--\r\nepilogue"
    )
    given = Body(data.removeprefix(b"preamble"), FORM_X)
    assert inputs.read_embeddings(given, LIMITS).items[0].image == image


def test_a_file_as_the_whole_body() -> None:
    for kind in (*inputs.IMAGE_TYPES, "image/jpg"):
        read = inputs.read_embeddings(Body(JPEG, kind, "model=clip&encoding_format=base64"), LIMITS)
        assert read.items == [Item("input", image=JPEG)]
        assert (read.model, read.base64) == ("clip", True)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("modle=clip", "unknown_field"),
        ("model=a&model=b", "invalid_query"),
        ("model=%ff", "invalid_query"),
        ("&".join(f"a{i}=1" for i in range(30)), "invalid_query"),
        ("encoding_format=x", "invalid_value"),
    ],
)
def test_query_strings_that_are_refused(query: str, code: str) -> None:
    error = refusal(inputs.read_embeddings, Body(JPEG, "image/jpeg", query))
    assert (error.status, error.code) == (400, code)


def test_files_that_are_refused() -> None:
    assert refusal(inputs.read_embeddings, Body(b"", "image/jpeg")).status == 422
    assert refusal(inputs.read_embeddings, Body(b"hello", "image/png")).status == 422
    big = Body(JPEG.ljust(10_000_001, b"0"), "image/jpeg")
    assert refusal(inputs.read_embeddings, big).status == 413
