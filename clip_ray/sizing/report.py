"""A plan as `jobs/plan.py` prints it: a table, what is wrong, and the command that runs it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clip_ray.config import Config
from clip_ray.config.load import load_config
from clip_ray.errors import ConfigError
from clip_ray.sizing.advice import warnings
from clip_ray.sizing.calibration import SPREAD, anchors
from clip_ray.sizing.gpus import GB, GPUS, Cluster, Gpu, Machine, parse_gpus
from clip_ray.sizing.plan import Assumptions, Plan, plan

PAPER = {"global_batch": 32768, "precision": "bf16", "device": "cuda"}
"""Settings below a recipe's and flags: Radford et al. 2021, table 18; bf16 is ours."""


def _flag(kind: type, help_text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"type": kind, "help": help_text})


@dataclass(frozen=True)
class Question:
    """What a plan is asked for: the flags of `jobs/plan.py`, each with its type and its help."""

    gpus: str | None = _flag(str, "COUNTxTYPE, such as 64xH100; --types lists the types")
    model: str | None = _flag(str, "architecture; default: the recipe's, else ViT-B-32")
    samples: float | None = _flag(float, "length in samples, 12.8e9; default: the recipe's")
    utilization: float | None = _flag(
        float,
        "share of the GPU's peak that all executed operations reach, recomputed ones too, such as "
        "0.35; default: by published runs (--anchors)",
    )
    decode_ms: float = _flag(
        float,
        "milliseconds of a CPU to read, decode and crop an image; default: 1.2, measured for JPEG "
        "of 256 pixels (512 to 1,024 pixels: 3)",
        Assumptions.decode_ms,
    )
    storage_mb_s: float = _flag(
        float,
        "MB/s at which one writer's checkpoint is stored; default: 200, an assumption",
        Assumptions.storage_rate / 1e6,
    )
    price_per_gpu_hour: float | None = _flag(float, "in any currency; default: no cost is said")
    price_per_node_hour: float | None = _flag(float, "in its place, of a whole machine")
    gpus_per_node: int | None = _flag(int, "GPUs of a machine; default: of the type's usual one")
    cpus_per_node: int | None = _flag(int, "its virtual CPUs; default likewise")
    memory_per_node: float | None = _flag(float, "its main memory, GB; default likewise")
    network_gbit: float | None = _flag(
        float, "its network, Gbit/s; default likewise (EFA's where it has that; TCP is slower)"
    )


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
    if question.gpus is None:
        raise ConfigError("which GPUs? give --gpus, such as 64xH100; --types lists the types")
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
    cluster = Cluster(count, gpu, machine)
    made = plan(config, cluster, assumptions)
    wrong = warnings(made, config, cluster)
    command = _command(made, config, flags, {} if has_recipe else PAPER)
    text = "\n".join(
        [
            _table(made, config, cluster, assumptions),
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
    if made.batch.micro_batches > 1 and config.train.micro_batch is None:
        flags += ["--train.micro_batch", str(made.batch.micro_batch)]
    if not config.data.sources:
        flags += ["--data.sources", "s3://BUCKET/SHARDS"]
    lines = ["  ray job submit --address http://HEAD:8265 --working-dir . --"]
    line = "python jobs/pretrain.py"
    for flag in flags:
        # A flag's value stays on its line.
        if flag.startswith("--") and len(line) > 70:
            lines.append(f"    {line}")
            line = ""
        line = f"{line} {shlex.quote(flag)}".strip()
    return " \\\n".join([*lines, f"    {line}"])


def _table(made: Plan, config: Config, cluster: Cluster, assumptions: Assumptions) -> str:
    gpu, machine, batch, speed = cluster.gpu, cluster.machine, made.batch, made.speed
    memory, network, commits, node = made.memory, made.network, made.commits, made.node
    peak = gpu.peak(config.train.precision) / 1e12
    in_bf16 = config.train.precision == "bf16" and gpu.bf16 is not None
    source = "by published runs (--anchors)" if in_bf16 else "assumed: no run in fp32 is published"
    source = "as given" if assumptions.utilization else source
    recomputed = "; blocks computed again" if config.train.grad_checkpointing else ""
    once = "1 micro-batch" if batch.micro_batches == 1 else f"{batch.micro_batches} micro-batches"
    twice = ", features computed twice (GradCache)" if batch.micro_batches > 1 else ""
    every = config.checkpoint.every_steps
    lines = [
        ("model", f"{made.model}: {made.parameters / 1e6:,.1f} M parameters, "
                  f"{made.forward_flops / 1e9:,.1f} GFLOP a pair forward, {config.train.precision}"
                  f"{recomputed}"),
        ("cluster", f"{made.gpus} x {gpu.name} ({gpu.memory / GB:g} GB, {peak:g} TFLOP/s) in "
                    f"{made.nodes} x {machine.name}"),
        ("", f"({machine.gpus} GPUs, {machine.cpus} CPUs, {machine.memory / GB:,.0f} GB, "
             f"{machine.network_gbit:g} Gbit/s)"),
        ("batch", f"{made.global_batch:,} = {batch.rows:,} a GPU: {once} of "
                  f"{batch.micro_batch:,}{twice}"),
        ("memory", f"{memory.needed / GB:.1f} of {memory.available / GB:g} GB a GPU: weights "
                   f"{_gb(memory.weights)}, gradients {_gb(memory.gradients)}, AdamW "
                   f"{_gb(memory.moments)}, activations {_gb(memory.activations)},"),
        ("", f"samples {_gb(memory.samples)}, loss {_gb(memory.loss)}, reserve "
             f"{_gb(memory.reserve)}"),
        ("step", f"{speed.step_s:.2f} s: GPU {speed.device_s:.2f}, network "
                 f"{network.exposed_s:.2f} not hidden, decoding {speed.decode_s:.2f} beside them"),
        ("speed", f"{speed.samples_per_s:,.0f} samples/s, "
                  f"{speed.samples_per_s / made.gpus:,.0f} a GPU: {speed.utilization:.1%} of the "
                  f"peak, {source}; MFU {speed.mfu:.1%}"),
        ("decoding", f"{_cpus(speed.decode_cpus)} CPUs at {assumptions.decode_ms:g} ms an image; "
                     f"{speed.data_cpus:,.0f} are there"),
        ("network", f"a GPU sends in a step: gather {_mb(network.gather)}, statistics "
                    f"{_mb(network.statistics)}, reduce-scatter {_mb(network.scatter)},"),
        ("", f"gradient all-reduce {_mb(network.gradients)}; gets pixels "
             f"{_mb(network.pixels)}"),
        ("nodes", f"object store {_gb(node.object_store)} of {_gb(node.object_store_there)} GB, "
                  f"main memory {_gb(node.needed)} of {_gb(node.available)} GB"),
        ("commits", f"{commits.size / GB:.2f} GB, {commits.snapshot_s:.1f} s of stall, "
                    f"{commits.write_s:.0f} s to write, every {every} steps = "
                    f"{every * speed.step_s / 60:.0f} min; {commits.kept / GB:,.0f} GB kept"),
        ("length", f"{made.steps:,} steps = {made.steps * made.global_batch:,} samples"),
        ("time", _time_and_cost(made, assumptions)),
    ]  # fmt: skip
    return "\n".join(f"  {name:<8} {text}" for name, text in lines)


def _time_and_cost(made: Plan, assumptions: Assumptions) -> str:
    low, high = _band(made, assumptions)
    unit, name = (24, "days") if made.hours >= 48 else (1, "hours")
    given = low == high == 1.0
    band = "" if given else f" ({made.hours * low / unit:.1f} to {made.hours * high / unit:.1f})"
    text = f"{made.hours / unit:.1f} {name}{band}; {made.hours * made.gpus:,.0f} GPU-hours"
    if made.cost is None:
        return text
    band = "" if given else f" ({made.cost * low:,.0f} to {made.cost * high:,.0f})"
    return f"{text}; cost {made.cost:,.0f}{band}"


def _band(made: Plan, assumptions: Assumptions) -> tuple[float, float]:
    """Return the factors of the time between which it lies if the rule errs as it has erred."""
    if assumptions.utilization is not None:
        return 1.0, 1.0

    def factor(of_device: float) -> float:
        gpu_s = made.speed.device_s * of_device + made.network.exposed_s
        return max(gpu_s, made.speed.decode_s) / made.speed.step_s

    return factor(1 / SPREAD), factor(SPREAD)


def _cpus(count: float) -> str:
    return f"{count:.1f}" if count < 10 else f"{count:,.0f}"


def _gb(count: float) -> str:
    value = count / GB
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _mb(count: float) -> str:
    value = count / 1e6
    return f"{value:,.0f} MB" if value >= 10 else f"{value:.1f} MB"


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
