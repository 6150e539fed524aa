"""Models of open_clip and Hugging Face: the features of transformers itself, or a refusal.

open_clip's layout is written from the same weights by hand, in this file, in the direction opposite
to the code's.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from clip_ray.config import ModelConfig
from clip_ray.errors import RegistryError
from clip_ray.inference import Encoder
from clip_ray.registry import load_export, load_served, resolve, store_model
from clip_ray.registry.foreign import convert, is_foreign
from clip_ray.storage import open_store
from clip_ray.tokenizer import Tokenizer

CONTEXT, SIZE, EMBED = 12, 32, 16
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
TEXTS = ["a cat", "Two DOGS, isn't it?", "café 北京 42!", "", "one " * 30]
CAPTIONS = ["a cat and a dog", "two cats and two dogs", "one dog", "one cat isn't a dog"] * 2


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> dict[str, Any]:
    """Directories of random tiny models, by activation, as transformers saves them."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    trained = json.loads(Tokenizer.train(CAPTIONS, 530, CONTEXT).to_bytes())["tokenizer"]["model"]
    end = len(trained["vocab"]) + 1
    vocab = {**trained["vocab"], "<|startoftext|>": end - 1, "<|endoftext|>": end}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in trained["merges"]])
    # 88 / 24 has no exact quotient: the MLP's width must come back as it was.
    tower = {"hidden_size": 24, "intermediate_size": 88, "num_attention_heads": 2}
    found: dict[str, Any] = {"tokenizer": tokenizer, "vocab": vocab, "merges": trained["merges"]}
    for act in ("quick_gelu", "gelu"):
        own = {**tower, "hidden_act": act, "projection_dim": EMBED}
        config = CLIPConfig(
            projection_dim=EMBED,
            text_config={
                **own, "num_hidden_layers": 2, "vocab_size": end + 1, "eos_token_id": end,
                "bos_token_id": end - 1, "max_position_embeddings": CONTEXT,
            },
            vision_config={**own, "num_hidden_layers": 1, "image_size": SIZE, "patch_size": 8},
        )  # fmt: skip
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Fresh biases are 0 and gains 1: swapped, they would show nothing.
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
                elif "proj" in name or "fc" in name or "patch" in name:
                    parameter.mul_(10)  # so that every part of the model shows in the features
        folder = tmp_path_factory.mktemp(act)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        CLIPImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=MEAN, image_std=STD
        ).save_pretrained(folder)
        found[act] = (model, folder)
    return found


@pytest.fixture
def folder(hugging_face, tmp_path) -> Path:
    """A directory of one's own, to break."""
    return Path(shutil.copytree(hugging_face["quick_gelu"][1], tmp_path / "tiny"))


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a__b is key b of object a, and None deletes."""
    document = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        target = document
        for key in outer:
            target = target[key]
        target[last] = value
        if value is None:
            del target[last]
    path.write_text(json.dumps(document))


def expected(model: Any, tokenizer: Any, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return transformers' own image and text features, of unit length."""
    scaled = torch.from_numpy(pixels).double() / 255
    normal = (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    inputs = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    with torch.no_grad():
        image = model.get_image_features(normal.float()).pooler_output
        text = model.get_text_features(**inputs).pooler_output
    unit = torch.nn.functional.normalize
    return unit(image, dim=-1).numpy(), unit(text, dim=-1).numpy()


def random_pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 3, SIZE, SIZE), np.uint8)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_features_are_those_of_transformers(hugging_face, act):
    model, folder = hugging_face[act]
    encoder = Encoder.load(folder, device="cpu")
    image_NE, text_NE = expected(model, hugging_face["tokenizer"], random_pixels())
    assert np.abs(encoder.encode_pixels(random_pixels()) - image_NE).max() < 1e-5
    assert np.abs(encoder.encode_texts(TEXTS) - text_NE).max() < 1e-5
    assert encoder.model.logit_scale.item() == pytest.approx(model.logit_scale.item())
    assert (encoder.embed_dim, encoder.image_size, len(encoder.digest)) == (EMBED, SIZE, 64)


def test_the_comparison_tells_right_from_wrong(hugging_face):
    """Negative controls: another activation, and queries in the place of keys."""
    model, folder = hugging_face["quick_gelu"]
    image_NE, text_NE = expected(model, hugging_face["tokenizer"], random_pixels())

    def error(encoder: Encoder) -> tuple[float, float]:
        image = np.abs(encoder.encode_pixels(random_pixels()) - image_NE).max()
        return image, np.abs(encoder.encode_texts(TEXTS) - text_NE).max()

    gelu = Encoder.load(folder, device="cpu")
    for module in gelu.model.modules():
        if hasattr(module, "activation"):
            module.activation = torch.nn.functional.gelu
    assert min(error(gelu)) > 1e-4  # ten times the tolerance
    swapped = Encoder.load(folder, device="cpu")
    with torch.no_grad():
        for name, parameter in swapped.model.named_parameters():
            if "in_proj" in name:
                query, key, value = parameter.detach().clone().chunk(3)
                parameter.copy_(torch.cat([key, query, value]))
    assert min(error(swapped)) > 1e-4


def test_ids_are_those_of_transformers(hugging_face):
    encoder = Encoder.load(hugging_face["gelu"][1], device="cpu")
    ids_BL, _ = encoder.tokenizer(TEXTS)
    for row, text in zip(ids_BL, TEXTS, strict=True):
        theirs = hugging_face["tokenizer"](text, truncation=True, max_length=CONTEXT).input_ids
        assert row[: len(theirs)].tolist() == theirs


def test_an_image_file_is_prepared_as_by_their_processor(hugging_face, folder):
    from transformers import CLIPImageProcessorPil

    model, _ = hugging_face["quick_gelu"]
    y, x = np.mgrid[0:48, 0:64]
    picture = np.stack([4 * x, 5 * y, 2 * (x + y)], axis=-1).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    theirs = CLIPImageProcessorPil.from_pretrained(folder)(
        Image.fromarray(picture), return_tensors="pt"
    )
    with torch.no_grad():
        theirs_E = model.get_image_features(**theirs).pooler_output.numpy()[0]
    ours_E = Encoder.load(folder, device="cpu").encode_images([data.getvalue()])[0]
    # Pillow and torch round bicubic pixels differently, by one level.
    assert ours_E @ theirs_E / np.linalg.norm(theirs_E) > 0.999


def test_conversion_is_an_export_and_repeatable(hugging_face, tmp_path):
    source = open_store(hugging_face["gelu"][1])
    one, two = open_store(tmp_path / "1"), open_store(tmp_path / "2")
    digest = convert(source, one)
    assert convert(source, two) == digest
    model, _, info = load_export(one, digest)
    assert model.config.vision.layers == 1 and model.config.text.layers == 2
    assert model.visual.transformer.resblocks[0].mlp.c_fc.out_features == 88
    assert list(info.extra["source"]["sha256"]) == ["model.safetensors"]
    assert json.loads(one.read("preprocessing.json"))["mean"] == MEAN
    assert not is_foreign(one) and is_foreign(source)
    assert resolve(source.uri).digest == digest


def test_from_s3_into_a_model_store(folder, s3, tmp_path):
    source = open_store("s3://bucket/foreign/tiny", s3)
    for path in folder.iterdir():
        source.write(path.name, path.read_bytes())
    stored = store_model(source.uri, tmp_path, s3)
    assert stored.digest == convert(open_store(folder), open_store(tmp_path / "export"))
    assert (stored.name, stored.version, stored.run_id) == ("tiny", stored.digest[:12], None)
    encoder = Encoder(*load_served(stored, tmp_path, s3), device="cpu")
    own = Encoder.load(folder, device="cpu")
    assert np.array_equal(encoder.encode_texts(TEXTS), own.encode_texts(TEXTS))


def test_shards_and_half_precision(hugging_face, folder, tmp_path):
    model, _ = hugging_face["quick_gelu"]
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    image_NE, _ = expected(model, hugging_face["tokenizer"], random_pixels())
    pixels = random_pixels()
    whole = Encoder.load(folder, device="cpu")
    assert np.abs(whole.encode_pixels(pixels) - image_NE).max() < 1e-5
    for path in folder.glob("model-*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({k: v.half() for k, v in tensors.items()}, path)
    half = Encoder.load(folder, device="cpu")
    assert half.model.visual.proj.dtype == torch.float32
    assert (half.encode_pixels(pixels) * image_NE).sum(axis=1).min() > 0.999
    next(iter(folder.glob("model-*.safetensors"))).unlink()
    with pytest.raises(RegistryError, match="part 'model-.*' is not there"):
        Encoder.load(folder)
    edit(folder / "model.safetensors.index.json", weight_map={"a": "../model.safetensors"})
    with pytest.raises(RegistryError, match="is not there"):
        Encoder.load(folder)


def test_the_other_files_that_transformers_writes(hugging_face, folder):
    """processor_config.json of transformers 5, vocab.json with merges.txt of transformers 4."""
    digest = convert(open_store(folder), open_store(folder.parent / "a"))
    document = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": document}))
    assert convert(open_store(folder), open_store(folder.parent / "b")) == digest
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RegistryError, match="no tokenizer; add tokenizer.json, or vocab.json"):
        Encoder.load(folder)
    (folder / "vocab.json").write_text(json.dumps(hugging_face["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in hugging_face["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    ids_BL, _ = Encoder.load(folder, device="cpu").tokenizer(TEXTS)
    for row, text in zip(ids_BL, TEXTS, strict=True):
        theirs = hugging_face["tokenizer"](text, truncation=True, max_length=CONTEXT).input_ids
        assert row[: len(theirs)].tolist() == theirs
    swapped = {**hugging_face["vocab"], "a": hugging_face["vocab"]["b"]}
    swapped["b"] = hugging_face["vocab"]["a"]
    (folder / "vocab.json").write_text(json.dumps(swapped))
    with pytest.raises(RegistryError, match="numbers its tokens otherwise"):
        Encoder.load(folder)


def test_the_oldest_configurations(hugging_face, folder):
    """openai/clip-vit-*: eos_token_id 2, sizes in text_config_dict, int sizes of the processor."""
    digest = convert(open_store(folder), open_store(folder.parent / "a"))
    config = json.loads((folder / "config.json").read_text())
    text = {**config["text_config"], "eos_token_id": 2}
    edit(folder / "config.json", text_config={"hidden_size": 99}, text_config_dict=text)
    edit(
        folder / "preprocessor_config.json",
        size=SIZE, crop_size=SIZE, feature_extractor_type="CLIPFeatureExtractor",
        image_processor_type=None, do_rescale=None, rescale_factor=None,
    )  # fmt: skip
    assert convert(open_store(folder), open_store(folder.parent / "b")) == digest


HF, PRE = "config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (HF, {"model_type": "siglip"}, "model_type is 'siglip'"),
        (HF, {"quantization_config": {"bits": 4}}, "quantization_config is"),
        (HF, {"vision_config__hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        (HF, {"vision_config__hidden_act": "gelu"}, "hidden_act is 'quick_gelu'.*the vision"),
        (HF, {"text_config__layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06.*expected 1e-05"),
        (HF, {"vision_config__num_channels": 1}, "num_channels is 1"),
        (HF, {"vision_config__image_size": [32, 40]}, "image_size is"),
        (HF, {"vision_config__patch_size": 7}, "patch_size 7 does not divide"),
        (HF, {"vision_config__num_hidden_layers": 2}, "resblocks.1.* is missing.*and .* more"),
        (HF, {"vision_config__hidden_size": 26}, r"is \(24.* in place of \(26"),
        (HF, {"text_config__eos_token_id": 5}, "eos_token_id is 5, the tokenizer's end token"),
        (HF, {"text_config__vocab_size": 500}, "the tokenizer has .* ids, the model 500"),
        (PRE, {"do_center_crop": False}, "do_center_crop is False"),
        (PRE, {"do_resize": False}, "do_resize is False"),
        (PRE, {"resample": 2}, "resample is 2"),
        (PRE, {"size": {"height": 32, "width": 32}}, "size is .*expected the shortest edge"),
        (PRE, {"size": {"shortest_edge": 36}}, "size is .*expected the shortest edge"),
        (PRE, {"crop_size": {"height": 28, "width": 28}}, "crop_size is"),
        (PRE, {"rescale_factor": 1 / 127.5}, "rescale_factor is"),
        (PRE, {"image_std": [0, 1, 1]}, "image_std is .*positive"),
        (PRE, {"image_mean": [0.5]}, "image_mean is .*three numbers"),
        (PRE, {"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is 'Siglip"),
    ],
)
def test_what_our_model_does_not_do_is_refused(folder, file, changes, message):
    edit(folder / file, **changes)
    with pytest.raises(RegistryError, match=message):
        Encoder.load(folder, device="cpu")


def test_missing_and_pickled_files_are_refused(folder):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    with pytest.raises(RegistryError, match="model.safetensors.*copy the file again"):
        Encoder.load(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(RegistryError, match=r"pickled \(pytorch_model.bin\).*save_file"):
        Encoder.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(RegistryError, match="model.safetensors is missing"):
        Encoder.load(folder)
    weights.write_bytes(data)
    (folder / PRE).unlink()
    with pytest.raises(RegistryError, match="preprocessor_config.json is missing"):
        Encoder.load(folder)
    (folder / HF).write_text('{"model_type": ')
    assert not is_foreign(open_store(folder))


def test_a_tokenizer_that_gives_other_ids_is_refused(folder):
    path = folder / "tokenizer.json"
    good = path.read_text()
    document = json.loads(good)
    document["normalizer"] = None  # keeps upper case
    path.write_text(json.dumps(document))
    with pytest.raises(RegistryError, match="expected CLIP's: lower case"):
        Encoder.load(folder)
    document = json.loads(good)
    end = document["added_tokens"][-1]
    token = {**end, "id": end["id"] + 1, "content": "<extra>"}
    document["added_tokens"].append(token)
    path.write_text(json.dumps(document))
    with pytest.raises(RegistryError, match="expected the highest"):
        Encoder.load(folder)


# ---------------------------------------------------------------------- open_clip


def to_open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename transformers' tensors to OpenAI's names: string replacements, tower by tower."""
    found: dict[str, torch.Tensor] = {"logit_scale": tensors["logit_scale"]}
    for name, tensor in tensors.items():
        new = name
        for old, replacement in (
            ("text_model.final_layer_norm", "ln_final"),
            ("text_model.embeddings.token_embedding", "token_embedding"),
            ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
            ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
            ("vision_model.embeddings.patch_embedding", "visual.conv1"),
            ("vision_model.pre_layrnorm", "visual.ln_pre"),
            ("vision_model.post_layernorm", "visual.ln_post"),
            ("vision_model.encoder.layers", "visual.transformer.resblocks"),
            ("text_model.encoder.layers", "transformer.resblocks"),
            ("layer_norm", "ln_"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
        ):
            new = new.replace(old, replacement)
        if "_proj." in name and "self_attn" in name and "out_proj" not in name:
            continue
        found[new] = tensor
    found["visual.proj"] = found.pop("visual_projection.weight").T.contiguous()
    found["text_projection"] = found.pop("text_projection.weight").T.contiguous()
    for tower, prefix, layers in (("vision", "visual.", 1), ("text", "", 2)):
        for layer in range(layers):
            for kind in ("weight", "bias"):
                found[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(
                    [
                        tensors[f"{tower}_model.encoder.layers.{layer}.self_attn.{x}_proj.{kind}"]
                        for x in "qkv"
                    ]
                )
    return found


@pytest.fixture(params=["quick_gelu", "gelu"])
def open_clip(request, hugging_face, tmp_path) -> tuple[Any, Path]:
    model, source = hugging_face[request.param]
    folder = tmp_path / "open"
    folder.mkdir()
    shutil.copy(source / "tokenizer.json", folder)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    safetensors.torch.save_file(to_open_clip(tensors), folder / "open_clip_model.safetensors")
    tower = {"width": 24, "mlp_ratio": 88 / 24 + 1e-9}
    config = {
        "model_cfg": {
            "embed_dim": EMBED,
            "quick_gelu": request.param == "quick_gelu",
            "vision_cfg": {
                **tower, "image_size": SIZE, "patch_size": 8, "layers": 1, "head_width": 12,
                "patch_dropout": 0.5, "pool_type": "tok", "timm_model_name": None,
            },
            "text_cfg": {
                **tower, "context_length": CONTEXT, "layers": 2, "heads": 2,
                "vocab_size": len(hugging_face["vocab"]), "hf_tokenizer_name": "",
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic"},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model, folder


def test_open_clip_gives_the_same_features(open_clip, hugging_face):
    model, folder = open_clip
    encoder = Encoder.load(folder, device="cpu")
    image_NE, text_NE = expected(model, hugging_face["tokenizer"], random_pixels())
    assert np.abs(encoder.encode_pixels(random_pixels()) - image_NE).max() < 1e-5
    assert np.abs(encoder.encode_texts(TEXTS) - text_NE).max() < 1e-5
    assert encoder.info.extra["source"]["layout"] == "open_clip"


OC = {
    "model_cfg__vision_cfg__timm_model_name": "vit_so400m_patch14_siglip_224",
    "model_cfg__vision_cfg__layers": [3, 4, 6, 3],
    "model_cfg__vision_cfg__attentional_pool": "parallel",
    "model_cfg__vision_cfg__pool_type": "avg",
    "model_cfg__vision_cfg__no_ln_pre": True,
    "model_cfg__vision_cfg__ls_init_value": 1e-5,
    "model_cfg__vision_cfg__norm_kwargs": {"eps": 1e-6},
    "model_cfg__vision_cfg__act_kwargs": {"approximate": "tanh"},
    "model_cfg__vision_cfg__a_new_switch": True,
    "model_cfg__text_cfg__hf_model_name": "roberta-base",
    "model_cfg__text_cfg__hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
    "model_cfg__text_cfg__pool_type": "last",
    "model_cfg__text_cfg__no_causal_mask": True,
    "model_cfg__text_cfg__proj_bias": True,
    "model_cfg__custom_text": True,
    "model_cfg__init_logit_bias": -10,
    "model_cfg__multimodal_cfg": {"layers": 12},
    "preprocess_cfg__interpolation": "bilinear",
    "preprocess_cfg__resize_mode": "squash",
    "preprocess_cfg__size": 224,
}


@pytest.mark.parametrize("key", OC)
@pytest.mark.parametrize("open_clip", ["gelu"], indirect=True)
def test_open_clip_settings_are_refused_by_name(open_clip, key):
    edit(open_clip[1] / "open_clip_config.json", **{key: OC[key]})
    with pytest.raises(RegistryError, match=f"{key.split('__')[-1]} is "):
        Encoder.load(open_clip[1])


@pytest.mark.parametrize("open_clip", ["gelu"], indirect=True)
def test_open_clip_files_that_are_not_there(open_clip, hugging_face):
    _, folder = open_clip
    (folder / "tokenizer.json").rename(folder / "kept.json")
    with pytest.raises(RegistryError, match="no tokenizer.*of openai/clip-vit-base-patch32"):
        Encoder.load(folder)
    (folder / "kept.json").rename(folder / "tokenizer.json")
    weights = folder / "open_clip_model.safetensors"
    weights.rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(RegistryError, match=r"pickled \(open_clip_pytorch_model.bin\)"):
        Encoder.load(folder)
    # A hub directory may hold both layouts: then the one in safetensors is taken.
    for path in hugging_face["gelu"][1].iterdir():
        shutil.copy(path, folder)
    assert Encoder.load(folder, device="cpu").info.extra["source"]["layout"] == "huggingface"


def test_a_known_architecture_keeps_its_name():
    from clip_ray.registry.layouts import model_config

    known = ModelConfig(name="ViT-L-14-quickgelu")
    fields = known.model_dump(exclude={"name"})
    assert model_config("x", fields) == known
    assert model_config("x", {**fields, "embed_dim": 5}).embed_dim == 5
