"""A trained run, ready to write: recipe, tokenizer and full weights on one device.

Whatever layout trained the run: full tensors are merged from the checkpoint by name.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from mmtrain import recipe as recipes
from mmtrain.checkpoint import portable
from mmtrain.data import images
from mmtrain.data.document import Modality, Part
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary
from mmtrain.errors import ContentError
from mmtrain.models.families import spec_of
from mmtrain.models.spec import ModelSpec
from mmtrain.models.writing import Limits, Prompt, TrunkSampler
from mmtrain.nn.choice import Choose, Nucleus, greedy
from mmtrain.settings import Recipe
from mmtrain.supply import layout_of

BATCH = 64  # prompts written at a time


@dataclass(frozen=True, kw_only=True)
class Style:
    """How pictures are drawn; None is what the recipe of what draws them says.

    Attributes:
        scheduler: of a decoder pndm (as released), ddim or dpm; of a model that draws by itself
            ddpm or ddim.
        steps: of the scheduler.
        guidance: unconditional + guidance * (conditional - unconditional); 1 = no guidance.
        seed: of the first picture; the k-th of a call is drawn from a seed of its own.
    """

    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0


class Weights(Protocol):
    """Full tensors by canonical name."""

    def get(self, name: str) -> Tensor:
        """One of them."""
        ...


@dataclass(frozen=True)
class Trained:
    """A run that can write."""

    folder: Path
    recipe: Recipe
    vocabulary: Vocabulary
    layout: SequenceFormat
    sampler: TrunkSampler

    def prompt(self, pieces: Sequence[str | Image.Image | Part]) -> Prompt:
        """<s>, then texts and pictures in order; parts of documents may be markup and clips."""
        layout = self.layout
        group = [layout.image_begin, *[layout.image_slot] * layout.visual_tokens, layout.image_end]
        tokens, pixels = [layout.bos], []
        for piece in pieces:
            if isinstance(piece, str):
                tokens += self.vocabulary.encode(piece) if piece.strip() else []
            elif isinstance(piece, Part) and piece.modality is Modality.text:
                tokens += self.vocabulary.encode_part(piece)
            elif isinstance(piece, Part):
                tokens += group * len(piece.media)
                pixels += [images.decode(blob, layout) for blob in piece.media]
            else:
                tokens += group
                pixels.append(pixels_of(piece, layout))
        context = spec_of(self.recipe.family, self.recipe.phase).context(self.recipe.model)
        if len(tokens) >= context:
            raise ContentError(
                f"a prompt of {len(tokens)} positions leaves no room in a context of {context}; "
                "shorten it or leave images out"
            )
        return Prompt(tuple(tokens), torch.stack(pixels) if pixels else None)

    def drawing(self, style: Style) -> "Trained":
        """The same run, told how to draw images where it draws them itself."""
        return replace(self, sampler=self.sampler.drawing(**vars(style)))

    def write(
        self, prompts: Sequence[Prompt], new_tokens: int, nucleus: Nucleus | None = None
    ) -> list[str]:
        """Text after each prompt: the likeliest, or drawn from the nucleus."""
        out = []
        for start, chunk in _chunks(prompts):
            ids = self.sampler.text(chunk, new_tokens, _choice(nucleus, start, len(chunk)))
            out += [self.vocabulary.decode(row) for row in ids]
        return out

    def interleave(
        self, prompts: Sequence[Prompt], limits: Limits, nucleus: Nucleus | None = None
    ) -> list[list[str | Tensor]]:
        """Texts and visual rows `[Q, D]` in turn after each prompt (`EmuSampler.write`)."""
        out: list[list[str | Tensor]] = []
        for start, chunk in _chunks(prompts):
            choose = _choice(nucleus, start, len(chunk))
            for pieces in self.sampler.write(chunk, limits, choose):
                decode = self.vocabulary.decode
                texts = [p if isinstance(p, Tensor) else decode(p) for p in pieces]
                out.append([piece for piece in texts if isinstance(piece, Tensor) or piece])
        return out

    def rollout(self, prompts: Sequence[Prompt]) -> Tensor:
        """Visual rows `[B, Q, D]` of the image that follows each prompt."""
        return torch.cat([self.sampler.rollout(chunk) for _, chunk in _chunks(prompts)])


def _chunks(prompts: Sequence[Prompt]) -> Iterator[tuple[int, Sequence[Prompt]]]:
    for start in range(0, len(prompts), BATCH):
        yield start, prompts[start : start + BATCH]


def _choice(nucleus: Nucleus | None, first: int, count: int) -> Choose:
    return greedy if nucleus is None else nucleus.rows(first, count)


def pixels_of(picture: Image.Image, layout: SequenceFormat) -> Tensor:
    """Normalised pixels of a picture, float32 `[3, image_size, image_size]`."""
    return images.decode(images.encode_png(picture.convert("RGB")), layout)


def load_run(run: Path, checkpoint: str | None = None) -> Trained:
    """Read a run's recipe, tokenizer and weights; running means of these where it keeps them.

    Raises:
        MissingError: a part of the run is not there.
        RecipeError: its recipe has faults.
    """
    recipe = recipes.read(run / "recipe.yaml")
    spec = spec_of(recipe.family, recipe.phase)
    vocabulary = load_vocabulary(Path(recipe.data.tokenizer))
    tensors = portable.open_averaged(run / "checkpoints" / checkpoint if checkpoint else run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = layout_of(recipe, vocabulary)
    layers = load_layers(spec, recipe.model, tensors, device)
    sampler = spec.sampler(recipe.model, layers, layout)
    # a family may train on other groups of rows than it writes
    return Trained(run, recipe, vocabulary, sampler.form, sampler)


def load_layers(
    spec: ModelSpec, config: Any, tensors: Weights, device: torch.device
) -> dict[str, torch.nn.Module]:
    """Every layer of a family with the given weights, on one device, in order of the fold."""
    out = {}
    for layer in spec.layers(config):
        with torch.device("meta"):
            module = layer.build()
        for path, owner in module.named_modules():
            for leaf in list(owner._parameters):
                if owner._parameters[leaf] is not None:
                    name = ".".join(part for part in (layer.name, path, leaf) if part)
                    parameter = torch.nn.Parameter(tensors.get(name).to(device))
                    owner._parameters[leaf] = parameter.requires_grad_(False)
        out[layer.name] = module.eval()
    return out
