"""What a run reports: one JSON object a step, TensorBoard, a progress bar, a log line.

`metrics.jsonl` is read by other programs: its keys are stable (see docs/losses.md). Only rank 0
has a reporter.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from mmtrain.log import LOG
from mmtrain.train.state import LossSums, StepReport, TrainState


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point work of one step, for MFU.

    Attributes:
        by_module: forward and backward operations of one global batch, by top-level module.
        peak_tflops: of all ranks together; 0 when unknown.
        peak_source: where that figure is from.
    """

    by_module: dict[str, float]
    peak_tflops: float
    peak_source: str

    def mfu(self, seconds: float) -> float:
        """Share of the peak that the step reached; 0 when the peak is unknown."""
        if not self.peak_tflops or not seconds:
            return 0.0
        return sum(self.by_module.values()) / seconds / (self.peak_tflops * 1e12)


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
        self.sources, self.work, self.steps = sources, work, steps
        path = folder / "metrics.jsonl"
        kept = _lines_until(path, state.step)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.rename(path)
        self._lines = path.open("a", buffering=1)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=state.step + 1)
        self.bar = tqdm(total=steps, initial=state.step, unit="step", dynamic_ncols=True)
        LOG.info("MFU is taken of %.3f TFLOP/s (%s)", work.peak_tflops, work.peak_source)
        for name, operations in work.by_module.items():
            self.board.add_scalar(f"flops_per_step/{name}", operations, state.step)

    def step(self, step: int, report: StepReport, rates: dict[str, float], write: int) -> None:
        """Report one optimizer step; files are written when `step` is a multiple of `write`."""
        tokens_per_second = report.tokens / report.seconds
        self.bar.update()
        self.bar.set_postfix_str(
            f"loss {report.loss:.4f} grad {report.grad_norm:.3f} tok/s {tokens_per_second:,.0f}"
        )
        if step % write and step != self.steps:
            return
        mfu = self.work.mfu(report.seconds)
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
            **self._by_source(report.by_source),
        }
        self._lines.write(json.dumps(line) + "\n")
        self._scalars(step, line, rates, report)
        LOG.info(
            "step %d loss %.6f grad %.4f tokens/s %.0f mfu %.3f",
            step,
            report.loss,
            report.grad_norm,
            tokens_per_second,
            mfu,
        )

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
            if key == "step" or not math.isfinite(value):
                continue
            group = "loss" if key.startswith("loss") else "throughput"
            group = "optimizer" if key in ("grad_norm", "learning_rate") else group
            self.board.add_scalar(f"{group}/{key}", value, step)
        for label, rate in rates.items():
            self.board.add_scalar(f"learning_rate/{label}", rate, step)
        for layer, norm in report.module_norms.items():
            self.board.add_scalar(f"grad_norm/{layer}", norm, step)

    def heldout(self, step: int, sums: dict[tuple[str, int], LossSums], names: list[str]) -> None:
        """Report held-out losses by source, to TensorBoard, `heldout.jsonl` and the log."""
        line = {f"{name}/{names[source]}": entry.mean for (name, source), entry in sums.items()}
        folder = Path(self._lines.name).parent
        with (folder / "heldout.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")
        for key, value in line.items():
            self.board.add_scalar(f"heldout/{key}", value, step)
        LOG.info("step %d held out: %s", step, ", ".join(f"{k} {v:.4f}" for k, v in line.items()))

    def picture(self, step: int, name: str, image: Image) -> None:
        """Show a picture in TensorBoard."""
        self.board.add_image(name, pil_to_tensor(image.convert("RGB")), step)

    def close(self) -> None:
        """Flush everything."""
        self.bar.close()
        self._lines.close()
        self.board.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of an earlier start that lie before the step a run goes on from."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if json.loads(line)["step"] <= step]
