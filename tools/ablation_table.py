"""Settings, figures and comparisons of tools/ablate_transfusion.py, and the table of them."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.errors import ContentError, MissingError

FIGURES = "ablation.json"  # in a run's folder
TRUTH = "truth.json"  # in the campaign's folder
_DOCUMENTS_A_STEP = 4
_WORDS = 24  # positions a document has beside its image at most

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One setting of the paper, and what the paper says of it (0.76B, tables 5, 6 and 8).

    Attributes:
        key: names its runs.
        told: names it in the table.
        overrides: of the recipe.
        fid: of the paper; None if it gives none.
        cider: of the paper.
    """

    key: str
    told: str
    overrides: tuple[str, ...]
    fid: float
    cider: float


def _variant(
    key: str, told: str, paper: tuple[float, float], patch: int, *overrides: str
) -> Variant:
    rows = (32 // patch) ** 2
    sizes = (
        f"model.image.patch={patch}",
        f"data.pack_tokens={_DOCUMENTS_A_STEP * (rows + _WORDS)}",
        f"data.pack_images={_DOCUMENTS_A_STEP}",
        *(f"data.{group}.captions.max_tokens={rows + _WORDS}" for group in ("sources", "heldout")),
    )
    return Variant(key, told, (*sizes, *overrides), *paper)


def _unet(*channels: int) -> tuple[str, str]:
    return "model.image.edge=unet", f"model.image.unet_channels=[{','.join(map(str, channels))}]"


_CAUSAL = "model.image.attention=causal"
VARIANTS = {
    variant.key: variant
    for variant in (
        _variant("linear_causal", "linear, k = 2, causal", (61.3, 12.7), 2, _CAUSAL),
        _variant("linear_2", "linear, k = 2", (20.3, 16.0), 2),
        _variant("linear_4", "linear, k = 4", (25.6, 14.3), 4),
        _variant("linear_8", "linear, k = 8", (43.5, 11.3), 8),
        _variant("unet_causal", "U-Net, k = 2, causal", (16.8, 23.3), 2, *_unet(16, 32), _CAUSAL),
        _variant("unet_2", "U-Net, k = 2", (16.7, 25.4), 2, *_unet(16, 32)),
        _variant("unet_4", "U-Net, k = 4", (16.0, 29.9), 4, *_unet(16, 32, 32)),
        _variant("unet_8", "U-Net, k = 8", (16.1, 29.5), 8, *_unet(16, 32, 32, 32)),
        _variant(
            "unet_limit",
            "U-Net, k = 2, t <= 500 before text",
            (16.5, 29.4),
            2,
            *_unet(16, 32),
            "model.noise.limit=500",
        ),
    )
}


@dataclass(frozen=True)
class Metric:
    """A column of the table: how it is written, and whether less is better."""

    key: str
    told: str
    digits: int
    less_is_better: bool = False
    percent: bool = False

    def write(self, values: Sequence[float]) -> str:
        """Mean (least to greatest)."""
        scaled = [value * (100 if self.percent else 1) for value in values]
        parts = (statistics.mean(scaled), min(scaled), max(scaled))
        mean, low, high = (f"{part:.{self.digits}f}" for part in parts)
        return mean if len(values) == 1 else f"{mean} ({low} to {high})"


METRICS = (
    Metric("image_loss", "image loss", 4, less_is_better=True),
    Metric("frechet", "Frechet", 2, less_is_better=True),
    Metric("accepted", "accepted %", 0, percent=True),
    Metric("colours", "colours %", 0, percent=True),
    Metric("number", "number %", 0, percent=True),
    Metric("caption_loss", "caption loss", 3, less_is_better=True),
    Metric("captions_true", "captions true %", 0, percent=True),
    Metric("cider", "CIDEr-D", 0),
)
_BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class Comparison:
    """Two settings, a figure of the paper and those of ours that stand for it."""

    told: str
    first: str
    second: str
    paper: str  # "fid" or "cider"
    ours: tuple[str, ...]


_PICTURES = ("image_loss", "frechet")
COMPARISONS = (
    Comparison("linear: causal to bidirectional", "linear_causal", "linear_2", "fid", _PICTURES),
    Comparison("U-Net: causal to bidirectional", "unet_causal", "unet_2", "fid", _PICTURES),
    Comparison("linear to U-Net, k = 2", "linear_2", "unet_2", "fid", _PICTURES),
    Comparison("all times to t <= 500", "unet_2", "unet_limit", "cider", ("caption_loss", "cider")),
    Comparison("linear: k = 2 to 4", "linear_2", "linear_4", "fid", _PICTURES),
    Comparison("linear: k = 4 to 8", "linear_4", "linear_8", "fid", _PICTURES),
    Comparison("U-Net: k = 2 to 4", "unet_2", "unet_4", "fid", _PICTURES),
    Comparison("U-Net: k = 4 to 8", "unet_4", "unet_8", "fid", _PICTURES),
)


# --- the table -----------------------------------------------------------------------------


def read_figures(folder: Path) -> Figures:
    """What `Run.do` wrote."""
    found: Figures = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    return found


def collect(out: Path) -> dict[str, dict[int, Figures]]:
    """Figures by setting and seed.

    Raises:
        MissingError: there are none.
        ContentError: runs were measured on different documents.
    """
    found: dict[str, dict[int, Figures]] = {}
    for key in VARIANTS:
        for path in sorted(out.glob(f"{key}_*/{FIGURES}")):
            seed = path.parent.name.removeprefix(f"{key}_")
            if seed.isdecimal():
                found.setdefault(key, {})[int(seed)] = read_figures(path.parent)["figures"]
    if not found:
        raise MissingError(
            f"{out}: no run has figures ({FIGURES}); make some by "
            f"`python tools/ablate_transfusion.py run {out}`"
        )
    seen = {figures["documents"] for seeds in found.values() for figures in seeds.values()}
    if len(seen) > 1:
        raise ContentError(
            f"{out}: its runs were measured on {len(seen)} different sets of documents, which no "
            "table can compare; run the campaign again in another folder, on one set of data"
        )
    return found


def table(out: Path) -> str:
    """Settings, then comparisons, as Markdown; the same into `out`/table.md."""
    found = collect(out)
    truth = json.loads((out / TRUTH).read_text()) if (out / TRUTH).is_file() else None
    text = f"{settings_table(found, truth)}\n{comparison_table(found)}"
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def settings_table(
    found: Mapping[str, Mapping[int, Figures]], truth: Mapping[str, float] | None = None
) -> str:
    """One row a setting: mean (least to greatest) over seeds, beside the paper's figures."""
    rows = []
    for key, seeds in found.items():
        own = [metric.write([f[metric.key] for f in seeds.values()]) for metric in METRICS]
        variant = VARIANTS[key]
        numbers = next(iter(seeds.values()))["parameters"]
        told = [variant.told, f"{numbers / 1e6:.2f}M", str(len(seeds))]
        rows.append([*told, *own, f"{variant.fid}", f"{variant.cider}"])
    if truth is not None:
        own = [m.write([truth[m.key]]) if m.key in truth else "" for m in METRICS]
        rows.append(["true pictures", "", "", *own, "", ""])
    head = ["", "parameters", "seeds", *(metric.told for metric in METRICS)]
    return _markdown([*head, "paper FID", "paper CIDEr"], rows)


def comparison_table(found: Mapping[str, Mapping[int, Figures]]) -> str:
    """One row a comparison: both figures, and in how many seeds the sign is the paper's."""
    rows = []
    for one in COMPARISONS:
        if one.first not in found or one.second not in found:
            continue
        before, after = (getattr(VARIANTS[key], one.paper) for key in (one.first, one.second))
        better = after < before if one.paper == "fid" else after > before
        row = [one.told, f"{one.paper.upper()} {before} to {after}"]
        for key in one.ours:
            row.append(_compared(_BY_KEY[key], found[one.first], found[one.second], better))
        rows.append(row)
    return _markdown(["", "paper", "ours", "ours"], rows)


def _compared(
    metric: Metric, first: Mapping[int, Figures], second: Mapping[int, Figures], better: bool
) -> str:
    both = sorted(first.keys() & second.keys())
    if not both:
        return ""
    pairs = [(first[seed][metric.key], second[seed][metric.key]) for seed in both]
    same = sum(
        (after < before if metric.less_is_better else after > before) == better
        for before, after in pairs
    )
    means = [statistics.mean(side) for side in zip(*pairs, strict=True)]
    told = " to ".join(f"{mean:.{metric.digits}f}" for mean in means)
    return f"{metric.told} {told}; the paper's sign in {same} of {len(both)}"
