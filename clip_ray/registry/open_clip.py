"""open_clip's hub layout: open_clip_config.json beside open_clip_model.safetensors.

Left out, and refused: ResNets, timm and Hugging Face towers, CoCa, SigLIP.
"""

from __future__ import annotations

from typing import Any

from clip_ray.registry.layouts import (
    OFF,
    OPEN_CLIP,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    Foreign,
    Settings,
    model_config,
    read_json,
)
from clip_ray.storage import Store

# Fields of open_clip's CLIPVisionCfg, CLIPTextCfg, CLIP and PreprocessCfg (model.py, transform.py):
# what it takes where a key is missing comes first.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "ls_init_value": (None,),
    "final_ln_after_pool": OFF,
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
    "block_type": (None, "default"),
}
_VISION = {
    **_PLAIN,
    "timm_model_name": (None, ""),
    "attentional_pool": OFF,
    "no_ln_pre": OFF,
    "global_average_pool": OFF,
    "input_patchnorm": OFF,
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
}
_TEXT = {
    **_PLAIN,
    "hf_model_name": (None, ""),
    "hf_tokenizer_name": (None, ""),
    "tokenizer_mode": (None, "", "clip"),
    "tokenizer_kwargs": (None, {}),
    "embed_cls": OFF,
    "no_causal_mask": OFF,
    "proj_bias": OFF,
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
}
_MODEL = {"custom_text": OFF, "init_logit_bias": (None,), "multimodal_cfg": (None,)}
_PIXELS: dict[str, tuple[Any, ...]] = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "random"),  # "random" is bicubic outside training
    "resize_mode": ("shortest",),
}
# Sizes, read below; and what acts in training only, or only beside a key that is refused.
_VISION_FREE = frozenset(
    "image_size patch_size width layers head_width mlp_ratio patch_dropout output_tokens "
    "attn_pooler_queries attn_pooler_heads timm_model_pretrained timm_pool timm_proj "
    "timm_proj_bias timm_drop timm_drop_path".split()
)
_TEXT_FREE = frozenset(
    "context_length vocab_size width layers heads mlp_ratio pad_id eos_id output_tokens "
    "hf_model_pretrained hf_proj_type hf_pooler_type".split()
)
_MODEL_FREE = frozenset(
    "embed_dim vision_cfg text_cfg quick_gelu init_logit_scale nonscalar_logit_scale".split()
)


def read_open_clip(store: Store) -> Foreign:
    """Return what open_clip_config.json says.

    Raises:
        RegistryError: a setting that our model cannot reproduce, or a broken file.
    """
    from clip_ray.model.clip import IMAGE_MEAN, IMAGE_STD

    document = Settings(f"{store.uri}/{OPEN_CLIP_CONFIG}", read_json(store, OPEN_CLIP_CONFIG))
    model = document.child("model_cfg")
    vision, text = model.child("vision_cfg"), model.child("text_cfg")
    for section, allowed, free in (
        (vision, _VISION, _VISION_FREE),
        (text, _TEXT, _TEXT_FREE),
        (model, _MODEL, _MODEL_FREE),
    ):
        section.only(allowed)
        section.nothing_else(free | allowed.keys())
    if isinstance(vision.values.get("layers"), list):
        raise vision.refuse("layers", "one number: a ViT, not a ResNet")
    width, head_width = vision.number("width", 768), vision.number("head_width", 64)
    config: dict[str, Any] = {
        "embed_dim": model.number("embed_dim"),
        "quick_gelu": model.values.get("quick_gelu") or False,
        "vision": {
            "image_size": vision.number("image_size", 224),
            "patch_size": vision.number("patch_size", 16),
            "width": width,
            "layers": vision.number("layers", 12),
            "heads": max(width // head_width, 1),
            "mlp_ratio": vision.values.get("mlp_ratio", 4.0),
        },
        "text": {
            "context_length": text.number("context_length", 77),
            "vocab_size": text.number("vocab_size", 49408),
            "width": text.number("width", 512),
            "layers": text.number("layers", 12),
            "heads": text.number("heads", 8),
            "mlp_ratio": text.values.get("mlp_ratio", 4.0),
        },
    }
    pixels = document.child("preprocess_cfg")
    pixels.only(_PIXELS)
    pixels.nothing_else(frozenset(_PIXELS.keys() | {"size", "mean", "std", "fill_color"}))
    size = config["vision"]["image_size"]
    if pixels.number("size", size) != size:
        raise pixels.refuse("size", f"the model's image_size {size}")
    return Foreign(
        layout=OPEN_CLIP,
        config=model_config(document.where, config),
        mean=pixels.rgb("mean", IMAGE_MEAN),
        std=pixels.rgb("std", IMAGE_STD),
        weights=OPEN_CLIP_WEIGHTS,
        rename=dict,  # the names are OpenAI's, as ours
    )
