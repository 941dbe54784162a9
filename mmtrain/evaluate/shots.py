"""Examples shown before a question: the most similar pictures (RICES), or random ones.

RICES (Yang et al. 2021, arXiv:2109.05014; used for Flamingo and Emu): of a support set, the
examples whose pictures are most alike, by the cosine of image features; the most similar one
stands last, next to the question. Features are the run's own: the mean of its vision tower's
tokens after their norm. Cost: one pass of the vision tower over the support set.

N examples   C width of the vision tower   B questions
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mmtrain.data.rules import Draw
from mmtrain.errors import ContentError
from mmtrain.evaluate.examples import Example, ExampleSet
from mmtrain.evaluate.opening import open_pictures
from mmtrain.settings import ShotChoice
from mmtrain.trained import BATCH, Trained, pixels_of


@dataclass(frozen=True)
class Support:
    """Examples that may be shown.

    Attributes:
        examples: those whose pictures can be read.
        features_NC: of the first picture of each, length 1; None when shots are drawn at random.
        broken: a line for every example that was left out.
        seed: of random shots.
    """

    examples: tuple[Example, ...]
    features_NC: Tensor | None
    broken: tuple[str, ...]
    seed: int

    def choose(
        self, asked: Example, pictures: Sequence[Image.Image], trained: Trained, count: int
    ) -> list[Example]:
        """`count` examples of other pictures than the asked one, the most similar last."""
        if self.features_NC is None:
            order = Draw("shots", self.seed, asked.key).subset(
                len(self.examples), min(count + 1, len(self.examples))
            )
        else:
            feature_1C = features(trained, [pictures[0]])
            order = (self.features_NC @ feature_1C[0]).argsort().tolist()
        others = [self.examples[n] for n in order if self.examples[n].image != asked.image]
        return others[len(others) - count :] if count < len(others) else others


def prepare(found: ExampleSet, choice: ShotChoice, trained: Trained, seed: int) -> Support:
    """Make a support set ready; similar shots need the features of all its pictures."""
    if choice is ShotChoice.random:
        return Support(found.examples, None, found.broken, seed)
    kept: list[Example] = []
    broken = list(found.broken)
    rows: list[Tensor] = []
    for start in range(0, len(found.examples), BATCH):
        pictures = []
        for example in found.examples[start : start + BATCH]:
            try:
                pictures.append(open_pictures(example.pictures[:1])[0])
                kept.append(example)
            except ContentError as error:
                broken.append(f"{example.key}: {error}")
        if pictures:
            rows.append(features(trained, pictures))
    return Support(tuple(kept), torch.cat(rows) if rows else None, tuple(broken), seed)


def features(trained: Trained, pictures: Sequence[Image.Image]) -> Tensor:
    """Features of pictures, float32 `[B, C]` of length 1."""
    pixels = torch.stack([pixels_of(picture, trained.layout) for picture in pictures])
    return functional.normalize(trained.sampler.features(pixels).float(), dim=-1)
