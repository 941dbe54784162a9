"""Mean and deviation of every channel of latents, over all pictures that were encoded.

Training draws latents from the VAE's posterior, so their variance is that of its means plus the
mean of its variances. Sums are kept for every part of a folder of latents, so nothing is read
again, and several processes may write parts.

n pictures   C channels, h x w size of latents
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mmtrain.errors import ContentError

MANIFEST = "manifest.json"  # of a folder of latents
SUMS = "sums.json"  # of one of its parts
KEY = "statistics"  # of the manifest


@dataclass(frozen=True)
class LatentStatistics:
    """What latents are normalised by.

    Attributes:
        mean: of each channel.
        std: deviation of each channel, of latents drawn from the posterior.
        pictures: how many it was taken of.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pictures: int


@dataclass(frozen=True)
class Sums:
    """Sums over the latents of some pictures, a channel each."""

    pictures: int
    values: int  # of one channel
    mean: tuple[float, ...]
    square: tuple[float, ...]  # of the posterior's means
    variance: tuple[float, ...]  # of the posterior

    @classmethod
    def none(cls, channels: int) -> Self:
        """Before the first picture."""
        zeros = (0.0,) * channels
        return cls(0, 0, zeros, zeros, zeros)

    @classmethod
    def of(cls, moments: Tensor) -> Self:
        """Of means and log variances `[n, 2C, h, w]`."""
        mean, spread = moments.double().chunk(2, 1)
        count, _, height, width = mean.shape
        found = (mean, mean.square(), spread.exp())
        sums = [tuple(float(x) for x in part.sum((0, 2, 3)).tolist()) for part in found]
        return cls(count, count * height * width, sums[0], sums[1], sums[2])

    def __add__(self, other: "Sums") -> "Sums":
        """Of the pictures of both."""

        def added(one: tuple[float, ...], two: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(a + b for a, b in zip(one, two, strict=True))

        return Sums(
            self.pictures + other.pictures,
            self.values + other.values,
            added(self.mean, other.mean),
            added(self.square, other.square),
            added(self.variance, other.variance),
        )

    def statistics(self) -> LatentStatistics:
        """Mean and deviation; there must be a picture."""
        sums = torch.tensor([self.mean, self.square, self.variance], dtype=torch.float64)
        mean, square, variance = sums / self.values
        std = (square - mean.square() + variance).clamp_min(0).sqrt()
        return LatentStatistics(tuple(mean.tolist()), tuple(std.tolist()), self.pictures)

    def write(self, folder: Path) -> None:
        """Keep them beside the rows of a part."""
        (folder / SUMS).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Sums of a part; None of one that was written before sums were kept.

        Raises:
            ContentError: the file is damaged.
        """
        path = folder / SUMS
        if not path.is_file():
            return None
        try:
            raw = json.loads(path.read_text())
            counts = [int(raw[key]) for key in ("pictures", "values")]
            sums = [tuple(map(float, raw[key])) for key in ("mean", "square", "variance")]
            return cls(counts[0], counts[1], sums[0], sums[1], sums[2])
        except (ValueError, KeyError, TypeError) as error:
            raise ContentError(f"{path} holds no sums of latents ({error!r})") from error


def record(folder: Path, parts: Iterable[Path]) -> LatentStatistics | None:
    """Write the statistics of a folder's parts into its manifest, once for ever.

    Runs take them from there when they begin; numbers that changed later would change what their
    latents are.

    Args:
        folder: of latents, all parts of which are there.
        parts: their folders.

    Returns:
        What the manifest holds; None where a part has no sums, or there is no picture.
    """
    content = json.loads((folder / MANIFEST).read_text())
    if KEY in content:
        return parsed(content)
    sums = [Sums.read(part) for part in parts]
    known = [part for part in sums if part is not None and part.pictures]
    if None in sums or not known:
        return None
    total = known[0]
    for part in known[1:]:
        total = total + part
    found = total.statistics()
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps({**content, KEY: asdict(found)}, indent=1) + "\n")
    partial.rename(folder / MANIFEST)
    return found


def read(folder: Path) -> LatentStatistics | None:
    """What a folder's manifest records; None where it records nothing, or there is none.

    Raises:
        ContentError: what it records is damaged.
    """
    path = folder / MANIFEST
    try:
        return parsed(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContentError(f"{path}: holds no statistics of latents ({error!r})") from error


def parsed(manifest: Mapping[str, Any]) -> LatentStatistics | None:
    """Of a manifest that was read."""
    raw = manifest.get(KEY)
    if raw is None:
        return None
    mean, std = (tuple(map(float, raw[key])) for key in ("mean", "std"))
    return LatentStatistics(mean, std, int(raw["pictures"]))
