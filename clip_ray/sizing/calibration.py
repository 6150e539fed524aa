"""How fast a GPU trains: one rule, fitted to the published runs of other systems.

A run's speed is what it executes (`executed_flops`, recomputation counted) over a rate. What
share of its peak a GPU reaches differs by a factor of 4 among these runs; two things explain
nearly all of it. The rate is proportional to the bandwidth of the GPU's memory, not to its peak
(A100 to H100: 1.6 times the bandwidth, 3.2 times the peak, 1.6 times the speed), and larger models
reach more of it:

    rate = RATE * bandwidth * (forward GFLOP of a pair / 100) ** GROWTH

The two numbers are the least-squares fit, in logarithms, to the runs marked `fitted`; a test fits
them anew. All of those lie within a factor of SPREAD of the rule. They hold what they held: other
people's code (AMP without FlashAttention for the most part, the data and network of their
clusters). No run of CLIP-Ray on a GPU is among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from clip_ray.config import ModelConfig
from clip_ray.sizing.counts import Pair, ResNet, Tower, count
from clip_ray.sizing.gpus import GPUS, Gpu

RATE = 33.1  # operations for each byte that the memory could have moved, for 100 GFLOP a pair
GROWTH = 0.24
SPREAD = 1.3
CEILING = 0.4  # of the peak: the highest of the published runs reached 0.39
FP32_CEILING = 0.7  # of the fp32 peak: plain matrix products; an assumption


def executed_flops(
    pair: Pair,
    *,
    grad_checkpointing: bool = False,
    two_passes: bool = False,
    freeze: tuple[str, ...] = (),
) -> int:
    """Return the operations that one pair costs in a step, recomputation included.

    Args:
        pair: the architecture, as it is trained.
        grad_checkpointing: the blocks are computed again in the backward pass.
        two_passes: GradCache: features of all micro-batches first, then each again with a graph.
        freeze: towers that do not learn: forward only.
    """
    total = 0
    for name, tower in (("image", pair.image), ("text", pair.text)):
        if name in freeze:
            total += tower.forward_flops
        else:
            total += tower.training_flops + (tower.block_flops if grad_checkpointing else 0)
        total += tower.forward_flops if two_passes else 0
    return total


def rate(gpu: Gpu, forward_flops: int, precision: str) -> float:
    """Return the operations/s that a GPU executes of a model.

    Args:
        gpu: the type.
        forward_flops: of one pair.
        precision: bf16, fp16 (of published runs alone) or fp32, which moves twice the bytes; a
            type without bf16 is reckoned as in fp32.
    """
    usual = RATE * gpu.bandwidth * (forward_flops / 1e11) ** GROWTH
    peak = {"bf16": gpu.bf16, "fp16": gpu.fp16}.get(precision)
    if peak is None:
        return min(usual / 2, FP32_CEILING * gpu.fp32)
    return min(usual, CEILING * peak)


@dataclass(frozen=True)
class Anchor:
    """A published run.

    Attributes:
        system: whose, and of which model.
        pair: the architecture.
        gpu: name of the GPU type.
        gpus: how many.
        rows: samples of one GPU in a step; 0: not published.
        samples_per_s: of one GPU.
        grad_checkpointing: blocks were computed again.
        two_passes: batches were accumulated, with a second forward pass.
        why_not: why it is not fitted; "" = it is.
    """

    system: str
    pair: Pair
    gpu: str
    gpus: int
    rows: int
    samples_per_s: float
    grad_checkpointing: bool = False
    two_passes: bool = False
    why_not: str = ""

    @property
    def fitted(self) -> bool:
        """Tell whether the rule was fitted to it."""
        return not self.why_not

    @property
    def flops(self) -> int:
        """Operations executed for one pair."""
        return executed_flops(
            self.pair, grad_checkpointing=self.grad_checkpointing, two_passes=self.two_passes
        )

    @property
    def utilization(self) -> float:
        """Share of the GPU's 16-bit peak that it reached."""
        return self.flops * self.samples_per_s / GPUS[self.gpu].fp16

    @property
    def predicted(self) -> float:
        """Samples/s of one GPU by the rule."""
        gpu = GPUS[self.gpu]
        return rate(gpu, self.pair.forward_flops, "fp16") / self.flops


def _clip(embed_dim: int, vision: dict[str, float], text: dict[str, int]) -> ModelConfig:
    return ModelConfig.model_validate({"embed_dim": embed_dim, "vision": vision, "text": text})


# Sizes of the large ones: open_clip, src/open_clip/model_configs.
_LARGE_TEXT = {"width": 1024, "layers": 24, "heads": 16}
MODELS = {
    **{name: ModelConfig(name=name) for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14")},
    "ViT-H-14": _clip(
        1024, {"patch_size": 14, "width": 1280, "layers": 32, "heads": 16}, _LARGE_TEXT
    ),
    "ViT-g-14": _clip(
        1024,
        {"patch_size": 14, "width": 1408, "layers": 40, "heads": 16, "mlp_ratio": 4.3637},
        _LARGE_TEXT,
    ),
    "ViT-bigG-14": _clip(
        1280,
        {"patch_size": 14, "width": 1664, "layers": 48, "heads": 16, "mlp_ratio": 4.9231},
        {"width": 1280, "layers": 32, "heads": 20},
    ),
}


def _resnet_pair() -> Pair:
    """Return RN50x64 with its text tower; the blocks' sizes are not a transformer's."""
    parameters, flops = ResNet((3, 15, 36, 10), 128, 448, 1024).parameters_and_flops()
    image = Tower(parameters, 0, 0, flops, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    text = count(_clip(1024, {}, {"width": 1024, "layers": 12, "heads": 16})).text
    return Pair(image, text, 1, quick_gelu=True)


def anchors() -> Iterator[Anchor]:
    """Yield the published runs.

    Sources: S, the table of runs of the scaling-laws paper (Cherti et al. 2022, Hugging Face
    mehdidc/test); P, open_clip docs/PRETRAINED.md (32 passes of LAION-400M in the hours given
    there); L, LAION's posts "large-openclip" and "giant-openclip"; N, NVIDIA's NeMo performance
    page of CLIP; R, Radford et al. 2021, section 2.5 (days of 12.8e9 samples).
    """
    b32, b16, l14, h14, g14, big = (count(config) for config in MODELS.values())
    half = count(MODELS["ViT-bigG-14"], patch_dropout=0.5)
    yield Anchor("open_clip B/32 (S)", b32, "A100-40", 128, 256, 850)
    yield Anchor("open_clip B/32, 2B (S)", b32, "A100-40", 128, 256, 729)
    yield Anchor("open_clip B/32 (S)", b32, "A100-40", 344, 256, 634)
    yield Anchor("open_clip B/32 (P)", b32, "A100-40", 128, 256, 786)
    yield Anchor("open_clip B/16 (S)", b16, "A100-40", 344, 256, 393)
    yield Anchor("open_clip B/16, 2B (S)", b16, "A100-40", 176, 256, 310)
    yield Anchor("open_clip B/16 (P)", b16, "A100-40", 176, 192, 337)
    # That these three checkpointed is inferred: 84 samples without, with the attention's matrices
    # that AMP kept in float32 and 16 bits then, take more than 40 GB.
    yield Anchor("open_clip L/14 (S)", l14, "A100-40", 768, 112, 78.6, True)
    yield Anchor("open_clip L/14 (S)", l14, "A100-40", 1024, 84, 77.3, True)
    yield Anchor("open_clip L/14, 2B (S)", l14, "A100-40", 1024, 84, 66.3, True)
    yield Anchor("open_clip L/14 (P)", l14, "A100-40", 400, 96, 71, True)
    yield Anchor("open_clip H/14 (L)", h14, "A100-40", 824, 96, 42, True)
    yield Anchor("open_clip g/14 (L)", g14, "A100-40", 800, 80, 31, True)
    yield Anchor("open_clip bigG/14, patches halved (L)", half, "A100-80", 512, 313, 46.9, True)
    yield Anchor("open_clip bigG/14, patches halved (L)", half, "A100-80", 760, 211, 43.4, True)
    yield Anchor("open_clip bigG/14, accumulated (L)", big, "A100-80", 512, 0, 20.4, True, True)
    yield Anchor("NeMo g/14 (N)", g14, "A100-80", 8, 0, 69.9)
    yield Anchor("NeMo g/14 (N)", g14, "A100-80", 128, 0, 67.4)
    yield Anchor("NeMo g/14 (N)", g14, "H100", 8, 0, 116.9)
    yield Anchor("NeMo g/14 (N)", g14, "H100", 128, 0, 108.0)
    yield Anchor("OpenAI L/14 (R)", l14, "V100", 256, 128, 48.2, True)
    yield Anchor("open_clip B/16 (a log)", b16, "V100", 8, 0, 226)
    yield Anchor(
        "open_clip B/32, 672 a GPU (S)", b32, "A100-40", 128, 672, 412, why_not="not explained"
    )
    yield Anchor(
        "open_clip B/32, 96 a GPU (L)", b32, "A100-40", 824, 96, 228, why_not="steps too short"
    )
    yield Anchor(
        "open_clip H/14, fp16 (L)",
        h14,
        "A100-40",
        824,
        96,
        30,
        True,
        why_not="fp16; in bf16 it is above",
    )
    yield Anchor(
        "open_clip g/14, fp16 (L)",
        g14,
        "A100-40",
        800,
        40,
        20,
        True,
        why_not="fp16; in bf16 it is above",
    )
    yield Anchor(
        "OpenAI RN50x64 (R)", _resnet_pair(), "V100", 592, 55, 13.9, True,
        why_not="a ResNet, slower for its operations",
    )  # fmt: skip


def fit(runs: list[Anchor]) -> tuple[float, float]:
    """Return (RATE, GROWTH) of the least squares in logarithms."""
    x = [math.log(run.pair.forward_flops / 1e11) for run in runs]
    y = [math.log(run.flops * run.samples_per_s / GPUS[run.gpu].bandwidth) for run in runs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    growth = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )
    return math.exp(mean_y - growth * mean_x), growth
