"""A model that writes images and a visual decoder that draws them.

The frozen model writes the visual rows of an image after a prompt; the decoder run, trained on
such rows, turns them into a picture (Emu, arXiv:2307.05222, section 2.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image
from torch import Tensor

from mmtrain import recipe as recipes
from mmtrain.decoder.drawers import load_drawer
from mmtrain.errors import ContentError
from mmtrain.generation.prompts import Piece
from mmtrain.models.emu.drawing import EmuDrawer
from mmtrain.ops import select
from mmtrain.ops.select import Preference
from mmtrain.settings import Null, Phase, Recipe, Scheduler
from mmtrain.trained import Style, Trained, load_run


@dataclass(frozen=True)
class Artist:
    """A writer of images, and what draws them, if anything does."""

    trained: Trained
    drawer: EmuDrawer | None
    style: Style

    @classmethod
    def load(
        cls,
        run: Path,
        decoder: Path | None = None,
        checkpoint: str | None = None,
        style: Style | None = None,
        attention: Preference | None = None,
    ) -> "Artist":
        """Read a run and, when one is named, a decoder run.

        Args:
            run: what writes; of a decoder run, the model that it was trained to draw for writes.
            decoder: a run of the phase decoder.
            checkpoint: of `run`, by name; None for the newest.
            style: how to draw.
            attention: what runs the ops; None for what the recipe of `run` says.

        Raises:
            MissingError: a part of a run is not there, or the kernels that it insists on.
            RecipeError: a recipe has faults.
            ContentError: the decoder draws rows of another shape, or not by that scheduler.
        """
        style = style or Style()
        recipe = recipes.examine(run / "recipe.yaml").recipe
        if recipe is not None:  # else a loader below says what is wrong with it
            select.use(attention or recipe.ops.attention)
        language = None if recipe is None else _writer_of(recipe)
        if language is not None:
            drawer: EmuDrawer | None = load_drawer(run, checkpoint=checkpoint)
            trained = load_run(language)
        else:
            drawer = None if decoder is None else load_drawer(decoder)
            trained = load_run(run, checkpoint)
        if drawer is None:
            return cls(trained.drawing(style), None, style)
        _fits(drawer, trained, decoder or run)
        known = [scheduler.value for scheduler in Scheduler]
        if style.scheduler is not None and style.scheduler not in known:
            raise ContentError(
                f"scheduler {style.scheduler}: {decoder or run} draws by {', '.join(known)}; name "
                "one of them"
            )
        return cls(trained, drawer, style)

    @property
    def draws(self) -> bool:
        """Whether pictures come of it: by a decoder, or by the model itself."""
        return self.drawer is not None or self.trained.sampler.draws

    def draw(self, rows: Sequence[Sequence[Piece]]) -> list[Image.Image]:
        """The picture that follows each prompt."""
        prompts = [self.trained.prompt(row) for row in rows]
        if self.trained.sampler.draws:
            written = self.trained.drawing(self.style).rollout(prompts)
            found = [self.trained.sampler.picture(image) for image in written]
            return [picture for picture in found if picture is not None]
        embeddings_BQD = self.trained.rollout(prompts)
        return self.pictures(embeddings_BQD, 0)

    def pictures(self, embeddings_BQD: Tensor, first: int) -> list[Image.Image]:
        """Pictures number `first` and on of a call, one for each embedding."""
        assert self.drawer is not None
        usual, style = self.drawer.config.draw, self.style
        return self.drawer.draw(
            embeddings_BQD,
            null_QD=self.null_QD,
            scheduler=style.scheduler or usual.scheduler.value,
            steps=style.steps or usual.steps,
            guidance=usual.guidance if style.guidance is None else style.guidance,
            seeds=[style.seed + first + k for k in range(len(embeddings_BQD))],
        )

    @cached_property
    def null_QD(self) -> Tensor | None:
        """What stands for no condition: the rows after an empty prompt, or None for zeros."""
        if self.drawer is None or self.drawer.config.unconditional is Null.zeros:
            return None
        return self.trained.rollout([self.trained.prompt([])])[0]


def _writer_of(recipe: Recipe) -> Path | None:
    """The model that a decoder run was trained to draw for; None of any other run."""
    if recipe.phase is not Phase.decoder or recipe.decoder.language is None:
        return None
    return Path(recipe.decoder.language)


def _fits(drawer: EmuDrawer, trained: Trained, decoder: Path) -> None:
    rows, width = trained.layout.visual_tokens, trained.sampler.width
    sizes = drawer.sizes
    if (sizes.conditions, sizes.condition_width) != (rows, width):
        raise ContentError(
            f"{decoder} draws {sizes.conditions} rows of width {sizes.condition_width}, "
            f"{trained.folder} writes {rows} of width {width}; name a decoder that was trained on "
            "this model"
        )
