"""The engine: the encoder's own answers, one version an answer, and swaps that cannot hurt."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from clip_ray.config.serving import AppSettings, Batching
from clip_ray.inference import Encoder
from clip_ray.registry import ServedModel, Target
from serve.engine import Engine
from serve.errors import ApiError
from serve.metrics import Metrics
from tests.serve.models import export, picture, replica_context

pytestmark = pytest.mark.usefixtures("context")


@pytest.fixture
def context() -> None:
    replica_context()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    folder = tmp_path_factory.mktemp("models")
    return [export(folder / str(seed), seed, f"{seed}") for seed in (1, 2, 3)]


async def started(tmp_path: Path, model: ServedModel, **settings: object) -> Engine:
    given = AppSettings.model_validate({"device": "cpu", **settings})
    engine = Engine(given, 2, Metrics(), tmp_path / "cache")
    await engine.start(target(model))
    return engine


def target(model: ServedModel, previous: ServedModel | None = None) -> dict[str, object]:
    return Target(**model.model_dump(), previous=previous).model_dump()


def offline(model: ServedModel) -> Encoder:
    return Encoder.load(model.uri, "cpu")


async def settled(engine: Engine) -> dict[str, object]:
    deadline = time.monotonic() + 20
    while engine.status()["state"] == "loading":
        assert time.monotonic() < deadline, engine.status()
        await asyncio.sleep(0.01)
    return engine.status()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1)


def test_features_are_the_encoders_own(tmp_path, models):
    async def run() -> None:
        engine = await started(tmp_path, models[0])
        loaded = engine.pick(None)
        images = [picture(i, kind) for i, kind in enumerate(["PNG", "JPEG", "WEBP", "GIF"] * 10)]
        texts = [f"a picture of thing {i} " * (i % 7) for i in range(40)]
        own = offline(models[0])
        for some in (images[:1], images[:3], images):
            params = [f"input[{i}]" for i in range(len(some))]
            features = await engine.embed_images(loaded, some, params)
            assert (cosines(features, own.encode_images(some)) > 0.99999).all()
        for few in (texts[:1], texts):
            features, tokens = await engine.embed_texts(loaded, few)
            assert (cosines(features, own.encode_texts(few)) > 0.99999).all()
        ids, _ = own.tokenizer(texts)
        assert tokens == (ids != 0).sum()
        engine.close()

    asyncio.run(run())


def test_a_request_is_answered_by_the_version_it_picked_while_models_are_swapped(tmp_path, models):
    answers: list[tuple[str, int, np.ndarray]] = []

    async def client(engine: Engine, stop: asyncio.Event) -> None:
        index = 0
        while not stop.is_set():
            loaded = engine.pick(None)
            features = await engine.embed_images(loaded, [picture(index % 8)], ["input"])
            answers.append((loaded.id, index % 8, features[0]))
            index += 1
            await asyncio.sleep(0)

    async def run() -> None:
        engine = await started(tmp_path, models[0])
        stop = asyncio.Event()
        clients = [asyncio.create_task(client(engine, stop)) for _ in range(4)]
        await asyncio.sleep(0.1)
        for new, old in ((models[1], models[0]), (models[2], models[1])):
            engine.retarget(target(new, old))
            assert (await settled(engine))["model"]["digest"] == new.digest
            await asyncio.sleep(0.1)
        stop.set()
        await asyncio.gather(*clients)
        # The one before the last stays answerable, by name.
        kept = engine.pick(models[1].id)
        again = await engine.embed_images(kept, [picture(0)], ["input"])
        assert cosines(again, offline(models[1]).encode_images([picture(0)])) > 0.99999
        with pytest.raises(ApiError, match="not loaded") as error:
            engine.pick(models[0].id)
        assert error.value.status == 409
        engine.close()

    asyncio.run(run())
    pictures = [picture(i) for i in range(8)]
    expected = {model.id: offline(model).encode_images(pictures) for model in models}
    assert {name for name, _, _ in answers} == set(expected)
    for name, index, feature in answers:
        assert feature @ expected[name][index] > 0.99999
        others = [expected[other][index] @ feature for other in expected if other != name]
        assert max(others) < 0.999  # the models do differ


@pytest.mark.parametrize("broken", ["bytes", "gone", "alias", "format", "nonsense", "nan"])
def test_a_bad_target_leaves_the_old_weights_and_says_so(tmp_path, models, broken):
    bad = target(models[1])
    folder = tmp_path / "bad"
    if broken in ("bytes", "gone"):
        shutil.copytree(models[1].uri, folder)
        (folder / "model.safetensors").unlink()
        if broken == "bytes":
            shutil.copy(Path(models[2].uri) / "model.safetensors", folder)
        bad["uri"] = str(folder)
    elif broken == "nan":
        bad = target(export(folder, 4, "4", scale=float("nan")))
    elif broken == "alias":
        bad["uri"] = "models:/clip@champion"
    elif broken == "format":
        bad["format"] = 2
    else:
        bad = ["what"]  # type: ignore[assignment]

    async def run() -> None:
        engine = await started(tmp_path, models[0])
        engine.retarget(bad)
        status = await settled(engine)
        assert status["state"] == "failed" and status["error"]
        assert engine.metrics.counts["target", "failed"] >= 1  # Prometheus hears of it, too
        assert status["model"] == models[0].model_dump()
        loaded = engine.pick(None)
        features, _ = await engine.embed_texts(loaded, ["still here"])
        assert cosines(features, offline(models[0]).encode_texts(["still here"])) > 0.99999
        engine.retarget(target(models[0]))  # the rollback
        assert (await settled(engine))["state"] == "ready"
        assert engine.pick(None).encoder is loaded.encoder  # the same digest loads nothing
        engine.retarget(target(models[2]))  # and the next one is not hindered
        assert (await settled(engine))["model"]["digest"] == models[2].digest
        engine.close()

    asyncio.run(run())


def test_the_newest_of_several_targets_wins(tmp_path, models):
    async def run() -> None:
        engine = await started(tmp_path, models[0])
        for model in (models[1], models[2], models[1], models[2]):
            engine.retarget(target(model))
            await asyncio.sleep(0)
        assert (await settled(engine))["model"]["digest"] == models[2].digest
        engine.close()

    asyncio.run(run())


def test_stored_classifiers_are_ready_before_a_model_is_swapped_in(tmp_path, models):
    seen = []

    async def run() -> None:
        engine = await started(tmp_path, models[0])
        await asyncio.sleep(0.05)  # the start's own last look

        async def prepare(loaded, keep):  # type: ignore[no-untyped-def]
            seen.append((loaded.id, engine.pick(None).id, keep))
            return 0

        engine.prepare = prepare
        engine.retarget(target(models[1], models[0]))
        await settled(engine)
        await asyncio.sleep(0.05)
        engine.close()

    asyncio.run(run())
    digests = frozenset({models[0].digest, models[1].digest})
    # Before the swap, and once more after it for what was stored meanwhile.
    assert seen == [(models[1].id, models[0].id, digests), (models[1].id, models[1].id, digests)]


def test_stored_classifiers_that_take_for_ever_hold_no_swap_up(tmp_path, models, monkeypatch):
    monkeypatch.setattr("serve.engine.PREPARE_S", 0.1)

    async def run() -> None:
        engine = await started(tmp_path, models[0])

        async def prepare(loaded, keep):  # type: ignore[no-untyped-def]
            await asyncio.sleep(3600)

        engine.prepare = prepare
        engine.retarget(target(models[1], models[0]))
        assert (await settled(engine))["model"]["digest"] == models[1].digest
        engine.close()

    asyncio.run(run())


def test_the_way_back_needs_no_store(tmp_path, models):
    """The previous model is in memory: a rollback must not depend on anything else."""
    copy = tmp_path / "copy"
    shutil.copytree(models[0].uri, copy)
    first = models[0].model_copy(update={"uri": str(copy)})

    async def run() -> None:
        engine = await started(tmp_path, first)
        encoder = engine.pick(None).encoder
        engine.retarget(target(models[1], first))
        await settled(engine)
        shutil.rmtree(copy)
        engine.retarget(target(first, models[1]))
        status = await settled(engine)
        assert status["state"] == "ready" and status["model"]["digest"] == first.digest
        assert engine.pick(None).encoder is encoder
        engine.close()

    asyncio.run(run())


def test_batches_fill_while_the_model_is_busy(tmp_path, models, monkeypatch):
    """32 callers, a pass of 20 ms however large: passes of one image would take 3 s."""

    async def run() -> None:
        engine = await started(tmp_path, models[0])
        loaded = engine.pick(None)
        encode_pixels = Encoder.encode_pixels

        def slow(self, pixels):  # type: ignore[no-untyped-def]
            time.sleep(0.02)
            return encode_pixels(self, pixels)

        monkeypatch.setattr(Encoder, "encode_pixels", slow)
        monkeypatch.setattr(engine.workers, "_pass_size", lambda *_: 16)
        passes = engine.metrics.counts["batch", "image"]

        async def caller(number: int) -> None:
            await asyncio.sleep(0.003 * number)  # never two within a batch's wait
            for _ in range(4):
                await engine.embed_images(loaded, [picture(number)], ["input"])

        await asyncio.gather(*(caller(number) for number in range(32)))
        assert engine.metrics.counts["batch", "image"] - passes < 32 * 4 / 4
        engine.close()

    asyncio.run(run())


def test_a_batch_that_is_cancelled_leaves_no_other_waiting(tmp_path, models, monkeypatch):
    """It has taken the items of others along; they get an error, and the queue goes on."""

    async def run() -> None:
        engine = await started(tmp_path, models[0])
        workers, encoder = engine.workers, engine.pick(None).encoder
        item = (encoder, encoder.preprocess(picture(0)), None)
        entered, own = asyncio.Event(), workers._shared_pass

        async def hang(kind, items):  # type: ignore[no-untyped-def]
            entered.set()
            await asyncio.sleep(3600)

        monkeypatch.setattr(workers, "_shared_pass", hang)
        async with workers._busy["image"]:  # both gather before the first of them takes all
            first = asyncio.create_task(workers._coalesced("image", [item]))
            second = asyncio.create_task(workers._coalesced("image", [item]))
            await asyncio.sleep(0)
        await asyncio.wait_for(entered.wait(), 10)
        monkeypatch.setattr(workers, "_shared_pass", own)
        first.cancel()
        (result,) = await asyncio.wait_for(second, 10)
        assert isinstance(result, RuntimeError)
        (feature,) = await asyncio.wait_for(workers._coalesced("image", [item]), 10)
        assert feature.shape == (encoder.embed_dim,)
        engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("same_node", [True, False])
def test_the_replicas_of_a_node_load_one_after_the_other(tmp_path, models, monkeypatch, same_node):
    seen: list[str] = []
    load = Engine._load

    async def slow(self, served):  # type: ignore[no-untyped-def]
        seen.append("begin")
        loaded = await load(self, served)
        await asyncio.sleep(0.5)  # time enough for the other, which looks every 0.2 s
        seen.append("end")
        return loaded

    monkeypatch.setattr(Engine, "_load", slow)

    async def run() -> None:
        nodes = [tmp_path, tmp_path if same_node else tmp_path / "other"]
        both = (started(node, model) for node, model in zip(nodes, models, strict=False))
        for engine in await asyncio.gather(*both):
            engine.close()

    asyncio.run(run())
    # Replicas of two nodes do not know of each other: the control.
    in_turn = ["begin", "end", "begin", "end"]
    assert seen == (in_turn if same_node else sorted(in_turn))


def test_a_replica_that_hangs_while_it_loads_holds_the_next_one_up_for_a_while_only(
    tmp_path, models, monkeypatch
):
    monkeypatch.setattr("serve.engine.LOAD_LOCK_S", 0.5)

    async def run() -> None:
        hung = await started(tmp_path, models[0])
        async with hung._turn():  # and it never comes to the end of it
            start = time.monotonic()
            engine = await asyncio.wait_for(started(tmp_path, models[1]), 20)
            assert time.monotonic() - start >= 0.5
        assert engine.pick(None).served == models[1]
        engine.close()
        hung.close()

    asyncio.run(run())


def test_a_previous_model_that_cannot_be_used_holds_nothing_up(tmp_path, models):
    broken = export(tmp_path / "nan", 4, "4", scale=float("nan"))

    async def run() -> None:
        engine = await started(tmp_path, models[0])
        engine.retarget(target(models[1], broken))
        status = await settled(engine)
        assert status["state"] == "ready" and status["previous"] is None
        assert status["model"] == models[1].model_dump()
        engine.close()

    asyncio.run(run())


def test_memory_is_reserved_for_pixels_and_given_back(tmp_path, models):
    async def run() -> None:
        engine = await started(tmp_path, models[0], limits={"memory_mb": 0.08})
        loaded = engine.pick(None)
        calls = [
            engine.embed_images(loaded, [picture(i) for i in range(4)], ["input"] * 4)
            for _ in range(6)
        ]
        await asyncio.gather(*calls)
        budget = engine._input_budget
        # Four images of 3 x 32 x 32 are more than the share: one request at a time.
        assert (budget.in_use, budget.peak) == (0, budget.total)
        engine.close()

    asyncio.run(run())


def test_a_bad_image_is_named_and_fails_no_neighbour(tmp_path, models):
    async def run() -> None:
        engine = await started(tmp_path, models[0], batching=Batching(wait_ms=50))
        loaded = engine.pick(None)
        good = engine.embed_images(loaded, [picture(1)], ["input"])
        bad = engine.embed_images(
            loaded, [picture(0), b"\xff\xd8\xff no image"], ["input[0]", "input[1]"]
        )
        features, error = await asyncio.gather(good, bad, return_exceptions=True)
        assert isinstance(error, ApiError)
        assert (error.status, error.param) == (422, "input[1]")
        own = offline(models[0]).encode_images([picture(1)])
        assert cosines(features, own) > 0.99999
        engine.close()

    asyncio.run(run())


def test_too_many_pixels_are_refused_on_the_header(tmp_path, models):
    async def run() -> None:
        engine = await started(tmp_path, models[0], limits={"image_mpx": 0.001})
        with pytest.raises(ApiError) as error:
            await engine.embed_images(engine.pick(None), [picture(0)], ["input"])
        assert (error.value.status, error.value.code) == (413, "too_many_pixels")
        assert engine.metrics.counts["stage", "decode"] == 0
        engine.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "status"),
    [("other", 404), ("clip/99", 409), ("clip@latest", 404), ("../etc", 404), ("x" * 9999, 404)],
)
def test_models_that_are_not_there(tmp_path, models, name, status):
    async def run() -> None:
        engine = await started(tmp_path, models[0])
        for fine in (None, "", "clip", "clip@champion", models[0].id):
            assert engine.pick(fine).served == models[0]
        with pytest.raises(ApiError) as error:
            engine.pick(name)
        assert error.value.status == status
        assert models[0].id in error.value.message and len(error.value.message) < 400
        engine.close()

    asyncio.run(run())


def test_bulk_text_work_lets_others_through_after_one_pass_each(tmp_path, models, monkeypatch):
    """The order of passes is asserted, not the time: each bulk pass is one of about PASS_S."""
    passes: list[tuple[str, int]] = []

    async def run() -> None:
        engine = await started(tmp_path, models[0])
        loaded = engine.pick(None)
        encode_ids, encode_pixels = Encoder.encode_ids, Encoder.encode_pixels

        def slow_ids(self, ids):  # type: ignore[no-untyped-def]
            passes.append(("text", len(ids)))
            time.sleep(0.002 * len(ids))
            return encode_ids(self, ids)

        def seen_pixels(self, pixels):  # type: ignore[no-untyped-def]
            passes.append(("image", len(pixels)))
            return encode_pixels(self, pixels)

        monkeypatch.setattr(Encoder, "encode_ids", slow_ids)
        monkeypatch.setattr(Encoder, "encode_pixels", seen_pixels)
        await engine.workers.warm_up(loaded.encoder)
        labels = [[f"thing {n} of {i}" for i in range(150)] for n in range(3)]
        bulk = [asyncio.create_task(engine.classifier(loaded, one, ["a {c}"])) for one in labels]
        await asyncio.sleep(0.1)
        del passes[:]
        for _ in range(4):
            before = len(passes)
            await engine.embed_images(loaded, [picture(0)], ["input"])
            kinds = [kind for kind, _ in passes[before:]]
            # One that runs already, and one that was queued before this.
            assert kinds.count("text") <= 2
        assert not all(task.done() for task in bulk)  # there was something to wait for
        await asyncio.gather(*bulk)
        engine.close()

    asyncio.run(run())
    assert max(size for kind, size in passes if kind == "text") <= 40


def test_passes_that_grow_on_the_way_lose_no_row(tmp_path, models, monkeypatch):
    sizes = iter([10, 10, 3, 40, 100])

    async def run() -> None:
        engine = await started(tmp_path, models[0])
        encoder = engine.pick(None).encoder
        ids, _ = encoder.tokenizer([f"thing {i}" for i in range(100)])
        monkeypatch.setattr(engine.workers, "_pass_size", lambda *_: next(sizes))
        features = await engine.workers.encode_ids(encoder, ids)
        assert (cosines(features, encoder.encode_ids(ids)) > 0.99999).all()
        engine.close()

    asyncio.run(run())
    assert list(sizes) == []


def test_classifiers_are_computed_once_and_are_the_evaluations(tmp_path, models):
    from clip_ray.eval.zero_shot import classifier

    async def run() -> None:
        engine = await started(tmp_path, models[0])
        loaded = engine.pick(None)
        labels, templates = [f"thing {i}" for i in range(70)], ["a {c}", "one {} there"]
        calls = [engine.classifier(loaded, labels, templates) for _ in range(5)]
        results = await asyncio.gather(*calls)
        matrix, cached = await engine.classifier(loaded, labels, templates)
        assert cached and not results[0][1]
        assert engine.metrics.counts["batch_items", "text"] < 2 * 140  # warm-up, and once
        expected = classifier(offline(models[0]), labels, templates)
        for found in (matrix, *(result for result, _ in results)):
            assert (cosines(found, expected) > 0.99999).all()
        engine.close()

    asyncio.run(run())


def test_texts_are_remembered_for_their_model_only(tmp_path, models):
    async def run() -> None:
        engine = await started(tmp_path, models[0])
        loaded = engine.pick(None)
        first, _ = await engine.embed_texts(loaded, ["a cat", "a dog"])
        passes = engine.metrics.counts["batch", "text"]
        again, _ = await engine.embed_texts(loaded, ["a dog", "a cat"])
        assert engine.metrics.counts["batch", "text"] == passes
        np.testing.assert_array_equal(again, first[::-1])
        engine.retarget(target(models[1], models[0]))
        await settled(engine)
        other, _ = await engine.embed_texts(engine.pick(None), ["a cat"])
        assert cosines(other, first[:1]) < 0.999
        engine.close()

    asyncio.run(run())
