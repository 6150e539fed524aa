"""Hugging Face's layout of a CLIPModel: config.json beside model.safetensors.

The names and defaults are those of transformers' configuration_clip.py and modeling_clip.py.
Left out, and refused: quantised weights, and every other class of model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clip_ray.errors import RegistryError
from clip_ray.registry.layouts import (
    HUGGING_FACE,
    HUGGING_FACE_CONFIG,
    HUGGING_FACE_WEIGHTS,
    OFF,
    Foreign,
    Rgb,
    Settings,
    model_config,
    read_json,
)
from clip_ray.storage import Store

if TYPE_CHECKING:
    from torch import Tensor

# Defaults of transformers' CLIPVisionConfig and CLIPTextConfig: older files leave them out.
_TOWER: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VISION_DEFAULTS: dict[str, Any] = {
    **_TOWER,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
_TEXT_DEFAULTS: dict[str, Any] = {
    **_TOWER,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "eos_token_id": 49407,
}
_PROCESSOR: dict[str, tuple[Any, ...]] = {
    "do_resize": (True,),
    "do_center_crop": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_pad": OFF,
    "use_square_size": OFF,
    "resample": (3, None),  # Pillow's BICUBIC
}
_PROCESSOR_TYPE = re.compile(r"CLIP(FeatureExtractor|ImageProcessor(Fast|Pil)?)")


def read_hugging_face(store: Store) -> Foreign:
    """Return what config.json and the preprocessor's file say.

    Raises:
        RegistryError: a setting that our model cannot reproduce, or a broken file.
    """
    where = f"{store.uri}/{HUGGING_FACE_CONFIG}"
    document = Settings(where, read_json(store, HUGGING_FACE_CONFIG))
    document.only({"model_type": ("clip",), "quantization_config": (None,)})
    vision = _tower(document, "vision_config", _VISION_DEFAULTS)
    text = _tower(document, "text_config", _TEXT_DEFAULTS)
    vision.only({"num_channels": (3,)})
    if text.values["hidden_act"] != vision.values["hidden_act"]:
        raise text.refuse("hidden_act", f"the vision tower's {vision.values['hidden_act']!r}")
    size = vision.number("image_size")
    config: dict[str, Any] = {
        "embed_dim": document.number("projection_dim", 512),
        "quick_gelu": vision.values["hidden_act"] == "quick_gelu",
        "vision": {"image_size": size, "patch_size": vision.number("patch_size"), **_sizes(vision)},
        "text": {
            "context_length": text.number("max_position_embeddings"),
            "vocab_size": text.number("vocab_size"),
            **_sizes(text),
        },
    }
    mean, std = _processor(store, size)
    eos = text.values["eos_token_id"]
    return Foreign(
        layout=HUGGING_FACE,
        config=model_config(where, config),
        mean=mean,
        std=std,
        weights=HUGGING_FACE_WEIGHTS,
        rename=_rename,
        # transformers' modeling_clip.py: 2 stands in OpenAI's first conversions for "the highest".
        end_id=None if eos == 2 else text.number("eos_token_id"),
    )


def _tower(document: Settings, key: str, defaults: dict[str, Any]) -> Settings:
    # configuration_clip.py: where the older `_dict` is given, it is the whole answer.
    given = document.values.get(f"{key}_dict") or document.values.get(key) or {}
    section = Settings(f"{document.where}: {key}", {**defaults, **given})
    section.only({"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)})
    return section


def _sizes(section: Settings) -> dict[str, Any]:
    width, hidden = section.number("hidden_size"), section.number("intermediate_size")
    ratio = hidden / width
    if int(width * ratio) < hidden:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return {
        "width": width,
        "layers": section.number("num_hidden_layers"),
        "heads": section.number("num_attention_heads"),
        "mlp_ratio": ratio,
    }


def _processor(store: Store, size: int) -> tuple[Rgb, Rgb]:
    from clip_ray.model.clip import IMAGE_MEAN, IMAGE_STD

    if store.exists("preprocessor_config.json"):
        where = f"{store.uri}/preprocessor_config.json"
        section = Settings(where, read_json(store, "preprocessor_config.json"))
    elif store.exists("processor_config.json"):  # CLIPProcessor of transformers 5
        where = f"{store.uri}/processor_config.json"
        section = Settings(where, read_json(store, "processor_config.json")).child(
            "image_processor"
        )
    else:
        raise RegistryError(
            f"{store.uri}: preprocessor_config.json is missing; copy it from where the model comes "
            "from, or save the model's CLIPImageProcessor there (save_pretrained)"
        )
    section.only(_PROCESSOR)
    for key in ("image_processor_type", "feature_extractor_type"):
        if not _PROCESSOR_TYPE.fullmatch(str(section.values.get(key) or "CLIPImageProcessor")):
            raise section.refuse(key, "CLIPImageProcessor")
    if not math.isclose(section.values.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise section.refuse("rescale_factor", "1/255")
    edge = section.values.get("size", size)
    if isinstance(edge, dict) and edge.keys() == {"shortest_edge"}:
        edge = edge["shortest_edge"]
    if edge != size or type(edge) is not int:
        raise section.refuse("size", f"the shortest edge, of the model's image_size {size}")
    if section.number("crop_size", size) != size:
        raise section.refuse("crop_size", f"the model's image_size {size}")
    return section.rgb("image_mean", IMAGE_MEAN), section.rgb("image_std", IMAGE_STD)


_TOP = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # their spelling
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def _rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Hugging Face's tensors under OpenAI's names; unknown ones keep their name."""
    import torch

    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            # Their projections are nn.Linear, OpenAI's are matrices from the right.
            own = (
                tensor.T
                if name in ("visual_projection.weight", "text_projection.weight")
                else tensor
            )
            renamed[_TOP.get(name, name)] = own
            continue
        tower, layer, part, kind = match.groups()
        prefix = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{layer}"
        if part in _BLOCK:
            renamed[f"{prefix}.{_BLOCK[part]}.{kind}"] = tensor
        elif part == "self_attn.q_proj":
            parts = [tensors.get(name.replace("q_proj", x)) for x in ("q_proj", "k_proj", "v_proj")]
            if all(x is not None for x in parts):
                renamed[f"{prefix}.attn.in_proj_{kind}"] = torch.cat(parts)  # type: ignore[arg-type]
        elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
            renamed[name] = tensor
    return renamed
