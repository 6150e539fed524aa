"""From the bytes of a request to typed requests: all of it is checked before any work is queued.

Plain functions, not pydantic models: a body of 20 MB is walked once, and every refusal names its
place (`input[3]`) and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from clip_ray.config.serving import Limits
from clip_ray.eval.prompts import DEFAULT_TEMPLATES
from serve import schemas
from serve.definitions import ID_PATTERN, Definition
from serve.documents import Body, Fields, load, load_json, wrong, wrong_type
from serve.errors import ApiError
from serve.forms import Part, read_form, text_of
from serve.items import (
    Item,
    check_image,
    check_prompt_lengths,
    check_text,
    read_items,
    read_text,
    too_many,
)

JSON_TYPE, FORM_TYPE = "application/json", "multipart/form-data"
IMAGE_TYPES = ("image/gif", "image/jpeg", "image/png", "image/webp")
_ALIASES = ("image/jpg",)  # no registered type, and yet what many programs send
SCORINGS = ("softmax", "sigmoid")
TOP_K = 5  # labels of an answer, where a request does not say
_OPTIONS = 20  # fields of a form beside its texts, images and labels


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """POST /v1/embeddings; `dimensions` is still to be held against the model."""

    items: list[Item]
    model: str | None
    base64: bool
    dimensions: int | None


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    """POST /v1/classify: labels and templates, or else the id of a stored classifier."""

    items: list[Item]
    model: str | None
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    classifier: str | None
    scoring: str | None
    top_k: int | None


@dataclass(frozen=True, slots=True)
class RankRequest:
    """POST /v1/rank; `single` for one `query`, whose answer is not a list of lists."""

    queries: list[Item]
    documents: list[Item]
    single: bool
    model: str | None
    top_n: int | None
    return_documents: bool


def read_embeddings(body: Body, limits: Limits) -> EmbeddingsRequest:
    """Return a checked request for embeddings: JSON, a form, or an image file.

    Raises:
        ApiError: the request is not what the API takes, or over a limit.
    """
    if body.media_type == JSON_TYPE:
        fields = Fields(load(body), schemas.EMBEDDINGS["properties"])
        modality = fields.choice("modality", ("text", "image")) or "text"
        items = read_items(fields.needed("input"), "input", modality, limits)
    elif body.media_type == FORM_TYPE:
        known = schemas.EMBEDDINGS_FORM["properties"]
        items, members = _read_form_items(body, limits, known)
        fields = Fields(members, known, as_text=True)
    elif body.media_type in (*IMAGE_TYPES, *_ALIASES):
        fields = Fields(_read_query(body.query), schemas.EMBEDDINGS_QUERY, as_text=True)
        items = [Item("input", image=check_image(body.data, "input", limits))]
    else:
        raise wrong_type(body, (JSON_TYPE, FORM_TYPE, *IMAGE_TYPES))
    fields.string("user")
    if fields.flag("normalize") is False:
        raise ApiError(
            400,
            "unsupported_normalize",
            "normalize false is not supported: embeddings have unit length; leave it out",
            param="normalize",
        )
    return EmbeddingsRequest(
        items=items,
        model=fields.string("model", 200),
        base64=fields.choice("encoding_format", ("float", "base64")) == "base64",
        dimensions=fields.integer("dimensions"),
    )


def read_classify(body: Body, limits: Limits) -> ClassifyRequest:
    """Return a checked request for classification: JSON or a form.

    Raises:
        ApiError: the request is not what the API takes, or over a limit.
    """
    if body.media_type == JSON_TYPE:
        fields = Fields(load(body), schemas.CLASSIFY["properties"])
        fields.choice("modality", ("image",))
        items = read_items(fields.needed("input"), "input", "image", limits)
    elif body.media_type == FORM_TYPE:
        known = schemas.CLASSIFY_FORM["properties"]
        items, members = _read_form_items(body, limits, known)
        fields = Fields(members, known, as_text=True)
    else:
        raise wrong_type(body, (JSON_TYPE, FORM_TYPE))
    for item in items:
        if item.text is not None:
            raise ApiError(
                400, "text_to_classify", "classify takes images, not texts", param=item.param
            )
    classifier = fields.string("classifier")
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    if classifier is None:
        labels, templates = _read_prompts(fields, limits, limits.prompts)
    else:
        check_id(classifier, "classifier")
        for name in ("labels", "templates"):
            if fields.get(name) is not None:
                raise ApiError(
                    400, "conflict", f"give either classifier or {name}, not both", param=name
                )
    top_k = fields.integer("top_k")
    _check_predictions(len(items), top_k or TOP_K, limits)
    return ClassifyRequest(
        items=items,
        model=fields.string("model", 200),
        labels=labels,
        templates=templates,
        classifier=classifier,
        scoring=fields.choice("scoring", SCORINGS),
        top_k=top_k,
    )


def read_rank(body: Body, limits: Limits) -> RankRequest:
    """Return a checked request for ranking.

    Raises:
        ApiError: the request is not what the API takes, or over a limit.
    """
    if body.media_type != JSON_TYPE:
        raise wrong_type(body, (JSON_TYPE,))
    fields = Fields(load(body), schemas.RANK["properties"])
    single = fields.get("queries") is None
    if not single and fields.get("query") is not None:
        raise ApiError(400, "conflict", "give either query or queries, not both", param="queries")
    name = "query" if single else "queries"
    value = fields.needed(name)
    if single == isinstance(value, list):
        expected = "one text or image" if single else "a list of texts and images"
        raise wrong(name, value, expected)
    queries = read_items(value, name, "text", limits)
    documents = fields.needed("documents")
    if not isinstance(documents, list):
        raise wrong("documents", documents, "a list of texts and images")
    if len(queries) + len(documents) > limits.items:
        raise too_many(len(queries) + len(documents), "documents", limits)
    return RankRequest(
        queries=queries,
        documents=read_items(documents, "documents", "text", limits),
        single=single,
        model=fields.string("model", 200),
        top_n=fields.integer("top_n"),
        return_documents=bool(fields.flag("return_documents")),
    )


def read_classifier(body: Body, limits: Limits) -> Definition:
    """Return a checked classifier to be stored.

    Raises:
        ApiError: the request is not what the API takes, or over a limit.
    """
    if body.media_type != JSON_TYPE:
        raise wrong_type(body, (JSON_TYPE,))
    fields = Fields(load(body), schemas.CLASSIFIER["properties"])
    labels, templates = _read_prompts(fields, limits, limits.stored_prompts)
    is_sigmoid = fields.choice("scoring", SCORINGS) == "sigmoid"
    return Definition(labels, templates, "sigmoid" if is_sigmoid else "softmax")


def check_id(identifier: str, param: str) -> str:
    """Return a classifier's id.

    Raises:
        ApiError: 400 for what is no id.
    """
    if not re.fullmatch(ID_PATTERN, identifier):
        raise ApiError(
            400,
            "invalid_classifier_id",
            "expected 1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit",
            param=param,
        )
    return identifier


def _check_predictions(images: int, top_k: int, limits: Limits) -> None:
    if images * top_k > limits.predictions:
        raise ApiError(
            413,
            "too_many_predictions",
            f"{images} images x top_k {top_k} = {images * top_k} predictions, limit "
            f"{limits.predictions}; ask for fewer, or send several requests",
            param="top_k",
        )


def _read_prompts(
    fields: Fields, limits: Limits, most: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return labels and templates, which are at most `most` prompts together."""
    labels = _read_texts(fields.needed("labels"), "labels", limits)
    templates: tuple[str, ...] = DEFAULT_TEMPLATES[:1]
    if fields.get("templates") is not None:
        templates = _read_texts(fields.get("templates"), "templates", limits)
    for index, template in enumerate(templates):
        if "{c}" not in template and "{}" not in template:
            raise ApiError(
                400,
                "invalid_template",
                "a template needs {c} or {} where the label goes, such as 'a photo of a {c}.'",
                param=f"templates[{index}]",
            )
    count = len(labels) * len(templates)
    if count > most:
        is_stored = most == limits.stored_prompts
        way_out = "use fewer" if is_stored else "store them with PUT /v1/classifiers/ID"
        raise ApiError(
            413,
            "too_many_prompts",
            f"{len(labels)} labels x {len(templates)} templates = {count} prompts, limit {most}; "
            f"{way_out}",
            param="labels",
        )
    check_prompt_lengths(labels, templates, limits)
    return labels, templates


def _read_texts(value: Any, name: str, limits: Limits) -> tuple[str, ...]:
    """Return a list of texts, each checked as a text of an input is."""
    if not isinstance(value, list):
        raise wrong(name, value, "a list of strings")
    if not value:
        raise ApiError(400, "empty", f"{name} is an empty list; expected at least 1", param=name)
    # One pass in C for what is almost always right; the loop finds what is not.
    if not (
        all(type(text) is str for text in value)
        and all(value)
        and max(map(len, value)) <= limits.text_chars
        and "".join(value).isascii()
    ):
        for index, text in enumerate(value):
            place = f"{name}[{index}]"
            if not isinstance(text, str):
                raise wrong(place, text, "a string")
            check_text(text, place, limits)
    return tuple(value)


def _read_form_items(
    body: Body, limits: Limits, known: Collection[str]
) -> tuple[list[Item], dict[str, Any]]:
    """Return the items of a form in order, and its other fields; lists stay lists.

    Files are images whatever their part is called, but for the names of the `known` text fields.
    """
    texts = "text" in known
    most = limits.items + limits.prompts + _OPTIONS
    parts = read_form(body.data, body.content_type, most)
    items: list[Item] = []
    members: dict[str, Any] = {}
    count = sum(part.is_file or (texts and part.name == "text") for part in parts)
    if count == 0:
        raise ApiError(
            400, "empty", "the form has no file; with curl send one with -F image=@cat.jpg"
        )
    if count > limits.items:
        raise too_many(count, "input", limits)
    for part in parts:
        param = f"input[{len(items)}]"
        if part.is_file and part.name in known and part.name != "image":
            raise ApiError(
                400,
                "invalid_form",
                f"part {part.name!r} is sent as a file; send it as text (curl: -F "
                f"{part.name}=TEXT, or -F '{part.name}=<FILE')",
                param=part.name,
            )
        if part.is_file:
            items.append(Item(param, image=check_image(part.data, param, limits)))
        elif texts and part.name == "text":
            items.append(read_text(text_of(part), param, limits))
        else:
            _add_member(members, part)
    return items, members


def _add_member(members: dict[str, Any], part: Part) -> None:
    name, text = part.name[:100], text_of(part)
    if name in ("image", "file", "files"):
        raise ApiError(
            400, "invalid_form", f"part {name!r} is no file; give it a file name", param=name
        )
    if name in ("labels", "templates"):
        texts = members.setdefault(name, [])
        if text.lstrip().startswith("["):
            value = load_json(text.encode("utf-8"))
            texts += value if isinstance(value, list) else [value]
        else:
            texts.append(text)
    elif name in members:
        raise ApiError(400, "invalid_form", f"field {name!r} appears twice", param=name)
    else:
        members[name] = text


def _read_query(query: str) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=_OPTIONS)
    except ValueError:
        raise ApiError(400, "invalid_query", "the query string is not UTF-8, or too long") from None
    members: dict[str, Any] = dict(pairs)
    if len(members) != len(pairs):
        raise ApiError(400, "invalid_query", "a parameter appears twice in the query string")
    return members
