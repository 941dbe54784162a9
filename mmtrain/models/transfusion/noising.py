"""What a rank makes of a micro-batch: pictures become noisy latents beside the wanted answer.

Everything that is drawn is a function of the row number of an image's begin token, which the
document's draw and the position in it decide (`nn.noise`): its time, its noise, the sample of the
VAE's posterior, and whether the image sees what stands before it. So layouts, packing, workers and
resuming change none of it, and two images of one document are independent.

An image without its condition is an interval: its rows and its begin token see nothing before that
token. Positions stay, and rotary logits know distances alone, so to a sampler the null condition is
one begin token by itself.

N images   n rows an image   T packed rows   C channels, h x w size of latents
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.data.batch import Batch, Targets
from mmtrain.data.tokens import SequenceFormat
from mmtrain.encoders import vae as vaes
from mmtrain.encoders.vae import Vae
from mmtrain.errors import ContentError
from mmtrain.models.pictures import Pictures
from mmtrain.models.spec import Use
from mmtrain.models.transfusion.config import TransfusionConfig
from mmtrain.models.transfusion.edges import beside_numbers, rows_of
from mmtrain.models.transfusion.model import TIMES
from mmtrain.nn.diffusion import NoiseProcess, draw_times
from mmtrain.nn.flow import CARRY, Flow
from mmtrain.nn.noise import mix, normals, seed_of, uniforms

FIELDS = ("tokens", "positions", "lo", "hi", "labels", "slots", CARRY, TIMES)
TEXT, IMAGE = "text", "image"  # the losses
_TIME, _NOISE, _LATENT, _DROP = (seed_of("transfusion", use) for use in range(4))


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
        self.image, self.noise, self.layout = config.image, config.noise, layout
        self.device = device
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
            `inputs.hidden` `[N, 2C, h, w]`, noisy and wanted, with the fields `FIELDS`, and one
            weight an image.
        """
        told = batch.inputs.fields
        images = Images.of(batch, self.image.rows, self.layout)
        limits = torch.where(images.followed_N, self.noise.limit, self._process.steps)
        times_N = draw_times(
            mix(images.seeds_N ^ _TIME), limits, self._process.steps, self.noise.times
        )
        dropped_N = uniforms(mix(images.seeds_N ^ _DROP), 1)[:, 0] < self._drop
        count = len(images.seeds_N)
        fields = {
            **told,
            "lo": images.without_condition(told["lo"], dropped_N),
            CARRY: torch.zeros(count * self._carried, dtype=torch.int64),
            TIMES: times_N,
        }
        pixels = batch.inputs.hidden
        hidden = pixels
        if pixels.numel():
            clean = self._latents.of(pixels, images)
            noise = normals(mix(images.seeds_N ^ _NOISE), clean[0].numel()).view_as(clean)
            hidden = self._process.mix(clean, noise.to(clean.device), times_N)
        return replace(
            batch,
            inputs=Flow(hidden, {name: fields[name] for name in FIELDS}),
            targets=_an_image_each(
                batch.targets, self._process.weights(times_N, self.noise.snr_limit)
            ),
            # moments are looked at by the first three channels of their mean
            pixels=pixels[:, :3].clamp(-1, 1),
        )


class Latents:
    """From pixels to what is diffused: by a frozen VAE, or as they are."""

    def __init__(self, config: TransfusionConfig, device: torch.device) -> None:
        """Nothing is read yet."""
        self.image, self.device = config.image, device
        self._vae: Vae | None = None
        self._told: Tensor | None = None  # mean and deviation of each channel
        if config.image.latent_std:
            told = [config.image.latent_mean, config.image.latent_std]
            self._told = torch.tensor(told, device=device).view(2, 1, -1, 1, 1)

    @property
    def vae(self) -> Vae | None:
        """The frozen VAE, read when it is first asked for; None when pixels are diffused.

        Raises:
            MissingError, ContentError: it is not there, or makes latents of another form.
        """
        if self._vae is None and self.image.vae is not None:
            self._vae = Vae(Path(self.image.vae), self.device)
            facts, image = self._vae.facts, self.image
            if (facts.channels, facts.factor) != (image.channels, image.factor):
                raise ContentError(
                    f"{image.vae}: makes {facts.channels} channels, {facts.factor} pixels a "
                    f"latent; model.image.channels is {image.channels} and model.image.factor "
                    f"{image.factor}: set them, or name another VAE"
                )
        return self._vae

    def of(self, pixels: Tensor, images: "Images") -> Tensor:
        """Clean latents `[N, C, h, w]`, drawn from the posterior by each image's seed.

        Where latents were made before, their moments stand where pixels would.
        """
        if self.image.latents is not None:
            moments = pixels.to(self.device)
        elif self.vae is None:
            return pixels
        else:
            moments = self.moments(pixels)
        moments = self._normalised(moments)
        spread = normals(mix(images.seeds_N ^ _LATENT), moments[0].numel() // 2)
        return vaes.draw(moments, spread.to(moments.device).view_as(vaes.mode(moments)))

    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and log variance `[N, 2C, h, w]` of the VAE's posterior."""
        assert self.vae is not None, "pixels are their own latents"
        return self.vae.encode(pixels)

    def likeliest(self, pixels: Tensor) -> Tensor:
        """Clean latents `[N, C, h, w]`, the mode of the posterior."""
        return pixels if self.vae is None else vaes.mode(self._normalised(self.vae.encode(pixels)))

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `[N, 3, S, S]` in about -1..1."""
        if self.vae is None:
            return latents
        if self._told is not None:
            latents = latents * self._told[1] + self._told[0]
        return self.vae.decode(latents)

    def _normalised(self, moments: Tensor) -> Tensor:
        """Moments of latents with mean 0 and deviation 1, where their statistics are known."""
        if self._told is None:
            return moments
        (mean, std), (found, spread) = self._told, moments.chunk(2, 1)
        return torch.cat([(found - mean) / std, spread - 2 * std.log()], 1)


class Images:
    """Where the images of a micro-batch stand.

    Attributes:
        seeds_N: int64, row number of each begin token; 0 for those that stand in for none.
        begins_N: int64, row of each begin token.
        real_N: boolean, false for those that stand in for none.
        followed_N: boolean, whether text follows in the same document.
    """

    def __init__(
        self, begins_N: Tensor, real_N: Tensor, seeds_N: Tensor, followed_N: Tensor, rows: int
    ) -> None:
        """Use `of`."""
        self.begins_N, self.real_N = begins_N, real_N
        self.seeds_N, self.followed_N = seeds_N, followed_N
        self._rows = rows

    @classmethod
    def of(cls, batch: Batch, rows: int, layout: SequenceFormat) -> "Images":
        """Read them off the fields of a micro-batch; an image takes `rows` rows."""
        fields = batch.inputs.fields
        tokens_T, lo_T = fields["tokens"], fields["lo"]
        pictures = Pictures.of(batch, rows)
        begins_N, real_N = pictures.begins_N, pictures.real_N
        marks = [layout.bos, layout.eos, layout.pad]
        marks += [layout.image_begin, layout.image_slot, layout.image_end]
        words_T = ~torch.isin(tokens_T, torch.tensor(marks))
        row_T = torch.arange(len(tokens_T))
        last_T = torch.zeros_like(row_T).scatter_reduce(
            0, lo_T, torch.where(words_T, row_T, -1), "amax"
        )  # at the first row of each document: its last word
        followed_N = real_N & (last_T[lo_T[begins_N]] > begins_N)
        return cls(begins_N, real_N, pictures.seeds_N, followed_N, rows)

    def without_condition(self, lo_T: Tensor, dropped_N: Tensor) -> Tensor:
        """First keys of the rows when some images see nothing before their begin token."""
        begins = self.begins_N[dropped_N & self.real_N, None]
        own = begins + torch.arange(self._rows + 1)
        return lo_T.index_put((own.flatten(),), begins.expand_as(own).flatten())


def _an_image_each(targets: Targets, share_N: Tensor) -> Targets:
    """One weight and origin for each image, where the loader gives one for each of its pairs.

    Args:
        targets: of the loader.
        share_N: what each image's weight is multiplied by.
    """

    def first(group: Tensor) -> Tensor:
        return group.view(len(share_N), -1)[:, 0].contiguous()

    weights = {**targets.weights, IMAGE: first(targets.weights[IMAGE]) * share_N}
    return Targets(weights, {**targets.origins, IMAGE: first(targets.origins[IMAGE])})
