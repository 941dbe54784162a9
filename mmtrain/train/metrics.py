"""What a run reports: one JSON object a step, TensorBoard, a progress bar, a log line.

`metrics.jsonl` is read by other programs: its keys are stable (see docs/losses.md). Only rank 0
has a reporter.
"""

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from PIL.Image import Image
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from mmtrain.train.save import Saved
from mmtrain.train.state import LossSums, StepReport, TrainState

log = logging.getLogger(__name__)

_LINE_SECONDS = 10.0
_SAMPLES = "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point work of a step, for MFU.

    Attributes:
        flops: (positions of a pack, mean images of a pack) -> forward operations of each layer.
        passes: top-level module of each layer, and how many forward-sized passes a step makes
            over it (`models.census.forward_passes`).
        pack_tokens: positions of a pack.
        peak_tflops: of all ranks together; 0 when unknown.
        peak_source: where that figure is from.
    """

    flops: Callable[[int, float], list[float]]
    passes: tuple[tuple[str, float], ...]
    pack_tokens: int
    peak_tflops: float
    peak_source: str

    def by_module(self, report: StepReport) -> dict[str, float]:
        """Operations of a step, forward and backward, by top-level module."""
        packs = report.slots // self.pack_tokens
        out: dict[str, float] = {}
        layers = self.flops(self.pack_tokens, report.images / packs)
        for (module, passes), operations in zip(self.passes, layers, strict=True):
            out[module] = out.get(module, 0.0) + passes * packs * operations
        return out

    def mfu(self, operations: float, seconds: float) -> float:
        """Share of the peak that a step reached; 0 when the peak is unknown."""
        return operations / seconds / (self.peak_tflops * 1e12) if self.peak_tflops else 0.0


class Reporter:
    """Writes the numbers of a run."""

    def __init__(
        self, folder: Path, steps: int, state: TrainState, sources: list[str], work: Work
    ) -> None:
        """Open `metrics.jsonl` and TensorBoard; lines after `state.step` are cut off.

        Args:
            folder: the run's folder.
            steps: last step of the run.
            state: where the run begins or goes on.
            sources: names of the data sources, by index.
            work: for MFU.
        """
        self.folder, self.sources, self.work, self.steps = folder, sources, work, steps
        self._begin(state.step)
        self._on_screen = sys.stderr.isatty()
        self._said = -math.inf  # when the last step line went to a terminal without a bar
        self.bar = tqdm(
            total=steps,
            initial=state.step,
            unit="step",
            dynamic_ncols=True,
            disable=not self._on_screen,
        )
        log.info("MFU is taken of %.3f TFLOP/s (%s)", work.peak_tflops, work.peak_source)

    def _begin(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        _cut(path, step)
        if (self.folder / _SAMPLES).exists():
            _cut(self.folder / _SAMPLES, step)
        self._lines = path.open("a", buffering=1)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def rewind(self, step: int) -> None:
        """Go on after `step`: later lines are cut off, as when a run is started again."""
        self._lines.close()
        self.board.close()
        self._begin(step)
        self.bar.n = step
        self.bar.refresh()

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """Add a line to `events.jsonl`: what happened to a run besides its steps."""
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(strict_json({"step": step, "event": kind, **facts}) + "\n")

    def step(self, step: int, report: StepReport, rates: dict[str, float], write: int) -> None:
        """Report one optimizer step; files are written when `step` is a multiple of `write`."""
        tokens_per_second = report.tokens / report.seconds
        self.bar.update()
        self.bar.set_postfix_str(
            f"loss {report.loss:.4f} grad {report.grad_norm:.3f} tok/s {tokens_per_second:,.0f}"
        )
        if step % write and step != self.steps:
            return
        mfu = self.work.mfu(sum(self.work.by_module(report).values()), report.seconds)
        line: dict[str, Any] = {
            "step": step,
            "loss": report.loss,
            **{f"loss_{name}": value for name, value in report.parts.items()},
            "grad_norm": report.grad_norm,
            "learning_rate": max(rates.values()),
            "tokens": report.tokens,
            "images": report.images,
            "documents": report.documents,
            "tokens_per_second": tokens_per_second,
            "images_per_second": report.images / report.seconds,
            "step_seconds": report.seconds,
            "data_seconds": report.data_seconds,
            "fill": report.tokens / report.slots,
            "mfu": mfu,
            "peak_tflops": self.work.peak_tflops,
            **self._by_source(report.by_source),
            **({"skipped": 1} if report.skipped else {}),
        }
        self._lines.write(strict_json(line) + "\n")
        self._scalars(step, line, rates, report)
        log.log(
            self._level(step),
            "step %d loss %.6f grad %.4f tokens/s %.0f mfu %.3f",
            step,
            report.loss,
            report.grad_norm,
            tokens_per_second,
            mfu,
        )

    def samples(
        self, step: int, batches: Sequence[tuple[tuple[int, ...], tuple[str, ...]]]
    ) -> None:
        """Add a line to `samples.jsonl`: packs and sample ids of a step, all ranks together."""
        packs = [number for numbers, _ in batches for number in numbers]
        names = [name for _, names in batches for name in names]
        with (self.folder / _SAMPLES).open("a") as file:
            file.write(json.dumps({"step": step, "packs": packs, "samples": names}) + "\n")

    def _level(self, step: int) -> int:
        """Every step goes to the log file; a terminal without a bar gets a line now and then."""
        now = monotonic()
        if self._on_screen or (now - self._said < _LINE_SECONDS and step != self.steps):
            return logging.DEBUG
        self._said = now
        return logging.INFO

    def _by_source(self, sums: dict[tuple[str, int], LossSums]) -> dict[str, float]:
        return {
            f"loss_{name}/{self.sources[source]}": entry.mean
            for (name, source), entry in sums.items()
        }

    def _scalars(
        self, step: int, line: dict[str, Any], rates: dict[str, float], report: StepReport
    ) -> None:
        """The same numbers for TensorBoard, in groups."""
        for key, value in line.items():
            if key != "step" and math.isfinite(value):
                self.board.add_scalar(f"{_group(key)}/{key.replace('/', '_')}", value, step)
        for label, rate in rates.items():
            self.board.add_scalar(f"optimizer/learning_rate_{label}", rate, step)
        for layer, norm in report.module_norms.items():
            self.board.add_scalar(f"norms/{layer}", norm, step)
        for module, operations in self.work.by_module(report).items():
            if operations:
                self.board.add_scalar(f"work/flops_{module}", operations, step)

    def saved(self, saved: Saved) -> None:
        """Report a committed checkpoint, and what training waited for it."""
        log.info(
            "step %d saved: %.1f MB in %.2f s, training waited %.3f s",
            saved.step,
            saved.bytes / 1e6,
            saved.write_seconds,
            saved.stall_seconds,
        )
        self.board.add_scalar("throughput/save_stall_seconds", saved.stall_seconds, saved.step)
        self.board.add_scalar("throughput/save_seconds", saved.write_seconds, saved.step)

    def heldout(self, step: int, parts: dict[str, dict[str, float]]) -> None:
        """Report held-out losses (source -> loss name -> mean), also to `heldout.jsonl`."""
        line = {
            f"{name}/{source}": v for source, means in parts.items() for name, v in means.items()
        }
        with (self.folder / "heldout.jsonl").open("a") as file:
            file.write(strict_json({"step": step, **line}) + "\n")
        for key, value in line.items():
            self.board.add_scalar(f"heldout/{key}", value, step)
        log.info("step %d held out: %s", step, ", ".join(f"{k} {v:.4f}" for k, v in line.items()))

    def picture(self, step: int, name: str, image: Image) -> None:
        """Show a picture in TensorBoard."""
        self.board.add_image(name, pil_to_tensor(image.convert("RGB")), step)

    def close(self) -> None:
        """Flush everything."""
        self.bar.close()
        self._lines.close()
        self.board.close()


def strict_json(line: Mapping[str, Any]) -> str:
    """One object as JSON; numbers that are not finite become null, as JSON has no other word."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(plain, allow_nan=False)


def _group(key: str) -> str:
    """The section of the TensorBoard page; they are sorted by name there, losses on top."""
    if key.startswith("loss"):
        return "loss_by_source" if "/" in key else "loss"
    if key in ("grad_norm", "learning_rate", "skipped"):
        return "optimizer"
    return "work" if key in ("mfu", "peak_tflops") else "throughput"


def _cut(path: Path, step: int) -> None:
    """Leave out lines after a step."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(_lines_until(path, step)))
    partial.rename(path)


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of an earlier start that lie before the step a run goes on from."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if json.loads(line)["step"] <= step]
