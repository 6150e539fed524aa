"""The JSON Schemas of the API: what /openapi.json shows, and which fields a request may have.

`serve.inputs` checks by hand, in one pass over bodies of up to 20 MB, and takes the names of the
fields from here; a test sends every example to the app and holds every answer against its schema.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

# 16 x 16 pixels of one red: an image that examples can carry.
EXAMPLE_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGUlEQVR4nGM8ISfHQApgIkn1"
    "qIZRDUNKAwBPHwEkcYw1mAAAAABJRU5ErkJggg=="
)


def _object(properties: Schema, required: tuple[str, ...] = ()) -> Schema:
    schema: Schema = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    if required:
        schema["required"] = list(required)
    return schema


def _string(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


def _array(items: Schema, description: str = "", **more: Any) -> Schema:
    return {"type": "array", "items": items, "description": description, **more}


def _integer(description: str, **more: Any) -> Schema:
    return {"type": "integer", "description": description, **more}


def _nullable(schema: Schema) -> Schema:
    """Return the schema of a field for which null means absent, as clients like to send it."""
    options = dict(schema)
    if "type" in options:
        options["type"] = [options["type"], "null"]
        if "enum" in options:
            options["enum"] = [*options["enum"], None]
        return options
    return {"anyOf": [options, {"type": "null"}]}


ITEM_FORMS: tuple[Schema, ...] = (
    _object({"text": _string("a text")}, ("text",)),
    _object({"image": _string("data URI, bare base64, or https URL")}, ("image",)),
    _object(
        {"type": {"const": "text"}, "text": _string("a text")},
        ("type", "text"),
    ),
    _object(
        {
            "type": {"const": "image_url"},
            "image_url": _object({"url": _string("data URI or https URL")}, ("url",)),
        },
        ("type", "image_url"),
    ),
)
_ITEM: Schema = {"anyOf": [_string("a text, or an image where modality says so"), *ITEM_FORMS]}
_IMAGE: Schema = {"anyOf": [_string("data URI, bare base64, or https URL"), *ITEM_FORMS[1::2]]}
_MODEL = _nullable(
    _string(
        "NAME or NAME@champion: what is served now; NAME/VERSION: that version, or 409",
        maxLength=200,
    )
)
_MODALITY = _nullable(_string("what plain strings are", enum=["text", "image"]))
_SCORING = _nullable(
    _string(
        "softmax over the labels, or a sigmoid of each label's logit, its bias included",
        enum=["softmax", "sigmoid"],
    )
)
_LABELS = _array(_string("a class name"), "class names", minItems=1)
_TEMPLATES = _array(
    _string("a sentence with {c} or {} in the name's place"), "prompt templates", minItems=1
)


def _one_or_many(item: Schema) -> Schema:
    return {"anyOf": [*item["anyOf"], _array(item, minItems=1)]}


EMBEDDINGS = _object(
    {
        "input": _one_or_many(_ITEM),
        "model": _MODEL,
        "modality": _MODALITY,
        "encoding_format": _nullable(
            _string(
                "float, or base64 of little-endian float32; of no effect where the header Accept "
                "asks for application/octet-stream: that answer is the bytes themselves",
                enum=["float", "base64"],
            )
        ),
        "dimensions": _nullable(_integer("only the model's own number", minimum=1)),
        "normalize": _nullable(
            {"const": True, "description": "embeddings always have unit length"}
        ),
        "user": _nullable(_string("accepted for OpenAI's clients; unused and never logged")),
    },
    ("input",),
)

CLASSIFY = _object(
    {
        "input": _one_or_many(_IMAGE),
        "labels": _nullable(_LABELS),
        "templates": _nullable(_TEMPLATES),
        "classifier": _nullable(_string("id of a stored classifier, instead of labels")),
        "scoring": _SCORING,
        "top_k": _nullable(_integer("labels of an image; 5, or all if fewer", minimum=1)),
        "model": _MODEL,
        "modality": _nullable(_string("images only", enum=["image"])),
    },
    ("input",),
)

RANK = _object(
    {
        "query": _nullable(_ITEM),
        "queries": _nullable(_array(_ITEM, "queries; the answer has a list for each", minItems=1)),
        "documents": _array(_ITEM, "what is ranked; texts and images may mix", minItems=1),
        "top_n": _nullable(_integer("documents of an answer; none = all", minimum=1)),
        "return_documents": _nullable(
            {"type": "boolean", "description": "repeat the texts in the answer; never images"}
        ),
        "model": _MODEL,
    },
    ("documents",),
)

CLASSIFIER = _object(
    {
        "labels": _LABELS,
        "templates": _nullable(_TEMPLATES),
        "scoring": _SCORING,
    },
    ("labels",),
)

_FILES = {"type": "string", "format": "binary"}
EMBEDDINGS_FORM = _object(
    {
        "image": _array(_FILES, "image files; any name will do; the order of all parts counts"),
        "text": _array(_string("a text"), "texts"),
        **{name: EMBEDDINGS["properties"][name] for name in ("model", "encoding_format", "user")},
    }
)
CLASSIFY_FORM = _object(
    {
        "image": _array(_FILES, "image files; any name will do"),
        "labels": _array(_string("a class name"), "repeated, or one JSON list"),
        "templates": _array(_string("a sentence with {c} or {}"), "repeated, or one JSON list"),
        **{
            name: CLASSIFY["properties"][name]
            for name in ("classifier", "scoring", "top_k", "model")
        },
    }
)
EMBEDDINGS_QUERY = ("model", "encoding_format", "user")

EXAMPLES: dict[str, dict[str, Schema]] = {
    "embeddings": {
        "text": {"input": "a photo of a cat"},
        "texts": {"input": ["a cat", "a dog"], "encoding_format": "base64"},
        "image": {"input": [{"image": EXAMPLE_IMAGE}]},
        "mixed": {
            "input": [
                {"type": "text", "text": "something red"},
                {"type": "image_url", "image_url": {"url": EXAMPLE_IMAGE}},
            ]
        },
    },
    "classify": {
        "labels": {
            "input": EXAMPLE_IMAGE,
            "labels": ["red", "green", "blue"],
            "templates": ["a {c} square."],
            "top_k": 2,
        },
        "sigmoid": {
            "input": [{"image": EXAMPLE_IMAGE}],
            "labels": ["red", "green"],
            "scoring": "sigmoid",
        },
    },
    "rank": {
        "query": {"query": "a red square", "documents": [{"image": EXAMPLE_IMAGE}, "a cat"]},
        "queries": {
            "queries": ["a red square", {"image": EXAMPLE_IMAGE}],
            "documents": ["red", "green", {"image": EXAMPLE_IMAGE}],
            "top_n": 2,
            "return_documents": True,
        },
    },
    "classifier": {
        "colours": {
            "labels": ["red", "green", "blue"],
            "templates": ["a {c} square.", "something {c}."],
            "scoring": "softmax",
        }
    },
}

_NUMBER = {"type": "number"}
_INDEX = {"type": "integer", "minimum": 0}
_CLIP = _object(
    {
        "name": _string("registered name"),
        "version": _string("registry version, or the start of the digest"),
        "run_id": _nullable(_string("MLflow run that made the model")),
        "digest": _string("SHA-256 over the model's files", pattern="^[0-9a-f]{64}$"),
        "logit_scale": _NUMBER,
        "logit_bias": _NUMBER,
        "dim": _integer("numbers of an embedding"),
    },
    ("name", "version", "run_id", "digest", "logit_scale", "logit_bias", "dim"),
)
_PROVENANCE = {"model": _string("the model that answered, such as clip/7"), "clip": _CLIP}
_USAGE = _object(
    {name: _INDEX for name in ("prompt_tokens", "total_tokens", "images")},
    ("prompt_tokens", "total_tokens", "images"),
)


def _answer(kind: str, properties: Schema) -> Schema:
    full = {"object": {"const": kind}, **properties, **_PROVENANCE}
    return _object(full, tuple(full))


_EMBEDDING = {
    "object": {"const": "embedding"},
    "index": _INDEX,
    "embedding": {"anyOf": [_array(_NUMBER), _string("base64 of little-endian float32")]},
    "modality": {"enum": ["text", "image"]},
}
EMBEDDINGS_ANSWER = _answer(
    "list", {"data": _array(_object(_EMBEDDING, tuple(_EMBEDDING))), "usage": _USAGE}
)
_PREDICTION = {
    "label": {"type": "string"},
    "score": {"type": "number", "minimum": 0, "maximum": 1},
    "logit": _NUMBER,
    "label_index": _INDEX,
}
CLASSIFY_ANSWER = _answer(
    "classify",
    {
        "data": _array(
            _object(
                {
                    "index": _INDEX,
                    "predictions": _array(_object(_PREDICTION, tuple(_PREDICTION))),
                },
                ("index", "predictions"),
            )
        ),
        "scoring": {"enum": ["softmax", "sigmoid"]},
        "classifier": _nullable({"type": "string"}),
        "cached": {"type": "boolean"},
        "usage": _USAGE,
    },
)
_RANKED = _array(
    _object(
        {
            "index": _INDEX,
            "relevance_score": {"type": "number", "minimum": -1.01, "maximum": 1.01},
            "document": _object({"text": {"type": "string"}}, ("text",)),
        },
        ("index", "relevance_score"),
    )
)
RANK_ANSWER = _answer("rank", {"results": {"anyOf": [_RANKED, _array(_RANKED)]}, "usage": _USAGE})
CLASSIFIER_ANSWER = _answer(
    "classifier",
    {
        "id": {"type": "string"},
        "labels": _LABELS,
        "templates": _TEMPLATES,
        "scoring": {"enum": ["softmax", "sigmoid"]},
        "created": _string("ISO time of its PUT"),
    },
)
_LISTED = {
    "object": {"const": "classifier"},
    "id": {"type": "string"},
    "labels": _integer("number of labels"),
    "templates": _integer("number of templates"),
    "scoring": {"enum": ["softmax", "sigmoid"]},
    "created": _string("ISO time of its PUT"),
    "error": _string("why it cannot be read; nothing else is known then"),
}
CLASSIFIERS_ANSWER = _answer("list", {"data": _array(_object(_LISTED, ("object", "id")))})
DELETED_ANSWER = _answer("classifier", {"id": {"type": "string"}, "deleted": {"const": True}})
_MODEL_CARD = {
    "id": {"type": "string"},
    "object": {"const": "model"},
    "created": _integer("always 0: exports carry no date"),
    "owned_by": {"type": "string"},
    "clip": _CLIP,
    "image_size": _integer("pixels of a side"),
}
MODEL_ANSWER = _object(_MODEL_CARD, tuple(_MODEL_CARD))
MODELS_ANSWER = _answer("list", {"data": _array(MODEL_ANSWER)})
READY_ANSWER = _object({"status": {"const": "ready"}, "model": {"type": "string"}})
HEALTH_ANSWER = _object({"status": {"const": "ok"}})
_ERROR = {
    "message": _string("what is wrong, what was expected, what to do"),
    "type": _string("the family of the error, as OpenAI names it"),
    "code": _string("stable word for programs"),
    "param": _nullable(_string("place in the request, such as input[3]")),
    "request_id": _string("also in x-request-id and in the access log"),
}
ERROR_ANSWER = _object({"error": _object(_ERROR, tuple(_ERROR))}, ("error",))

_STATUSES = {
    400: "the request is not what the API takes; `param` names the place",
    401: "no key, or not a valid one",
    403: "the key lacks the scope",
    404: "no such model, classifier or route",
    408: "the body or the answer took too long",
    409: "the version that `model` names is not loaded",
    413: "over a limit of size or number",
    415: "a media type that the route does not take",
    422: "an image that cannot be decoded or fetched; `param` names it",
    429: "over the key's rate, or the replica is full; Retry-After says when to try again",
    503: "the model is still being loaded",
}
_ALWAYS = (401, 403, 429)
_WORK = (*_ALWAYS, 400, 404, 408, 409, 413, 415, 422, 503)


def operation(
    summary: str,
    answer: Schema,
    *,
    body: Schema | None = None,
    examples: dict[str, Schema] | None = None,
    form: Schema | None = None,
    images: bool = False,
    errors: tuple[int, ...] = _WORK,
    parameters: tuple[Schema, ...] = (),
) -> dict[str, Any]:
    """Return the keyword arguments that document a route of FastAPI.

    Args:
        summary: one line.
        answer: schema of the JSON answer.
        body: schema of the JSON body; none = no body.
        examples: of `body`, by name.
        form: schema of the multipart/form-data body, where the route takes one.
        images: an image file may be the whole body, and the answer may be raw float32.
        errors: statuses of refusals.
        parameters: OpenAPI parameters beyond those of the path.
    """
    content: Schema = {}
    if body is not None:
        shown = {name: {"value": value} for name, value in (examples or {}).items()}
        content["application/json"] = {"schema": body, "examples": shown}
    if form is not None:
        content["multipart/form-data"] = {"schema": form}
    answers: Schema = {"application/json": {"schema": answer}}
    if images:
        for kind in ("jpeg", "png", "webp", "gif"):
            content[f"image/{kind}"] = {"schema": _FILES}
        answers["application/octet-stream"] = {"schema": _FILES}
    refusal = {"application/json": {"schema": ERROR_ANSWER}}
    responses: dict[int | str, Any] = {200: {"description": "the answer", "content": answers}}
    for status in sorted(errors):
        responses[status] = {"description": _STATUSES[status], "content": refusal}
    extra: Schema = {"security": [{"key": []}]} if 401 in errors else {}
    if content:
        extra["requestBody"] = {"required": True, "content": content}
    if parameters:
        extra["parameters"] = list(parameters)
    return {"summary": summary, "responses": responses, "openapi_extra": extra}


def reading(
    summary: str, answer: Schema, *more: int, parameters: tuple[Schema, ...] = ()
) -> dict[str, Any]:
    """Return the documentation of a route without a body: `operation` with fewer refusals."""
    return operation(summary, answer, errors=(*_ALWAYS, 503, *more), parameters=parameters)


def path_id(description: str) -> Schema:
    """Return the parameter `id` of a path."""
    schema = {"type": "string"}
    return {
        "name": "id",
        "in": "path",
        "required": True,
        "description": description,
        "schema": schema,
    }


def opened(summary: str, answer: Schema, *errors: int) -> dict[str, Any]:
    """Return the documentation of a route that needs no key."""
    return operation(summary, answer, errors=errors)
