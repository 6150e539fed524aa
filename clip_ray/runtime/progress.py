"""What a run tells its user on the terminal: the block before step 1, one line, and a table."""

from __future__ import annotations

import shutil
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from clip_ray.runtime.cluster import Share, ray_logs
from clip_ray.tracking import Lag
from clip_ray.train.cost import held_s
from clip_ray.train.journal import Row, last_rows, read_journal
from clip_ray.train.rundir import Run

LINE_S = 10.0  # seconds between lines where the terminal cannot be rewritten
WARN_SAMPLES = 100  # before this a share of captions says little
MAX_TRUNCATED = 0.05
MAX_NAMED = 5  # shards that are lost for one reason
ETA_STEPS = 10  # before this the first steps' warm-up would dominate


def start_block(
    run: Run, share: Share, start_step: int, tracking_uri: str, command: list[str]
) -> str:
    """Return the lines shown before the first step."""
    config, layout = run.config, run.layout(share.num_workers)
    device = "GPU" if share.worker_gpus else f"CPU, {share.threads} threads each"
    model_bytes = _checkpoint_bytes(run)
    kept = config.checkpoint.keep_last + 1
    buffer = run.plan.window * layout.rows * 3 * config.model.vision.image_size**2
    here = "" if start_step == 0 else f", from step {start_step}"
    mlflow = (
        f"make ui STORAGE={config.run.storage}"
        if tracking_uri.startswith("sqlite")
        else tracking_uri
    )
    lines = [
        ("run", f"{config.run.name} in {run.store.uri}"),
        ("model", f"{config.model.name}, {config.train.precision}, vocabulary "
                  f"{run.tokenizer.vocab_size}"),
        ("data", f"{run.manifest.total} samples in {len(run.manifest)} shards; slots of "
                 f"{run.plan.slot}, windows of {run.plan.window} steps"),
        ("length", f"{run.total_steps} steps of {config.train.global_batch} = "
                   f"{run.plan.passes_at(run.total_steps):.1f} passes{here}"),
        ("cluster", f"{share.describe()}; {device}"),
        *_elastic(run),
        *_cost(run, share, start_step),
        ("memory", f"{_size(buffer)} of decoded samples buffered by each worker"),
        ("storage", f"{_size(model_bytes * kept)} for {kept} checkpoints"
                    f"{_free(run.store.uri, model_bytes * kept)}"),
        ("MLflow", mlflow),
        ("logs", f"{run.store.uri}/events.jsonl; Ray's: {ray_logs()}"),
        ("stop", "Ctrl-C or SIGTERM, or from elsewhere python jobs/stop.py "
                 f"{run.store.uri}: commits, then ends"),
        ("follow", f"tail -f {run.store.uri}/metrics.jsonl"),
        ("resume", " ".join(command)),
    ]  # fmt: skip
    return "\n".join(f"  {name:<8} {text}" for name, text in lines)


def _elastic(run: Run) -> list[tuple[str, str]]:
    """Say how a step's samples are dealt to each number of workers that the run may have."""
    counts = run.config.cluster.worker_counts
    if len(counts) == 1:
        return []
    rows = [run.layout(workers).rows for workers in counts]
    dealt = ", ".join(map(str, rows)) if len(rows) <= 8 else f"{rows[0]} to {rows[-1]}"
    idle = "" if counts[-1] <= run.config.train.global_batch else "  TOO MANY: some get no sample"
    text = f"{counts[0]} to {counts[-1]} workers, as there is room: {dealt} samples of a step each"
    return [("elastic", text + idle)]


def _cost(run: Run, share: Share, start_step: int) -> list[tuple[str, str]]:
    """Say what the run has cost, and will: as fast as the last steps on as many workers."""
    price = run.config.cluster.price_per_hour
    if price is None:
        return []
    steps = last_rows(run.store, "metrics")
    parts = [f"{price:g} an hour"]
    if start_step:
        signs = [*steps, *read_journal(run.store, "events")]
        parts.append(f"{price * held_s(run.store, signs, time.time()) / 3600:.2f} so far")
    alike = [row["step_s"] for row in steps if row["world_size"] == share.num_workers]
    left = run.total_steps - start_step
    if len(alike) >= ETA_STEPS:
        expected = price * left * statistics.median(alike) / 3600
        parts.append(f"{expected:.2f} expected for the {left} steps left")
    elif left:
        parts.append(f"what {left} steps will cost is shown with the ETA")
    return [("cost", ", ".join(parts))]


def _checkpoint_bytes(run: Run) -> int:
    import torch

    from clip_ray import model as models

    with torch.device("meta"):
        model = models.build(run.config.model)
    # Weights and AdamW's two moments, float32.
    return 12 * sum(p.numel() for p in model.parameters())


def _free(uri: str, needed: int) -> str:
    if uri.startswith("s3://"):
        return ""
    free = shutil.disk_usage(Path(uri)).free
    warning = "" if free > needed else "  TOO LITTLE: lower checkpoint.keep_last or free some"
    return f", {_size(free)} free{warning}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a length of time as a person would say it: 42s, 3m10s, 2h05m, 3d04h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


class ProgressLine:
    """Keeps one line on the terminal up to date; elsewhere prints one every ten seconds."""

    def __init__(self, run: Run, start_step: int, out: TextIO) -> None:
        self._run, self._out = run, out
        self._is_terminal = out.isatty()
        self._recent: deque[Row] = deque(maxlen=50)
        self._first_step = start_step
        self._shown = 0.0
        self._commit: int | None = start_step or None
        self._named: set[tuple[str, str]] = set()
        self._warned = False
        self._open = False

    def committed(self, step: int) -> None:
        """Note the newest commit."""
        self._commit = step

    def bad(self, row: Row) -> None:
        """Note a void sample; the first of each reason is named, and shards that are lost."""
        reason = row["reason"]
        lost = reason.startswith(("shard-", "sidecar-"))  # a whole shard, not a sample of it
        what = (reason, row["shard"] if lost else "")
        if what in self._named or sum(r == reason for r, _ in self._named) >= MAX_NAMED:
            return
        self._named.add(what)
        self.note(
            f"bad {'shard' if lost else 'sample'}: {row['key']} in {row['shard']}: {reason} (void; "
            "further ones are counted and listed in quarantine.jsonl)"
        )

    def _warn_of_truncation(self, row: Row) -> None:
        seen = (row["step"] - self._first_step) * self._run.config.train.global_batch
        share = row["truncated"] / max(row["step"] * self._run.config.train.global_batch, 1)
        if not self._warned and seen >= WARN_SAMPLES and share > MAX_TRUNCATED:
            self._warned = True
            self.note(
                f"{100 * share:.0f} % of the captions are longer than "
                f"{self._run.tokenizer.context_length} tokens and are cut: train a vocabulary on "
                "them (--tokenizer.train_vocab 32768), or give them more tokens "
                "(--model.text.context_length), under another run.name"
            )

    def steps(self, rows: list[Row], lag: Lag) -> None:
        """Take new journal rows and show where the run is."""
        self._recent += rows
        if rows:
            self._warn_of_truncation(rows[-1])
        now = time.monotonic()
        if not self._recent or not rows:
            return
        due = self._is_terminal or now - self._shown > LINE_S
        if due or rows[-1]["step"] == self._run.total_steps:
            self._shown = now
            self._write(self._text(lag))

    def note(self, text: str) -> None:
        """Print a line of its own."""
        self._end_line()
        print(f"! {text}", file=self._out, flush=True)

    def close(self) -> None:
        """End the line."""
        self._end_line()

    def _end_line(self) -> None:
        if self._open:
            print(file=self._out, flush=True)
            self._open = False

    def _write(self, text: str) -> None:
        if self._is_terminal:
            width = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{text[: width - 1]}", end="", file=self._out, flush=True)
            self._open = True
        else:
            print(text, file=self._out, flush=True)

    def _text(self, lag: Lag) -> str:
        last, total = self._recent[-1], self._run.total_steps
        rows = list(self._recent)[-20:]
        # The median: the first step of an attempt waits for Ray Data to start.
        seconds = statistics.median(row["step_s"] for row in rows)
        wait = sum(row["data_wait"] for row in rows) / max(sum(r["step_s"] for r in rows), 1e-9)
        rate = self._run.config.train.global_batch / seconds
        left_s = (total - last["step"]) * seconds
        price = self._run.config.cluster.price_per_hour
        eta = "ETA ..."
        if last["step"] - self._first_step >= ETA_STEPS:
            eta = f"ETA {duration(left_s)}"
            eta += f" (costs {price * left_s / 3600:.2f})" if price is not None else ""
        parts = [
            f"step {last['step']}/{total}",
            f"loss {last['loss']:.3f}" if last["loss"] is not None else "loss not finite",
            f"{rate:.0f} samples/s",
            f"data wait {100 * wait:.0f} %",
            eta,
            f"commit {self._commit}" if self._commit else "no commit yet",
        ]
        if last["bad"]:
            parts.append(f"{last['bad']} bad samples")
        if lag.failures:
            parts.append(f"MLflow behind by {lag.steps} steps")
        return " · ".join(parts)


def summary_table(summary: Row, run: Run) -> str:
    """Return a finished run's results as a table, and the commands that come next."""
    rows: list[tuple[str, str, str]] = []
    for dataset, metrics in summary.get("evaluation", {}).items():
        for name, value in metrics.items():
            if "chance" in name or not isinstance(value, float):
                continue
            chance = metrics.get(_chance_of(name))
            against = f"chance {100 * chance:.2g} %" if chance is not None else ""
            shown = f"{100 * value:.1f} %" if value <= 1 and "loss" not in name else f"{value:.3f}"
            rows.append((f"{dataset} {name}", shown, against))
    facts: list[tuple[str, Any]] = [
        ("loss", f"{summary['loss']:.3f}"),
        ("samples/s", f"{summary['samples_per_s']:.0f}"),
        ("time", f"{duration(summary['seconds'])}, {100 * summary['ettr']:.0f} % of it in steps"),
        *(
            ("recovered", f"{cause}: {int(of['times'])} times, {duration(of['seconds'])} lost")
            for cause, of in summary.get("recoveries", {}).items()
        ),
        *_summed_cost(summary),
        ("checkpoint", summary["checkpoint"]),
        ("export", summary["export"]),
        ("MLflow run", summary["run_id"] or "not recorded yet"),
    ]
    if summary.get("model_version"):
        name, version = summary["model_name"], summary["model_version"]
        facts.append(("registered", f"{name} version {version}"))
    rows += [(name, str(value), "") for name, value in facts]
    width = max(len(name) for name, _, _ in rows)
    value_width = max((len(v) for _, v, against in rows if against), default=0)
    return "\n".join(
        f"  {name:<{width}}  {value:<{value_width}}  {against}".rstrip()
        for name, value, against in rows
    )


def _summed_cost(summary: Row) -> list[tuple[str, Any]]:
    cost = summary.get("cost")
    if cost is None:
        return []
    hours = summary["cluster_hours"]
    return [("cost", f"{cost:.2f} ({hours:.2f} hours at {cost / hours:g})")]


def _chance_of(metric: str) -> str:
    head, _, last = metric.rpartition(".")
    return f"{head}.chance_{last}"
