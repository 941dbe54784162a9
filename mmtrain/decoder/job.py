"""The decoder phase on one rank, put together for the loop: loader, held-out samples, sketches."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL.Image import Image

from mmtrain.data.batch import Batch
from mmtrain.data.loader import Loader, Workers, heldout_batches
from mmtrain.data.mixture import Mixture, OnePass, Source
from mmtrain.data.pairs import PairAssembler, PairPlan, Pairs
from mmtrain.data.picture import draw_rows
from mmtrain.decoder.conditions import Samples
from mmtrain.decoder.sketches import Sketcher, look_of, text_of
from mmtrain.errors import ExitCode
from mmtrain.parallel.mesh import Mesh
from mmtrain.settings import Recipe
from mmtrain.supply import mixture_of
from mmtrain.train.ema import Ema, held_weights
from mmtrain.train.engine import Engine
from mmtrain.train.loop import Heldout
from mmtrain.train.state import TrainState


@dataclass(frozen=True)
class DecoderJob:
    """What the loop needs in the decoder phase.

    Attributes:
        recipe: of the run.
        samples: its data and frozen models.
        sources: training sources.
        heldout_sources: held-out ones.
        mesh: this rank's place.
    """

    recipe: Recipe
    samples: Samples
    sources: list[Source]
    heldout_sources: list[Source]
    mesh: Mesh

    def loader(self, state: TrainState) -> Loader[Pairs]:
        """Samples of this data rank from `state.data_step` on."""
        recipe = self.recipe
        plan = self.samples.plan(mixture_of(recipe, self.sources))
        plan.seek(state.mark)
        return Loader(
            plan,
            self.samples.assembler(self.sources, recipe.decoder.drop),
            global_batch_packs=recipe.train.global_batch_packs,
            micro_batch_packs=recipe.train.micro_batch_packs,
            data_rank=self.mesh.data,
            data_ranks=self.mesh.dims.data,
            workers=Workers(count=recipe.data.workers, prefetch=recipe.data.prefetch),
            start_step=state.data_step,
            decode_failures=recipe.data.failure_limits,
        )

    def heldout(self) -> Iterator[Heldout]:
        """The held-out sources, each sample with the same noise every time."""
        micro, ranks = self.recipe.train.micro_batch_packs, self.mesh.dims.data
        for source in self.heldout_sources:
            plan = self.samples.plan(OnePass(source))
            packs = min(self.recipe.validate.packs, plan.packs())
            batches = partial(
                self._read, plan, self.samples.assembler([source], drop=0.0), packs=packs
            )
            yield Heldout(source.name, math.ceil(packs / (micro * ranks)), batches)

    def _read(self, plan: PairPlan, assembler: PairAssembler, packs: int) -> list[Batch]:
        found = heldout_batches(
            plan,
            assembler,
            packs=packs,
            micro_batch_packs=self.recipe.train.micro_batch_packs,
            data_rank=self.mesh.data,
            data_ranks=self.mesh.dims.data,
        )
        return [self.samples.batch(pairs) for pairs in found]

    def sketcher(
        self,
        engine: Engine,
        ema: Ema | None,
        shapes: Mapping[str, tuple[int, ...]],
        folder: Path,
    ) -> Callable[[int], Image | None] | None:
        """Pictures of held-out captions by the running means, or the weights where none are kept.

        None when the recipe draws nothing while training.
        """
        if not self.recipe.decoder.draw.pictures:
            return None
        sources = self.heldout_sources or self.sources
        held = partial(held_weights, engine, ema)
        return Sketcher(self.samples, sources, self.mesh, shapes, held, folder)


def look_at_pairs(samples: Samples, mixture: Mixture, count: int, out: Path) -> int:
    """Draw the first `count` steps' worth of samples of a decoder recipe into `out`."""
    plan, batch = samples.plan(mixture), samples.recipe.train.global_batch_packs
    sources = mixture.sources
    for step in range(count):
        rows: list[list[str | Image]] = []
        for number in range(step * batch, step * batch + min(batch, 24)):
            (planned,) = plan.pack(number).documents
            document = sources[planned.source].documents.document(planned.number)
            rows.append([look_of(document), text_of(document)])
        path = out / f"step-{step:05d}.png"
        draw_rows(rows).save(path)
        print(f"{path}: {len(rows)} of {batch} samples")
    return ExitCode.DONE
