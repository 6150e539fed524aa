"""Named architectures, as plain data.

The ViT-B and ViT-L entries are named as in open_clip and have the sizes of Radford et al. 2021,
table 20; the tiny ones are ours, for CPUs and tests. Sizes that a field's default already states
are not repeated.
"""

from __future__ import annotations

import difflib
from typing import Any

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT-B-32": {},
    "ViT-B-16": {"vision": {"patch_size": 16}},
    "ViT-L-14": {
        "embed_dim": 768,
        "vision": {"patch_size": 14, "width": 1024, "layers": 24, "heads": 16},
        "text": {"width": 768, "heads": 12},
    },
    "ViT-L-14-336": {
        "embed_dim": 768,
        "vision": {"image_size": 336, "patch_size": 14, "width": 1024, "layers": 24, "heads": 16},
        "text": {"width": 768, "heads": 12},
    },
    "ViT-tiny-8-64": {
        "embed_dim": 128,
        "vision": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 3, "heads": 3},
        "text": {"context_length": 24, "width": 128, "layers": 2, "heads": 4},
    },
    "ViT-micro-8-32": {
        "embed_dim": 32,
        "vision": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2},
        "text": {"context_length": 16, "width": 32, "layers": 1, "heads": 2},
    },
}
# OpenAI's released weights were trained with QuickGELU; open_clip marks those architectures so.
for _name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"):
    ARCHITECTURES[f"{_name}-quickgelu"] = {**ARCHITECTURES[_name], "quick_gelu": True}


def fill(given: dict[str, Any]) -> dict[str, Any]:
    """Return `given` completed with the fields of the architecture that `given["name"]` names.

    Fields in `given` win, also inside `vision` and `text`.

    Raises:
        ValueError: the name is not in the zoo; the message lists the nearest names.
    """
    name = given.get("name", "ViT-B-32")
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(str(name), ARCHITECTURES, n=3) or list(ARCHITECTURES)
        raise ValueError(f"no architecture is called {name!r}; nearest: {', '.join(near)}")
    merged: dict[str, Any] = {"name": name, **ARCHITECTURES[name], **given}
    for tower in ("vision", "text"):
        base, own = ARCHITECTURES[name].get(tower, {}), given.get(tower, {})
        if isinstance(own, dict):
            merged[tower] = {**base, **own}
    return merged
