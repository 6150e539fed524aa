"""OpenAI's own Python client against the app on a socket: answers and exceptions."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
import openai
import pytest

from clip_ray import keys
from clip_ray.inference import Encoder
from clip_ray.registry import ServedModel
from tests.serve.models import picture
from tests.serve.support import Site, data_uri, running

IMAGE = picture(0)


@pytest.fixture(scope="module")
def url(site: Site) -> str:
    return site.url or site.listen()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """Auth is off: any key will do, but the client wants one."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="anything", max_retries=0) as client:
        yield client


def same(embedding: list[float], row: np.ndarray) -> bool:
    return float(np.array(embedding, np.float32) @ row) > 0.99999


def test_a_text_as_the_client_asks_by_default(client: openai.OpenAI, encoder: Encoder) -> None:
    """Without encoding_format the client asks for base64 and decodes it."""
    answer = client.embeddings.create(model="clip", input="a cat")
    assert answer.model == "clip/7" and answer.usage.prompt_tokens == answer.usage.total_tokens > 2
    assert same(answer.data[0].embedding, encoder.encode_texts(["a cat"])[0])
    floats = client.embeddings.create(model="clip", input="a cat", encoding_format="float")
    assert np.array_equal(
        np.array(floats.data[0].embedding, np.float32),
        np.array(answer.data[0].embedding, np.float32),
    )


def test_a_list(client: openai.OpenAI, encoder: Encoder) -> None:
    texts = ["a cat", "a dog", "ein Kätzchen"]
    answer = client.embeddings.create(model="clip", input=texts)
    assert [row.index for row in answer.data] == [0, 1, 2]
    for row, expected in zip(answer.data, encoder.encode_texts(texts), strict=True):
        assert same(row.embedding, expected)


def test_images(client: openai.OpenAI, encoder: Encoder) -> None:
    expected = encoder.encode_images([IMAGE])[0]
    # The client's types know no images: `modality` makes them of strings, or pass objects.
    for given in (data_uri(IMAGE), base64.b64encode(IMAGE).decode()):
        answer = client.embeddings.create(
            model="clip/7", input=given, extra_body={"modality": "image"}
        )
        assert same(answer.data[0].embedding, expected)
    mixed = ["a cat", {"image": data_uri(IMAGE)}]
    answer = client.embeddings.create(model="clip", input=mixed)  # type: ignore[arg-type]
    assert same(answer.data[1].embedding, expected)


def test_other_options_of_the_client(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="clip", input="a", dimensions=16, user="me")
    assert len(answer.data[0].embedding) == 16


def test_what_the_answer_says_of_the_model(client: openai.OpenAI, served: ServedModel) -> None:
    raw = client.embeddings.with_raw_response.create(model="clip", input="a")
    assert raw.headers["x-clip-digest"] == served.digest
    assert raw.parse().model_extra["clip"]["digest"] == served.digest
    assert [model.id for model in client.models.list()] == ["clip/7"]
    assert client.models.retrieve("clip/7").owned_by == "clip-ray"


def test_bad_requests(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="clip", input=[[1, 2, 3]])
    assert caught.value.code == "token_ids" and caught.value.param == "input[0]"
    assert "check_embedding_ctx_length" in caught.value.message
    assert caught.value.request_id and len(caught.value.request_id) == 32
    with pytest.raises(openai.BadRequestError, match="dimensions 3"):
        client.embeddings.create(model="clip", input="a", dimensions=3)
    with pytest.raises(openai.BadRequestError, match="modality"):
        client.embeddings.create(model="clip", input=data_uri(IMAGE))
    with pytest.raises(openai.NotFoundError, match="clip/7"):
        client.embeddings.create(model="text-embedding-3-small", input="a")
    with pytest.raises(openai.ConflictError):
        client.embeddings.create(model="clip/8", input="a")
    broken = {"image": data_uri(IMAGE[:60])}
    with pytest.raises(openai.UnprocessableEntityError) as unusable:
        client.embeddings.create(model="clip", input=[broken])  # type: ignore[list-item]
    assert unusable.value.param == "input[0]"


def test_keys_and_rates(
    tmp_path_factory: pytest.TempPathFactory, served: ServedModel, encoder: Encoder
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    file = str(folder / "keys.json")
    key, _ = keys.create(file, "one", rate=0.01)
    settings = {"auth": "keys", "keys_file": file}
    with running(Site(folder, served, settings, keys=keys.KeyRing(file))) as site:
        url = f"{site.listen()}/v1"
        wrong = openai.OpenAI(base_url=url, api_key="cr-" + "0" * 32, max_retries=0)
        with pytest.raises(openai.AuthenticationError) as refused:
            wrong.embeddings.create(model="clip", input="a")
        assert refused.value.code == "invalid_key"
        right = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        answer = right.embeddings.create(model="clip", input="a")
        assert same(answer.data[0].embedding, encoder.encode_texts(["a"])[0])
        with pytest.raises(openai.RateLimitError) as limited:
            right.embeddings.create(model="clip", input="a")
        assert limited.value.code == "rate_limited"
        assert int(limited.value.response.headers["retry-after"]) > 80
        with pytest.raises(openai.PermissionDeniedError):
            right.put("/classifiers/x", body={"labels": ["a"]}, cast_to=object)
