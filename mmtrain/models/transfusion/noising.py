"""What a rank makes of a micro-batch: pictures become noisy latents beside the wanted answer.

Everything that is drawn is a function of the row number of an image's begin token, which the
document's draw and the position in it decide (`nn.noise`): its time, its noise, the sample of the
VAE's posterior, and whether the image sees what stands before it. Which images of a document are
clean is a function of the row number of its first token. So layouts, packing, workers and resuming
change none of it, and two images of one document are independent.

Where the images stand, and who sees them, is in `rows`.

N images   n rows an image   T packed rows   C channels, h x w size of latents
"""

from dataclasses import replace

import torch
from torch import Tensor

from mmtrain.data.batch import Batch, Targets
from mmtrain.data.tokens import SequenceFormat
from mmtrain.models.pictures import an_image_each
from mmtrain.models.spec import Use
from mmtrain.models.transfusion.config import Context, TransfusionConfig
from mmtrain.models.transfusion.edges import beside_numbers, rows_of
from mmtrain.models.transfusion.latents import Latents
from mmtrain.models.transfusion.model import TIMES
from mmtrain.models.transfusion.rows import ImageRows
from mmtrain.nn.block import UNTIL
from mmtrain.nn.diffusion import NoiseProcess, draw_times
from mmtrain.nn.flow import CARRY, Flow
from mmtrain.nn.noise import mix, normals, seed_of, uniforms

FIELDS = ("tokens", "positions", "lo", "hi", UNTIL, "labels", "slots", CARRY, TIMES)
TEXT, IMAGE = "text", "image"  # the losses
_TIME, _NOISE, _LATENT, _DROP, _CLEAN = (seed_of("transfusion", use) for use in range(5))


class Noising:
    """Makes micro-batches ready for the engine; see the module."""

    def __init__(
        self, config: TransfusionConfig, layout: SequenceFormat, device: torch.device, use: Use
    ) -> None:
        """Take the sizes; the VAE is read when the first picture comes.

        Args:
            config: of the model.
            layout: of its sequences.
            device: of the frozen VAE.
            use: held-out images never lose their condition.
        """
        self.config, self.noise, self.layout = config, config.noise, layout
        self._process = NoiseProcess.of(config.noise.path, config.noise.answer, config.noise.steps)
        self._drop = config.noise.drop if use is Use.training else 0.0
        numbers = config.image.values * config.image.rows + beside_numbers(config.image)
        self._carried = rows_of(numbers, config.language.width)
        self._latents = Latents(config, device)

    def __call__(self, batch: Batch) -> Batch:
        """Draw and mix.

        Args:
            batch: of the loader; `inputs.hidden` `[N, 3, S, S]` in -1..1, stored moments
                `[N, 2C, h, w]`, or no numbers on a stage that needs none.

        Returns:
            `inputs.hidden` `[N, 2C, h, w]`, noisy and wanted, with copies `[N, 3C, h, w]`, noisy,
            wanted and clean; the fields `FIELDS`; one weight an image, 0 for clean ones.
        """
        told = batch.inputs.fields
        images = ImageRows.of(told, self.config, self.layout)
        clean_N = self._clean(images)
        times_N = self._times(images, clean_N)
        dropped_N = uniforms(mix(images.seeds_N ^ _DROP), 1)[:, 0] < self._drop
        count = len(images.seeds_N)
        fields = {
            **told,
            "positions": images.positions(told["positions"], self.config.image.positions),
            "lo": images.without_condition(told["lo"], dropped_N & ~clean_N),
            "hi": images.ends_of_views(told["hi"]),
            UNTIL: images.ends_of_keys(),
            CARRY: torch.zeros(count * self._carried, dtype=torch.int64),
            TIMES: times_N,
        }
        pixels = batch.inputs.hidden
        hidden = self._mixed(pixels, images, times_N) if pixels.numel() else pixels
        return replace(
            batch,
            inputs=Flow(hidden, {name: fields[name] for name in FIELDS}),
            targets=_weighed(batch.targets, self._shares(times_N, clean_N)),
            # moments are looked at by the first three channels of their mean
            pixels=pixels[:, :3].clamp(-1, 1),
        )

    def _mixed(self, pixels: Tensor, images: ImageRows, times_N: Tensor) -> Tensor:
        clean = self._latents.of(pixels, mix(images.seeds_N ^ _LATENT))
        noise = normals(mix(images.seeds_N ^ _NOISE), clean[0].numel()).view_as(clean)
        hidden = self._process.mix(clean, noise.to(clean.device), times_N)
        return hidden if images.copies == 1 else torch.cat([hidden, clean], 1)

    def _shares(self, times_N: Tensor, clean_N: Tensor) -> Tensor:
        """What the weight of each image is multiplied by: 0 where there is nothing to answer."""
        weights_N = self._process.weights(times_N.clamp(min=1), self.noise.snr_limit)
        return torch.where(clean_N, 0.0, weights_N)

    def _times(self, images: ImageRows, clean_N: Tensor) -> Tensor:
        """A time of each image, 0 for clean ones."""
        steps, noise = self._process.steps, self.noise
        seen_N = images.followed_N & (images.copies == 1)  # noised, by words behind it
        limits_N = torch.where(seen_N, noise.limit, steps)
        times_N = draw_times(mix(images.seeds_N ^ _TIME), limits_N, steps, noise.times)
        return torch.where(clean_N, 0, times_N)

    def _clean(self, images: ImageRows) -> Tensor:
        """Which images are clean: under `prefix_clean` the first ones of most documents.

        How many is uniform from 1 to all that something behind them can see, which leaves out a
        last image that no words follow.
        """
        if self.noise.context is not Context.prefix_clean:
            return torch.zeros_like(images.real_N)
        drawn = uniforms(mix(images.document_seeds_N ^ _CLEAN), 2)
        most_N = images.usable_N
        count_N = 1 + (drawn[:, 1] * most_N).long().clamp(max=most_N - 1)
        some_N = (drawn[:, 0] >= self.noise.all_noised) & (most_N > 0) & images.real_N
        return some_N & (images.order_N < count_N)


def _weighed(targets: Targets, share_N: Tensor) -> Targets:
    """One weight and origin for each image, where the loader gives one for each of its pairs.

    Args:
        targets: of the loader.
        share_N: what each image's weight is multiplied by.
    """
    weights, origins = (
        an_image_each(group[IMAGE], len(share_N)) for group in (targets.weights, targets.origins)
    )
    return Targets(
        {**targets.weights, IMAGE: weights * share_N}, {**targets.origins, IMAGE: origins}
    )
