"""CLIP ViTs of open_clip and Hugging Face, in safetensors, converted into an export.

Nothing is pickled or downloaded, and neither library is imported. A model is converted once, and
then is an export like any other: with a digest, and without the directory that it came from.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from clip_ray.errors import ConfigError, RegistryError
from clip_ray.registry.export import write_export
from clip_ray.registry.hugging_face import read_hugging_face
from clip_ray.registry.layouts import (
    HUGGING_FACE_CONFIG,
    HUGGING_FACE_WEIGHTS,
    OPEN_CLIP,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    Foreign,
    read_json,
)
from clip_ray.registry.open_clip import read_open_clip
from clip_ray.storage import Store

if TYPE_CHECKING:
    from torch import Tensor

    from clip_ray.tokenizer import Tokenizer

# No parameters: constants that older versions of both libraries wrote beside the weights.
_CONSTANTS = frozenset(
    {
        "text_model.embeddings.position_ids",
        "vision_model.embeddings.position_ids",
        "attn_mask",
        "input_resolution",
        "context_length",
        "vocab_size",
    }
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Upper case, digits, punctuation, another alphabet, an emoji: where tokenizers differ.
_PROBES = ("A photo of 2 CATS, isn't it?", "café naïve 北京 12,345", "👍 hello_world #tag", "")


def is_foreign(store: Store) -> bool:
    """Tell whether a directory is laid out as open_clip's or Hugging Face's models are."""
    if store.exists(OPEN_CLIP_CONFIG):
        return True
    if not store.exists(HUGGING_FACE_CONFIG):
        return False
    try:
        document = json.loads(store.read(HUGGING_FACE_CONFIG))
    except ValueError:
        return False
    return isinstance(document, dict) and "model_type" in document


def convert(store: Store, target_store: Store) -> str:
    """Write a foreign model as an export and return its digest.

    The same files give the same digest. Weights become fp32.

    Args:
        store: a directory for which `is_foreign` holds.
        target_store: the export's own directory.

    Raises:
        RegistryError: the model does something that ours does not, named; or a file is missing,
            damaged, or pickled.
    """
    import torch

    from clip_ray.model import CLIP

    foreign = _read_layout(store)
    tensors, sha256 = _read_weights(store, foreign.weights)
    tokenizer = _read_tokenizer(store, foreign)
    own = foreign.rename(tensors)
    if "logit_scale" in own and own["logit_scale"].numel() == 1:
        own["logit_scale"] = own["logit_scale"].reshape(())  # open_clip's nonscalar_logit_scale
    with torch.device("meta"):
        model = CLIP(foreign.config, foreign.mean, foreign.std)
    _check_tensors(store, own, model.state_dict())
    model.load_state_dict(own, assign=True)
    extra = {"source": {"layout": foreign.layout, "sha256": sha256}}
    return write_export(target_store, model, tokenizer, extra)


def _read_layout(store: Store) -> Foreign:
    """Return what the directory says of its model; a hub directory may hold both layouts."""
    here = set(store.files())
    hugging_face = {HUGGING_FACE_WEIGHTS, f"{HUGGING_FACE_WEIGHTS}.index.json"} & here
    if OPEN_CLIP_CONFIG in here and (OPEN_CLIP_WEIGHTS in here or not hugging_face):
        return read_open_clip(store)
    return read_hugging_face(store)


def _read_weights(store: Store, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a model's file or parts, and the sha256 of each file."""
    import safetensors
    import safetensors.torch

    names = [name]
    if not store.exists(name):
        index = f"{name}.index.json"
        if not store.exists(index):
            raise _no_weights(store, name)
        weight_map = read_json(store, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise RegistryError(f"{store.uri}/{index}: has no weight_map")
        names = sorted({str(part) for part in weight_map.values()})
    tensors: dict[str, Tensor] = {}
    sha256 = {}
    for part in names:
        # A part is a file beside the index: it must not lead out of the directory.
        if "/" in part or not part.endswith(".safetensors") or not store.exists(part):
            raise RegistryError(
                f"{store.uri}: the weights' part {part!r} is not there; copy the whole model"
            )
        data = store.read(part)
        sha256[part] = hashlib.sha256(data).hexdigest()
        try:
            tensors |= safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise RegistryError(f"{store.uri}/{part}: {error}; copy the file again") from error
    return {n: t for n, t in tensors.items() if n not in _CONSTANTS}, sha256


def _no_weights(store: Store, name: str) -> RegistryError:
    pickled = [file for file in store.files() if file.endswith(_PICKLED)]
    if not pickled:
        return RegistryError(f"{store.uri}: {name} is missing; copy the whole model")
    return RegistryError(
        f"{store.uri}: the weights are pickled ({pickled[0]}), and loading a pickle runs code from "
        f"it; expected {name}. Many models have that file too; else write it where you trust the "
        "source: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
        f"{name!r}), or CLIPModel.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
    )


def _check_tensors(store: Store, own: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    missing, strange = sorted(model.keys() - own.keys()), sorted(own.keys() - model.keys())
    wrong = [
        f"{name} is {tuple(tensor.shape)} in place of {tuple(model[name].shape)}"
        for name, tensor in own.items()
        if name in model and tensor.shape != model[name].shape
    ]
    found = (
        [f"{name} is missing" for name in missing] + wrong + [f"{n} is unknown" for n in strange]
    )
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise RegistryError(
            f"{store.uri}: the weights are not those of the configured CLIP ViT: "
            f"{', '.join(found[:3])}{more}; names are OpenAI's"
        )


def _read_tokenizer(store: Store, foreign: Foreign) -> Tokenizer:
    try:
        tokenizer = _tokenizer_of(store, foreign)
    except ConfigError as error:
        raise RegistryError(f"{store.uri}: the tokenizer cannot be used: {error}") from error
    limit = foreign.config.text.vocab_size
    if tokenizer.vocab_size > limit:
        raise RegistryError(
            f"{store.uri}: the tokenizer has {tokenizer.vocab_size} ids, the model {limit}; the "
            "files are of different models"
        )
    if foreign.end_id is not None and foreign.end_id != tokenizer.end_id:
        raise RegistryError(
            f"{store.uri}: eos_token_id is {foreign.end_id}, the tokenizer's end token has id "
            f"{tokenizer.end_id}; the files are of different models"
        )
    return tokenizer


def _tokenizer_of(store: Store, foreign: Foreign) -> Tokenizer:
    from clip_ray.tokenizer import Tokenizer

    context_length = foreign.config.text.context_length
    with tempfile.TemporaryDirectory(prefix="clip-ray-tokenizer-") as folder:
        if store.exists("tokenizer.json"):
            path = Path(folder) / "tokenizer.json"
            store.download("tokenizer.json", path)
            tokenizer = Tokenizer.from_file(path, context_length)
            _check_ids(store, path.read_text("utf-8"), tokenizer)
            return tokenizer
        if store.exists("vocab.json") and store.exists("merges.txt"):
            path = Path(folder) / "merges.txt"
            store.download("merges.txt", path)
            tokenizer = Tokenizer.from_file(path, context_length)
            _check_vocabulary(store, tokenizer)
            return tokenizer
    source = "openai/clip-vit-base-patch32" if foreign.layout == OPEN_CLIP else "its source"
    raise RegistryError(
        f"{store.uri}: no tokenizer; add tokenizer.json, or vocab.json and merges.txt, of {source}"
    )


def _check_ids(store: Store, text: str, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer.json that, used by its own library, gives other ids than ours."""
    from tokenizers import Tokenizer as Engine

    engine = Engine.from_str(text)
    engine.no_truncation()
    engine.no_padding()
    for probe in _PROBES:
        theirs = engine.encode(probe).ids[: tokenizer.context_length - 1]
        row = tokenizer([probe])[0][0]
        if theirs != row[: len(theirs)].tolist():
            raise RegistryError(
                f"{store.uri}/tokenizer.json: gives {probe!r} the ids {theirs[:8]}, CLIP-Ray gives "
                f"{row[: len(theirs)].tolist()[:8]}; expected CLIP's: lower case, a start and an "
                "end token"
            )


def _check_vocabulary(store: Store, tokenizer: Tokenizer) -> None:
    """Refuse a vocab.json with other ids than its merges give in OpenAI's layout."""
    from clip_ray.tokenizer import SPECIAL_TOKENS

    own = json.loads(tokenizer.to_bytes())["tokenizer"]["model"]["vocab"]
    theirs = read_json(store, "vocab.json")
    ends = [theirs.pop(token, None) for token in SPECIAL_TOKENS[1]]
    if theirs != own or ends != [tokenizer.start_id, tokenizer.end_id]:
        raise RegistryError(
            f"{store.uri}/vocab.json: numbers its tokens otherwise than OpenAI's layout (bytes, "
            "bytes that end a word, merges, start, end); add the model's tokenizer.json"
        )
