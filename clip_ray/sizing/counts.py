"""What an architecture costs: parameters, operations and saved activations, by counting.

Operations are those of matrix products and convolutions, two a multiply-add, as the field counts
them; what is done element by element (norms, GELU, softmax) is left out of them, though it takes
time: the utilization of `calibration` holds it. Causal attention counts whole, as it is computed
by most kernels and counted by all papers.

Tests hold parameters and operations against torch's own count on our model and against open_clip's
table of 8 published models, and the activations against the tensors that autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clip_ray.config import ModelConfig, TextConfig, VisionConfig

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Tower:
    """One tower, for one sample.

    Attributes:
        parameters: numbers that are learned, the projection included.
        tensors: the tensors that hold them.
        stem_flops: of the map that reads the input; its backward needs the weights' half alone,
            because nothing learns from the pixels' gradient.
        block_flops: of the blocks, which gradient checkpointing computes again.
        head_flops: of the projection.
        tokens: positions of the residual stream.
        width: its channels.
        layers: blocks.
        heads: attention heads.
        hidden: channels inside the MLP.
        input_values: numbers that the stem keeps for its backward.
        dropout_bytes: kept for the backward of patch dropout: all patches in float32, and the index
            of each number that stays.
        extra_streams: residual streams kept beside the blocks': the first norm's input, and the
            last stream, which is kept whole though one position of it is read.
    """

    parameters: int
    tensors: int
    stem_flops: int
    block_flops: int
    head_flops: int
    tokens: int
    width: int
    layers: int
    heads: int
    hidden: int
    input_values: int
    dropout_bytes: int
    extra_streams: int

    @property
    def forward_flops(self) -> int:
        """Operations of one forward pass."""
        return self.stem_flops + self.block_flops + self.head_flops

    @property
    def training_flops(self) -> int:
        """Operations of a forward and a backward pass."""
        return 3 * self.forward_flops - self.stem_flops

    def block_bytes(self, precision: Precision, quick_gelu: bool) -> int:
        """Return the bytes that autograd keeps of one block.

        For each position and channel of width d, hidden width h: the inputs of both norms (the
        residual stream, always float32), the inputs of the four linear maps, query, key and
        value, and the GELU's input; the attention's log-sum-exp and the norms' statistics are
        float32. QuickGELU, which is two operations, keeps the sigmoid too.
        """
        size = 2 if precision == "bf16" else 4
        stream = 2 * 4 * self.width
        linear = (1 + 3 + 1 + 1) * self.width * size  # ln_1 out; q, k, v; mixed; ln_2 out
        mlp = (3 if quick_gelu else 2) * self.hidden * size
        statistics = 4 * self.heads + 2 * 2 * 4
        return self.tokens * (stream + linear + mlp + statistics)

    def working_bytes(self, precision: Precision) -> int:
        """Return the bytes of gradients that the backward of one block has at once, about.

        The streams' before and after it, and the hidden layer's before and after the GELU.
        """
        size = 2 if precision == "bf16" else 4
        return self.tokens * (2 * 4 * self.width + 2 * self.hidden * size)

    def saved_bytes(self, precision: Precision, quick_gelu: bool, grad_checkpointing: bool) -> int:
        """Return the bytes of activations that a sample keeps until its backward is done."""
        stream = 4 * self.tokens * self.width
        block = self.block_bytes(precision, quick_gelu)
        # With checkpointing each block's input is kept, and one block is computed anew at a time.
        blocks = self.layers * stream + block if grad_checkpointing else self.layers * block
        ends = self.input_values * (2 if precision == "bf16" else 4)
        return blocks + ends + self.dropout_bytes + self.extra_streams * stream


def image_tower(config: VisionConfig, embed_dim: int, patch_dropout: float = 0.0) -> Tower:
    """Count a Vision Transformer; `patch_dropout` is the share of patches left out in training."""
    patches = (config.image_size // config.patch_size) ** 2
    kept = max(1, round((1 - patch_dropout) * patches)) if patch_dropout else patches
    stem = 3 * config.patch_size**2 * config.width
    blocks = _blocks(kept + 1, config)
    # Class token, positions, ln_pre and ln_post.
    parameters = stem + (1 + patches + 1 + 2 * 2) * config.width
    return Tower(
        parameters=parameters + blocks.parameters + config.width * embed_dim,
        tensors=1 + 2 + 2 * 2 + 12 * config.layers + 1,
        stem_flops=2 * patches * stem,
        block_flops=blocks.flops,
        head_flops=2 * config.width * embed_dim,
        tokens=kept + 1,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        hidden=int(config.width * config.mlp_ratio),
        input_values=3 * config.image_size**2,
        dropout_bytes=(4 * patches + 8 * kept) * config.width if patch_dropout else 0,
        extra_streams=2,
    )


def text_tower(config: TextConfig, embed_dim: int) -> Tower:
    """Count the text transformer."""
    blocks = _blocks(config.context_length, config)
    tables = (config.vocab_size + config.context_length + 2) * config.width
    return Tower(
        parameters=tables + blocks.parameters + config.width * embed_dim,
        tensors=2 + 2 + 12 * config.layers + 1,
        stem_flops=0,  # a look-up
        block_flops=blocks.flops,
        head_flops=2 * config.width * embed_dim,
        tokens=config.context_length,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        hidden=int(config.width * config.mlp_ratio),
        input_values=0,
        dropout_bytes=0,
        extra_streams=0,
    )


@dataclass(frozen=True)
class _Blocks:
    parameters: int
    flops: int


def _blocks(tokens: int, config: VisionConfig | TextConfig) -> _Blocks:
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    maps = 4 * width**2 + 2 * width * hidden
    gains_and_biases = 2 * 2 * width + 3 * width + width + hidden + width
    attention = 2 * tokens**2 * width  # multiply-adds: with the keys, and with the values
    return _Blocks(
        config.layers * (maps + gains_and_biases),
        config.layers * 2 * (tokens * maps + attention),
    )


@dataclass(frozen=True)
class Pair:
    """Both towers and the loss's scalars.

    Attributes:
        image: the image tower.
        text: the text tower.
        scalars: parameters of the loss: logit scale, and logit bias where there is one.
        quick_gelu: QuickGELU in the place of the exact one.
    """

    image: Tower
    text: Tower
    scalars: int
    quick_gelu: bool

    @property
    def parameters(self) -> int:
        """Numbers that are learned."""
        return self.image.parameters + self.text.parameters + self.scalars

    @property
    def tensors(self) -> int:
        """Tensors that hold them."""
        return self.image.tensors + self.text.tensors + self.scalars

    @property
    def forward_flops(self) -> int:
        """Operations of a forward pass of one pair."""
        return self.image.forward_flops + self.text.forward_flops


def count(config: ModelConfig, patch_dropout: float = 0.0) -> Pair:
    """Count a CLIP, as it is trained."""
    return Pair(
        image=image_tower(config.vision, config.embed_dim, patch_dropout),
        text=text_tower(config.text, config.embed_dim),
        scalars=1 if config.init_logit_bias is None else 2,
        quick_gelu=config.quick_gelu,
    )


@dataclass(frozen=True)
class ResNet:
    """The image tower of the paper's ResNets (Radford et al. 2021, section 2.4), for its costs.

    A published run that `calibration` looks at trained one; CLIP-Ray does not.

    Attributes:
        layers: bottlenecks of the four stages.
        width: channels of the first.
        image_size: side in pixels.
        embed_dim: of the joint space.
    """

    layers: tuple[int, int, int, int]
    width: int
    image_size: int
    embed_dim: int

    def parameters_and_flops(self) -> tuple[int, int]:
        """Return the numbers that are learned, and the operations of one forward pass."""
        parameters = flops = 0

        def convolve(inputs: int, outputs: int, kernel: int, side: int) -> None:
            nonlocal parameters, flops
            weights = inputs * outputs * kernel**2
            parameters += weights + 2 * outputs  # with the batch norm's gain and bias
            flops += 2 * weights * side**2

        side = self.image_size // 2
        convolve(3, self.width // 2, 3, side)
        convolve(self.width // 2, self.width // 2, 3, side)
        convolve(self.width // 2, self.width, 3, side)
        side //= 2
        channels = self.width
        for stage, blocks in enumerate(self.layers):
            planes = self.width * 2**stage
            for block in range(blocks):
                convolve(channels, planes, 1, side)
                convolve(planes, planes, 3, side)  # strides are average pools after it
                if stage and not block:
                    side //= 2
                convolve(planes, 4 * planes, 1, side)
                if not block:
                    convolve(channels, 4 * planes, 1, side)  # the shortcut
                channels = 4 * planes
        positions = side**2 + 1
        # Attention pool: every position asks, though only the mean's answer is read (open_clip).
        parameters += positions * channels + 3 * (channels**2 + channels)
        parameters += channels * self.embed_dim + self.embed_dim
        flops += 2 * positions * channels * (3 * channels + self.embed_dim + 2 * positions)
        return parameters, flops
