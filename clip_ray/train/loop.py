"""The training loop: steps over batches, exact on any number of workers. It needs no Ray.

Everything that touches the outside (batches, journal, commits, the wish to stop) is passed in,
so the same loop runs under Ray Train, under torchrun and in a test.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clip_ray.config import Config
from clip_ray.contrastive import clip_loss, contrastive_step, siglip_loss
from clip_ray.data.blocks import Batch
from clip_ray.data.plan import sample_hash
from clip_ray.errors import TrainingError
from clip_ray.optim import clamp_logit_scale, learning_rate
from clip_ray.train.hooks import COMMITTED, PHASES, WORDS, Hooks, Outcome, Reason, Word
from clip_ray.train.inputs import Arrival, arrivals
from clip_ray.train.state import Progress, gathered_digests

_DIGEST_PIECES = 6
_PIECE_BITS = 11  # six 11-bit pieces hold 64 bits; their sums over 8,000 workers fit 24 bits
MIN_SEEN = 1000  # samples before the share of bad ones is judged


@dataclass
class Clock:
    """Splits a step's time into phases; on CUDA by events, which do not hold up the device.

    Attributes:
        device: where the model is.
        enters: told the phase that begins.
    """

    device: torch.device
    enters: Callable[[str], None] = lambda phase: None
    _marks: list[tuple[str, Any]] = field(default_factory=list)

    def start(self) -> None:
        """Begin a step."""
        self._marks = [("", self._now())]
        self.enters(PHASES[0])

    def mark(self, phase: str) -> None:
        """End a phase: the time since the last mark is its."""
        self._marks.append((phase, self._now()))
        following = PHASES.index(phase) + 1
        if following < len(PHASES):
            self.enters(PHASES[following])

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase of the step; on CUDA the device must have done it."""
        total = dict.fromkeys(PHASES, 0.0)
        if self.device.type == "cuda":
            self._marks[-1][1].synchronize()
        for (_, before), (phase, now) in zip(self._marks, self._marks[1:], strict=False):
            is_event = self.device.type == "cuda"
            total[phase] += before.elapsed_time(now) / 1000 if is_event else now - before
        return total


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    progress: Progress,
    *,
    config: Config,
    total_steps: int,
    samples_per_pass: int,
    device: torch.device,
    attempt: int,
    hooks: Hooks,
) -> Outcome:
    """Train from `progress` to `total_steps`, or until asked to stop.

    Called by every rank. All ranks take the same decisions at the same step: what they are taken
    from (loss, gradient norm, sums of counters) is equal on all.

    Args:
        model: a CLIP, or one in DistributedDataParallel; trained in place.
        optimizer: over the model's parameters; stepped in place.
        batches: this rank's batches, the first one for step `progress.step`.
        progress: counters at the start.
        config: the run's configuration.
        total_steps: the run's length.
        samples_per_pass: training samples of the data.
        device: where the model is.
        attempt: written into each journal row.
        hooks: the surroundings.

    Raises:
        TrainingError: `batches` ended early; or the ranks' weights differ at a commit.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    clock = Clock(device, lambda phase: hooks.entered(progress.step, phase))
    nonfinite_in_a_row, due = 0, False
    stepper = _Stepper(model, optimizer, config, total_steps, device, clock)
    incoming = arrivals(batches, progress.step, config, device)
    while progress.step < total_steps:
        begun = time.perf_counter()
        clock.start()
        arrival = next(incoming, None)
        if arrival is None:
            raise TrainingError(f"the data ended before step {progress.step} of {total_steps}")
        clock.mark("data_wait")
        due = due or (progress.step + 1) % config.checkpoint.every_steps == 0
        result = stepper.step(arrival, progress.step, hooks.asked(due))
        batch = arrival.batch
        if batch.bad:
            hooks.quarantine([{"step": progress.step, "attempt": attempt, **b} for b in batch.bad])
        progress = progress.after(
            step=progress.step + 1,
            bad=progress.bad + result.bad,
            truncated=progress.truncated + result.truncated,
            skipped=progress.skipped + (not result.finite),
            loss=result.loss if result.finite else progress.loss,
        )
        nonfinite_in_a_row = 0 if result.finite else nonfinite_in_a_row + 1
        reason = _reason_to_end(
            progress, result, nonfinite_in_a_row, config, total_steps, samples_per_pass
        )
        due = due or "commit" in result.asked
        if reason in COMMITTED and not result.finite and not _is_finite(model):
            reason = "nonfinite"  # the weights themselves are broken: the last commit is better
        # Amid steps that are not finite the weights may be what is wrong: a commit waits.
        if reason is None and due and result.finite and "busy" in result.asked:
            hooks.deferred(progress.step)
        elif reason in COMMITTED or (reason is None and due and result.finite):
            _refuse_divergence(model, progress.step)
            hooks.commit(progress)
            clock.mark("checkpoint")
            due = False
        phases = clock.seconds()
        hooks.timed(phases)
        if rank == 0:
            seconds = time.perf_counter() - begun
            hooks.record(
                _journal_row(result, progress, attempt, seconds, phases, config)
                | {"world_size": dist.get_world_size() if dist.is_initialized() else 1}
            )
        if reason is not None:
            return Outcome(reason, progress, "" if result.finite else result.where_broken)
    return Outcome("finished", progress)


def _refuse_divergence(model: nn.Module, step: int) -> None:
    """Raise where ranks hold different weights or buffers: nothing is committed then.

    Every rank's are the same bits, as all start from the same and take the same gradient; what
    differs is a fault of memory or of a device.
    """
    digests = gathered_digests(model)
    usual = max(digests, key=digests.count)
    agreed = digests.count(usual)
    if agreed == len(digests):
        return
    others = [str(rank) for rank, digest in enumerate(digests) if digest != usual]
    who = f"those of rank {', '.join(others)} are not the others'"
    if 2 * agreed <= len(digests):
        who = f"which of the {len(digests)} ranks is wrong cannot be told"
    raise TrainingError(
        f"step {step}: the ranks' weights differ ({who}); nothing is committed. This is a fault of "
        "memory or of a device, or the workers' hardware differs: find the node in the log, and "
        "leave it out if it happens again"
    )


def _is_finite(model: nn.Module) -> bool:
    """Tell whether the weights are numbers; equal on all ranks, as the weights are."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@dataclass(frozen=True)
class _Result:
    loss: float
    grad_norm: float
    logit_scale: float
    learning_rate: float
    finite: bool
    asked: frozenset[Word]
    bad: int
    truncated: int
    void: int
    broken_ranks: tuple[int, ...]
    samples_digest: int

    @property
    def where_broken(self) -> str:
        """Say which ranks had features that are not finite."""
        if self.broken_ranks:
            return f"the features of rank {', '.join(map(str, self.broken_ranks))}"
        return "the loss or the gradient, the features of all ranks being finite"


class _Stepper:
    """Runs single steps; holds what does not change from one to the next."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        total_steps: int,
        device: torch.device,
        clock: Clock,
    ) -> None:
        self._model, self._optimizer, self._config = model, optimizer, config
        self._total_steps, self._device, self._clock = total_steps, device, clock
        self._bare: Any = getattr(model, "module", model)
        self._broken = torch.zeros((), dtype=torch.bool)
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def step(self, arrival: Arrival, number: int, asked: Set[Word]) -> _Result:
        rate = learning_rate(number, self._total_steps, self._config.optim)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        inputs = arrival.inputs()
        riders = _riders(arrival.batch, asked).to(self._device)
        self._clock.mark("copy")
        self._optimizer.zero_grad(set_to_none=True)
        bf16 = self._config.train.precision == "bf16"
        with (
            torch.autocast(self._device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        ):
            loss = contrastive_step(
                self._model,
                inputs.micro_batches,
                lambda *features: self._loss(
                    *features, valid=inputs.valid, identities=inputs.identities, riders=riders
                ),
                mark=self._clock.mark,
            )
        grads = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        value, norm_value = loss.item(), norm.item()
        # Both are equal on all ranks: the loss is global, the gradients are averaged.
        finite = math.isfinite(value) and math.isfinite(norm_value)
        if finite:
            if self._config.optim.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    self._parameters, self._config.optim.clip_norm, norm
                )
            self._optimizer.step()
            clamp_logit_scale(self._bare.logit_scale)
        self._clock.mark("optimizer")
        words, sums = riders[: len(WORDS)].tolist(), riders[len(WORDS) :].long().tolist()
        return _Result(
            loss=value,
            grad_norm=norm_value,
            logit_scale=self._bare.logit_scale.exp().item(),
            learning_rate=rate,
            finite=finite,
            asked=frozenset(word for word, ranks in zip(WORDS, words, strict=True) if ranks),
            bad=sums[0],
            truncated=sums[1],
            void=sums[2],
            broken_ranks=() if finite else self._broken_ranks(),
            samples_digest=_join(sums[3:]),
        )

    def _loss(
        self,
        image: Tensor,
        text: Tensor,
        *scalars: Tensor,
        valid: Tensor,
        identities: Tensor | None,
        riders: Tensor,
    ) -> Tensor:
        with torch.no_grad():
            self._broken = ~(image.isfinite().all() & text.isfinite().all())
        function: Any = siglip_loss if self._config.train.loss == "siglip" else clip_loss
        value: Tensor = function(
            image,
            text,
            *scalars,
            valid,
            identities=identities,
            riders=riders,
            fused=self._config.train.compile,
        )
        return value

    def _broken_ranks(self) -> tuple[int, ...]:
        """Return the ranks whose features were not finite; all ranks call it at the same step."""
        flags = self._broken[None].to(torch.int32)
        if dist.is_initialized():
            mine, flags = flags, flags.new_empty(dist.get_world_size())
            dist.all_gather_into_tensor(flags, mine)
        return tuple(flags.nonzero()[:, 0].tolist())


def _riders(batch: Batch, asked: Set[Word]) -> Tensor:
    """Pack what all ranks must know of each other's batch: it rides on the loss's all-reduce."""
    present = batch.shard >= 0
    with np.errstate(over="ignore"):
        hashed = sample_hash(batch.shard[present], batch.place[present])
        digest = int(hashed.sum(dtype=np.uint64))
    pieces = [
        (digest >> (_PIECE_BITS * i)) & ((1 << _PIECE_BITS) - 1) for i in range(_DIGEST_PIECES)
    ]
    words = [int(word in asked) for word in WORDS]
    counts = [len(batch.bad), batch.truncated, int((~batch.valid).sum())]
    return torch.tensor([*words, *counts, *pieces], dtype=torch.float32)


def _join(pieces: list[int]) -> int:
    return sum(piece << (_PIECE_BITS * i) for i, piece in enumerate(pieces)) & ((1 << 64) - 1)


def _reason_to_end(
    progress: Progress,
    result: _Result,
    nonfinite_in_a_row: int,
    config: Config,
    total_steps: int,
    samples_per_pass: int,
) -> Reason | None:
    seen = progress.step * config.train.global_batch
    enough = seen >= min(MIN_SEEN, samples_per_pass)
    if enough and progress.bad > config.data.max_bad_fraction * seen:
        return "bad-data"
    if nonfinite_in_a_row >= config.train.max_nonfinite:
        return "nonfinite"
    if progress.step == total_steps:
        return "finished"
    if "stop" in result.asked:
        return "stopped"
    return "yielded" if "yield" in result.asked else None


def _number(value: float) -> float | None:
    """Return a number that JSON has: it knows no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _journal_row(
    result: _Result,
    progress: Progress,
    attempt: int,
    seconds: float,
    phases: dict[str, float],
    config: Config,
) -> dict[str, Any]:
    return {
        "step": progress.step,
        "attempt": attempt,
        "samples_digest": f"{result.samples_digest:016x}",
        "loss": _number(result.loss),
        "finite": result.finite,
        "logit_scale": result.logit_scale,
        "lr": result.learning_rate,
        "grad_norm": _number(result.grad_norm),
        "samples_per_s": config.train.global_batch / seconds,
        "step_s": seconds,
        "void": result.void,
        "bad": progress.bad,
        "truncated": progress.truncated,
        **{name if name == "data_wait" else f"time_{name}": s for name, s in phases.items()},
        "time": time.time(),
    }
