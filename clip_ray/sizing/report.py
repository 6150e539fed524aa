"""A plan as `jobs/plan.py` prints it: a table, what is wrong, and the command that runs it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clip_ray.config import Config
from clip_ray.config.load import load_config
from clip_ray.errors import ConfigError
from clip_ray.sizing.advice import warnings
from clip_ray.sizing.calibration import SPREAD, anchors
from clip_ray.sizing.gpus import GB, GPUS, Gpu, Machine, parse_gpus
from clip_ray.sizing.plan import Assumptions, Plan, plan

PAPER = {"global_batch": 32768, "precision": "bf16", "device": "cuda"}
"""Settings below a recipe's and flags: Radford et al. 2021, table 18; bf16 is ours."""


@dataclass(frozen=True)
class Question:
    """What a plan is asked for, in the units of the flags; None: the usual.

    Attributes:
        gpus: number and type, as in 64xH100.
        model: name of the architecture.
        samples: length.
        utilization: as in `Assumptions`.
        decode_ms: likewise.
        storage_mb_s: 10^6 bytes/s that one writer's checkpoint takes.
        price_per_gpu_hour: price of one GPU.
        price_per_node_hour: price of a whole machine.
        gpus_per_node: of the machine.
        cpus_per_node: likewise.
        memory_per_node: likewise, 10^9 bytes.
        network_gbit: likewise, 10^9 bits/s.
    """

    gpus: str
    model: str | None = None
    samples: float | None = None
    utilization: float | None = None
    decode_ms: float = Assumptions.decode_ms
    storage_mb_s: float = Assumptions.storage_rate / 1e6
    price_per_gpu_hour: float | None = None
    price_per_node_hour: float | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    memory_per_node: float | None = None
    network_gbit: float | None = None


@dataclass(frozen=True)
class Answer:
    """A plan with what goes with it.

    Attributes:
        plan: the figures.
        warnings: what is wrong, and the way out.
        command: that runs it.
        text: all of it, for a terminal.
    """

    plan: Plan
    warnings: list[str]
    command: str
    text: str

    def to_json(self) -> str:
        """Return the figures, in bytes, seconds and operations/s, as JSON."""
        figures: dict[str, Any] = asdict(self.plan)
        figures["memory"]["needed"] = self.plan.memory.needed
        return json.dumps(
            {"plan": figures, "warnings": self.warnings, "command": self.command}, indent=2
        )


def answer(question: Question, settings: Sequence[str]) -> Answer:
    """Return the answer to a question about the run that `settings` describe.

    Args:
        question: the flags of `jobs/plan.py` itself.
        settings: those of `jobs/pretrain.py`: `--config FILE` and `--section.key value`.

    Raises:
        ConfigError: a flag or setting that cannot be used.
    """
    _check(question)
    count, gpu = parse_gpus(question.gpus)
    flags = list(settings)
    if question.model is not None:
        flags += ["--model.name", question.model]
    if question.samples is not None:
        flags += ["--train.samples", str(round(question.samples))]
    has_recipe = any(flag.split("=")[0] == "--config" for flag in flags)
    defaults = {} if has_recipe else {"train": PAPER}
    if not has_recipe and not any(flag.startswith(_LENGTHS) for flag in flags):
        raise ConfigError("how long? give --samples, such as 12.8e9, or --train.steps")
    config = load_config(
        [*flags, "--cluster.num_workers", str(count)],
        default_recipe=None,
        program="jobs/plan.py",
        defaults=defaults,
    )
    machine = _machine(question, gpu)
    price = question.price_per_gpu_hour
    if question.price_per_node_hour is not None:
        # Whole nodes are paid for, also where the last is not full.
        price = question.price_per_node_hour * -(-count // machine.gpus) / count
    assumptions = Assumptions(
        utilization=question.utilization,
        decode_ms=question.decode_ms,
        storage_rate=question.storage_mb_s * 1e6,
        price_per_gpu_hour=price,
    )
    made = plan(config, count, gpu, machine, assumptions)
    wrong = warnings(made, config, gpu, machine)
    command = _command(made, config, flags, {} if has_recipe else PAPER)
    text = "\n".join(
        [
            _table(made, config, gpu, machine, assumptions),
            *(f"WARNING {line}" for line in wrong),
            "to run it:",
            command,
        ]
    )
    return Answer(made, wrong, command, text)


_LENGTHS = ("--train.samples", "--train.steps", "--train.passes")


def _check(question: Question) -> None:
    for name, value in asdict(question).items():
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value:g}: expected a number above 0")
    if question.utilization is not None and question.utilization > 1:
        raise ConfigError(
            f"--utilization {question.utilization:g}: expected a share of the peak, such as 0.35"
        )
    if question.price_per_gpu_hour and question.price_per_node_hour:
        raise ConfigError("give --price_per_gpu_hour or --price_per_node_hour, not both")


def _machine(question: Question, gpu: Gpu) -> Machine:
    given = {
        "gpus": question.gpus_per_node,
        "cpus": question.cpus_per_node,
        "memory": question.memory_per_node and question.memory_per_node * GB,
        "network_gbit": question.network_gbit,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    name = f"{gpu.machine.name}, changed" if changes else gpu.machine.name
    return replace(gpu.machine, name=name, **changes)


def _command(made: Plan, config: Config, flags: list[str], defaults: dict[str, Any]) -> str:
    named = {flag.split("=")[0] for flag in flags}
    for key, value in defaults.items():
        if f"--train.{key}" not in named:
            flags = [*flags, f"--train.{key}", str(value)]
    flags = [*flags, "--cluster.num_workers", str(made.gpus)]
    if made.micro_batches > 1 and config.train.micro_batch is None:
        flags += ["--train.micro_batch", str(made.micro_batch)]
    if not config.data.sources:
        flags += ["--data.sources", "s3://BUCKET/SHARDS"]
    run = " ".join(["python jobs/pretrain.py", *map(shlex.quote, flags)])
    return f"  ray job submit --address http://HEAD:8265 --working-dir . -- \\\n    {run}"


def _table(made: Plan, config: Config, gpu: Gpu, machine: Machine, assumptions: Assumptions) -> str:
    memory, network = made.memory, made.network
    peak = gpu.peak(config.train.precision) / 1e12
    low, high = _band(made, assumptions)
    source = "as given" if assumptions.utilization else "by the published runs"
    cost = "" if made.cost is None else f", {_price(made.cost, low, high)}"
    again = ", each computed twice (GradCache)" if made.micro_batches > 1 else ""
    recomputed = "; blocks computed again" if config.train.grad_checkpointing else ""
    lines = [
        ("model", f"{made.model}: {made.parameters / 1e6:,.1f} M parameters, "
                  f"{made.forward_flops / 1e9:,.1f} GFLOP a pair forward, {config.train.precision}"
                  f"{recomputed}"),
        ("cluster", f"{made.gpus} x {gpu.name} ({gpu.memory / GB:g} GB, {peak:g} TFLOP/s) in "
                    f"{made.nodes} x {machine.name} ({machine.gpus} GPUs, {machine.cpus} CPUs, "
                    f"{machine.memory / GB:,.0f} GB, {machine.network_gbit:g} Gbit/s)"),
        ("batch", f"{made.global_batch:,} = {made.rows:,} a GPU: {made.micro_batches} "
                  f"micro-batch{'es' if made.micro_batches > 1 else ''} of {made.micro_batch:,}"
                  f"{again}"),
        ("memory", f"{memory.needed / GB:.1f} of {memory.available / GB:g} GB a GPU: weights "
                   f"{_gb(memory.weights)}, gradients {_gb(memory.gradients)}, AdamW "
                   f"{_gb(memory.moments)}, activations {_gb(memory.activations)}, samples "
                   f"{_gb(memory.samples)}, loss {_gb(memory.loss)}, reserve "
                   f"{_gb(memory.reserve)}"),
        ("step", f"{made.step_s:.2f} s: GPU {made.device_s:.2f}, decoding {made.decode_s:.2f} "
                 f"beside it, network {network.exposed_s:.2f} after it; "
                 f"{made.samples_per_s:,.0f} samples/s, {made.samples_per_s / made.gpus:,.0f} a "
                 "GPU"),
        ("speed", f"{made.utilization:.1%} of the peak, {source}; MFU {made.mfu:.1%} (without "
                  "what is computed again)"),
        ("decoding", f"{made.decode_cpus:,.0f} CPUs at {assumptions.decode_ms:g} ms an image; "
                     f"{made.data_cpus:,.0f} are there"),
        ("network", f"a GPU sends in a step: gather {_mb(network.gather)}, statistics "
                    f"{_mb(network.statistics)}, reduce-scatter {_mb(network.scatter)}, gradient "
                    f"all-reduce {_mb(network.gradients)}; gets pixels {_mb(network.pixels)}"),
        ("nodes", f"object store {_gb(made.object_store)} of {_gb(made.object_store_there)} GB, "
                  f"main memory {_gb(made.host)} of {_gb(made.host_there)} GB"),
        ("commits", f"{made.checkpoint / GB:.2f} GB each, {made.snapshot_s:.1f} s of stall, "
                    f"{made.write_s:.0f} s to write at {assumptions.storage_rate / 1e6:g} MB/s; "
                    f"every {config.checkpoint.every_steps} steps = "
                    f"{config.checkpoint.every_steps * made.step_s / 60:.0f} min; "
                    f"{made.storage / GB:,.0f} GB kept"),
        ("length", f"{made.steps:,} steps = {made.steps * made.global_batch:,} samples"),
        ("time", f"{_days(made.hours)} ({_days(made.hours * low)} to {_days(made.hours * high)})"
                 f"; {made.hours * made.gpus:,.0f} GPU-hours{cost}"),
    ]  # fmt: skip
    return "\n".join(f"  {name:<8} {text}" for name, text in lines)


def _band(made: Plan, assumptions: Assumptions) -> tuple[float, float]:
    """Return the factors of the time between which the published runs lie."""
    if assumptions.utilization is not None:
        return 1.0, 1.0
    device = made.device_s / SPREAD + made.network.exposed_s
    low = max(device, made.decode_s) / made.step_s
    device = made.device_s * SPREAD + made.network.exposed_s
    return low, max(device, made.decode_s) / made.step_s


def _gb(count: float) -> str:
    value = count / GB
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _mb(count: float) -> str:
    value = count / 1e6
    return f"{value:,.0f} MB" if value >= 10 else f"{value:.1f} MB"


def _days(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h"


def _price(cost: float, low: float, high: float) -> str:
    return f"cost {cost:,.0f} ({cost * low:,.0f} to {cost * high:,.0f})"


def anchor_table() -> str:
    """Return the published runs beside what the rule says of them."""
    lines = [
        f"{'published run':<40} {'GPUs':>13} {'a GPU':>6} {'rule':>6} {'ratio':>5}  {'of peak':>7}"
    ]
    for run in anchors():
        note = "" if run.fitted else f"  not fitted: {run.why_not}"
        lines.append(
            f"{run.system:<40} {f'{run.gpus} {run.gpu}':>13} {run.samples_per_s:6.1f} "
            f"{run.predicted:6.1f} {run.predicted / run.samples_per_s:5.2f}  "
            f"{run.utilization:7.1%}{note}"
        )
    lines.append(f"samples/s; the fitted ones lie within a factor of {SPREAD:g} of the rule")
    return "\n".join(lines)


def gpu_table() -> str:
    """Return the types that are known."""
    lines = [f"{'type':<10} {'GB':>4} {'bf16':>6} {'fp32':>5} {'GB/s':>5}  usual machine"]
    for gpu in GPUS.values():
        bf16 = "none" if gpu.bf16 is None else f"{gpu.bf16 / 1e12:g}"
        lines.append(
            f"{gpu.name:<10} {gpu.memory / GB:4.0f} {bf16:>6} {gpu.fp32 / 1e12:5g} "
            f"{gpu.bandwidth / GB:5.0f}  {gpu.machine.name}: {gpu.machine.gpus} GPUs, "
            f"{gpu.machine.cpus} CPUs, {gpu.machine.network_gbit:g} Gbit/s"
        )
    return "\n".join(lines)


def write(path: str, answered: Answer) -> None:
    """Write the figures to a file. Raises ConfigError where it cannot."""
    try:
        Path(path).write_text(answered.to_json() + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot write it ({error.strerror})") from error
