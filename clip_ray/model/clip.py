"""CLIP: two towers and a logit scale, under OpenAI's parameter names.

Left out on purpose: the loss (it needs the global batch), autocast, torch.compile and devices,
which are the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from clip_ray.config import ModelConfig
from clip_ray.errors import ConfigError
from clip_ray.model.text import eot_features, init_text_tower
from clip_ray.model.transformer import Transformer
from clip_ray.model.vision import VisionTransformer

# openai/CLIP clip.py `_transform`: mean and standard deviation of RGB in [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class CLIP(nn.Module):
    """The model; `build` makes one.

    Args:
        config: the architecture, kept as `self.config`.
        mean: per channel, of RGB in [0, 1]; what uint8 pixels are normalised with.
        std: likewise.

    Attributes:
        logit_scale: the log of the factor on cosine similarities, a scalar parameter.
        logit_bias: added to the logits of the sigmoid loss, a scalar parameter, or None.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        config: ModelConfig,
        mean: tuple[float, float, float] = IMAGE_MEAN,
        std: tuple[float, float, float] = IMAGE_STD,
    ) -> None:
        super().__init__()
        self.config = config
        text = config.text
        self.visual = VisionTransformer(config.vision, config.embed_dim, config.quick_gelu)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.transformer = Transformer(
            text.width,
            text.layers,
            text.heads,
            text.mlp_ratio,
            causal=True,
            use_quick_gelu=config.quick_gelu,
        )
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        self.logit_bias: nn.Parameter | None = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(config.init_logit_bias))
        init_text_tower(
            self.token_embedding, self.positional_embedding, self.transformer, self.text_projection
        )
        # Constants, so no state dict holds them; real even under torch.device("meta"), because
        # load_state_dict(assign=True) could not fill them.
        for name, values in (("pixel_mean", mean), ("pixel_std", std)):
            constant = torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    def _normalized(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8:
            # Scaling the constants, not the pixels, saves one pass over the batch.
            pixels = (pixels.float() - 255 * self.pixel_mean) / (255 * self.pixel_std)
        assert pixels.is_floating_point(), f"pixels are {pixels.dtype}: uint8 or float expected"
        return pixels.to(self.visual.conv1.weight.dtype)

    def set_training(self, patch_dropout: float = 0.0, grad_checkpointing: bool = False) -> None:
        """Set what acts in training only.

        Args:
            patch_dropout: share of an image's patches left out (Li et al. 2023, FLIP).
            grad_checkpointing: compute activations again in the backward pass.
        """
        self.visual.patch_dropout = patch_dropout
        for transformer in (self.visual.transformer, self.transformer):
            transformer.grad_checkpointing = grad_checkpointing

    def freeze(self, towers: Iterable[Literal["image", "text"]]) -> None:
        """Keep the weights of towers, their projections included, as they are."""
        text = (self.token_embedding, self.transformer, self.ln_final)
        for tower in towers:
            modules: tuple[nn.Module, ...] = (self.visual,) if tower == "image" else text
            for module in modules:
                module.requires_grad_(False)
            if tower == "text":
                self.positional_embedding.requires_grad_(False)
                self.text_projection.requires_grad_(False)

    def image_tower_features(self, pixels: Tensor) -> Tensor:
        """Return the image tower's output before the projection, for linear probes.

        Args:
            pixels: as in `encode_image`.

        Returns:
            (B, vision width), not normalised.
        """
        return self.visual.features(self._normalized(pixels))

    def encode_image(self, pixels: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return image features.

        Args:
            pixels: (B, 3, S, S), uint8 RGB, or float already normalised with the mean and std.
            keys: (B,) int64, each row's randomness; needed in training with patch dropout.

        Returns:
            (B, E) float32 of unit length, under autocast too.
        """
        return F.normalize(self.visual(self._normalized(pixels), keys).float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return text features.

        Args:
            ids: (B, L) int32 or int64 token ids, one end-of-text token (the highest id) a row.

        Returns:
            (B, E) float32 of unit length, under autocast too.
        """
        text_BD = eot_features(
            ids, self.token_embedding, self.positional_embedding, self.transformer, self.ln_final
        )
        return F.normalize((text_BD @ self.text_projection).float(), dim=-1)

    def forward(
        self, pixels: Tensor, ids: Tensor, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (image_features, text_features), each (B, E) float32 of unit length."""
        return self.encode_image(pixels, keys), self.encode_text(ids)


def build(name_or_config: str | ModelConfig, seed: int | None = None) -> CLIP:
    """Return a freshly initialised model in training mode.

    Weights are drawn on the CPU whatever the default device is, so that one seed gives the same
    weights on every machine; the model is then moved to the default device. On the meta device
    nothing is drawn.

    Args:
        name_or_config: a name of the zoo, or a whole configuration.
        seed: of the weights; the global random state is then left as it was. None draws from the
            global random state.

    Raises:
        ConfigError: the name is not in the zoo.
    """
    if isinstance(name_or_config, ModelConfig):
        config = name_or_config
    else:
        try:
            config = ModelConfig(name=name_or_config)
        except ValidationError as error:
            raise ConfigError(f"model.name: {error.errors()[0]['msg']}") from None
    device = torch.get_default_device()
    if device.type == "meta":
        return CLIP(config)
    with torch.device("cpu"):
        if seed is None:
            return CLIP(config).to(device)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that seeds the accelerators too, which are not forked here.
            torch.default_generator.manual_seed(seed)
            model = CLIP(config)
    return model.to(device)
