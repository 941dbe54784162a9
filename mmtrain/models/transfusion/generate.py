"""Writing with a Transfusion on one device: text and images in turn (arXiv:2408.11039).

Text is written token by token. The token that begins an image switches to diffusion: n rows of pure
noise, whose latents are replaced at every step of the solver, see the prefix and each other. The
prefix never sees them, so its keys and values are made once and only read. A finished image enters
the cache by one pass at time 0 (a clean commit: later rows see the picture, not its last noise),
then its end token is put after it and text goes on.

Guidance needs the answer without a condition: training drops it by hiding everything before the
begin token, so the companion cache of a picture holds that one token.

Sequences that write text step together, then those that have begun an image are drawn together.
Noise is of the seed, the prompt and the number of the image, so neither batch nor order matter.

B sequences   n rows an image   T packed rows   D width   C channels, h x w size of latents
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self, cast

import torch
from PIL import Image
from torch import Tensor, nn

from mmtrain.data import images
from mmtrain.data.tokens import SequenceFormat
from mmtrain.errors import ContentError
from mmtrain.models.transfusion.config import Positions, TransfusionConfig
from mmtrain.models.transfusion.latents import Latents
from mmtrain.models.transfusion.model import ImageIn, TransfusionHead
from mmtrain.models.writing import Limits, Prompt, TrunkSampler, Writing, Written
from mmtrain.nn.cache import Block, KeyValueCache, Prefill
from mmtrain.nn.choice import Choose, greedy
from mmtrain.nn.diffusion import NoiseProcess, Solver, spaced_times
from mmtrain.nn.masks import Intervals
from mmtrain.nn.noise import normals, seed_of


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How images are drawn; `seed` is of their noise."""

    solver: Solver
    steps: int
    guidance: float  # unconditional + guidance * (conditional - unconditional); 1 = one pass a step
    seed: int = 0


class _Page:
    """A sequence that is being written."""

    def __init__(self, prompt: Prompt, limits: Limits, form: SequenceFormat) -> None:
        self.pieces: list[Written] = []
        self.prompt, self.form = prompt, form
        self.tokens_left, self.images_left = limits.new_tokens, limits.images
        self.images = 0  # written
        self.in_image = prompt.tokens[-1] == form.image_begin
        self.done = not self.in_image and not self.tokens_left

    @property
    def in_text(self) -> bool:
        return not self.done and not self.in_image

    def take(self, token: int) -> None:
        """One more token of text, or the beginning of an image."""
        if token == self.form.image_begin:
            self.in_image = True
            self.images_left -= 1
            return
        if not self.pieces or isinstance(self.pieces[-1], Tensor):
            self.pieces.append([])
        cast(list[int], self.pieces[-1]).append(token)
        self.tokens_left -= 1
        self.done = token == self.form.eos or not self.tokens_left

    def finish_image(self, pixels: Tensor) -> None:
        self.pieces.append(pixels)
        self.images += 1
        self.in_image = False
        self.done = not self.tokens_left


class TransfusionSampler(TrunkSampler):
    """A Transfusion on one device, and the ids its sequences are made of."""

    draws = True
    head: TransfusionHead

    def __init__(
        self, config: TransfusionConfig, layers: Mapping[str, nn.Module], form: SequenceFormat
    ) -> None:
        """Take the layers in order of the fold; they are used in place, on their device."""
        # no copies where a picture is known to be clean
        super().__init__(layers, replace(form, visual_tokens=config.image.rows))
        self.config = config
        self.shares_positions = config.image.positions is Positions.shared
        self.image = cast(ImageIn, layers["image"])
        noise = config.noise
        self.process = NoiseProcess.of(noise.path, noise.answer, noise.steps)
        self.latents = Latents(config, self.device)
        self.how = Drawing(solver=noise.solver, steps=noise.solver_steps, guidance=noise.guidance)

    def drawing(
        self,
        *,
        scheduler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
    ) -> Self:
        """The same sampler, told how to draw images; None keeps what its recipe says.

        Raises:
            ContentError: there is no such scheduler, or there are not so many steps.
        """
        known = [solver.value for solver in Solver]
        if scheduler is not None and scheduler not in known:
            raise ContentError(
                f"scheduler {scheduler}: this model draws by {' or '.join(known)}; name one of them"
            )
        if steps is not None and not 0 < steps <= self.process.steps:
            raise ContentError(
                f"{steps} steps: this model was trained on {self.process.steps}; use 1 to "
                f"{self.process.steps}"
            )
        other = copy(self)
        other.how = Drawing(
            solver=self.how.solver if scheduler is None else Solver(scheduler),
            steps=steps or self.how.steps,
            guidance=self.how.guidance if guidance is None else guidance,
            seed=seed,
        )
        return other

    def picture(self, image: Tensor) -> Image.Image | None:
        """Pixels `[3, S, S]` to look at."""
        return images.to_picture(image, self.form)

    def encode(self, pixels: Tensor) -> Tensor:
        """Rows `[n, n, D]` of clean images `[n, 3, S, S]`."""
        return self._rows(self.latents.likeliest(pixels.to(self.device)), 0)[0]

    def positions(self, slots_T: Tensor, tokens: Sequence[int]) -> Tensor:
        """Rotary positions of prompts' rows; those of an image may share one."""
        if not self.shares_positions:
            return slots_T
        slot, begin = self.form.image_slot, self.form.image_begin
        kinds = torch.tensor(tokens, device=self.device)
        saved = (kinds == slot) & (kinds.roll(1) != begin)  # but for the first row of an image
        saved_T = saved.long().cumsum(0)
        first_T = torch.arange(len(tokens), device=self.device) - slots_T  # of each sequence
        return slots_T - (saved_T - saved_T[first_T])

    @torch.inference_mode()
    def rollout(self, prompts: Sequence[Prompt]) -> Tensor:
        """Pixels `[B, 3, S, S]` of the image that follows each prompt."""
        opened = [Prompt((*p.tokens, self.form.image_begin), p.pixels) for p in prompts]
        pieces = self.write(opened, Limits(new_tokens=0, images=1))
        return torch.stack([cast(Tensor, one) for (one,) in pieces])

    @torch.inference_mode()
    def write(
        self, prompts: Sequence[Prompt], limits: Limits, choose: Choose = greedy
    ) -> list[list[Written]]:
        """Continue each prompt with text and images in turn.

        An image, given as pixels `[3, S, S]`, begins where a prompt ends with the begin token, and
        where the model chooses that token.
        """
        room = limits.new_tokens + (limits.images + 1) * self.form.group_length
        writing, hidden_BD = self.start(prompts, room)
        hidden_BD = hidden_BD.clone()
        pages = [_Page(prompt, limits, self.form) for prompt in prompts]
        while not all(page.done for page in pages):
            texts = [number for number, page in enumerate(pages) if page.in_text]
            if texts:
                ids = self._next(hidden_BD, pages, texts, choose)
                for number, token in zip(texts, ids, strict=True):
                    pages[number].take(token)
                following = {n: t for n, t in zip(texts, ids, strict=True) if not pages[n].done}
            else:
                begun = [number for number, page in enumerate(pages) if page.in_image]
                self._draw(writing, pages, begun)
                following = {n: self.form.image_end for n in begun if not pages[n].done}
            if following:
                which = self.ids(list(following))
                rows_BD = self.embed.tokens(self.ids(list(following.values())))
                position_B1 = writing.position_B[which, None]
                hidden_BD[which] = self._put(writing, which, rows_BD[:, None], position_B1)[:, 0]
        return [page.pieces for page in pages]

    def _next(
        self, hidden_BD: Tensor, pages: Sequence[_Page], texts: list[int], choose: Choose
    ) -> list[int]:
        form, logits_BV = self.form, self.head.logits(hidden_BD[texts])
        logits_BV[:, [form.bos, form.pad, form.image_slot, form.image_end]] = -torch.inf
        used_up = [pages[number].images_left <= 0 for number in texts]
        logits_BV[used_up, form.image_begin] = -torch.inf
        return [int(token) for token in choose(logits_BV, texts).tolist()]

    def _behind(self, writing: Writing, which: Tensor, count: int) -> Block:
        """What `count` new rows behind each of some sequences see."""
        causal = not self.form.sees_whole_image
        slot_B = writing.slot_B[which]
        return Block(writing.cache, which, slot_B, writing.longest, count, causal=causal)

    def _look(self, writing: Writing, which: Tensor, rows_BnD: Tensor) -> Tensor:
        """Trunk rows `[B, n, D]` of an image behind some sequences, which is not kept."""
        keys = self._behind(writing, which, rows_BnD.shape[1])
        return self._through(rows_BnD, keys, self._of_image(writing.position_B[which]))

    def _put(
        self, writing: Writing, which: Tensor, rows_BnD: Tensor, positions_Bn: Tensor
    ) -> Tensor:
        """Trunk rows `[B, n, D]` of rows that some sequences keep, at their positions."""
        count = rows_BnD.shape[1]
        keys = replace(self._behind(writing, which, count), keeps=True)
        out = self._through(rows_BnD, keys, positions_Bn)
        writing.slot_B[which] += count
        writing.position_B[which] = positions_Bn[:, -1] + 1
        writing.longest = int(writing.slot_B.max())
        return out

    def _of_image(self, first_B: Tensor) -> Tensor:
        """Positions `[B, n]` of the rows of an image whose first row stands at `first`."""
        offset_n = torch.arange(self.config.image.rows, device=self.device)
        return first_B[:, None] + (0 * offset_n if self.shares_positions else offset_n)

    def _through(self, rows_BnD: Tensor, keys: Block, positions_Bn: Tensor) -> Tensor:
        """The trunk over new rows."""
        out = self.fold(rows_BnD.flatten(0, 1), positions_Bn.flatten(), keys)
        return out.view_as(rows_BnD)

    def _draw(self, writing: Writing, pages: Sequence[_Page], begun: list[int]) -> None:
        """The images that some sequences have begun: draw, keep those that are read on, decode."""
        which = self.ids(begun)
        seeds = [seed_of(self.how.seed, pages[n].prompt.tokens, pages[n].images) for n in begun]
        clean = self._solve(writing, which, self.ids(seeds))
        pixels = self.latents.decode(clean)
        for number, picture in zip(begun, pixels, strict=True):
            pages[number].finish_image(picture)
        read_on = [place for place, number in enumerate(begun) if not pages[number].done]
        if read_on:
            rows, _ = self._rows(clean[read_on], 0)
            kept = which[read_on]
            self._put(writing, kept, rows, self._of_image(writing.position_B[kept]))

    def _solve(self, writing: Writing, which: Tensor, seeds_B: Tensor) -> Tensor:
        """Clean latents `[B, C, h, w]` out of noise."""
        shape = self.head.shape
        numbers = shape[0] * shape[1] * shape[2]
        times = spaced_times(self.process.steps, self.how.steps)
        ancestral = self.how.solver is Solver.ddpm
        x = normals(seeds_B, numbers).view(-1, *shape)
        guided = self.how.guidance != 1.0
        null = self._null(writing.position_B[which]) if guided else None
        for now, then in pairwise(times):
            rows, beside = self._rows(x, now)
            answer = self.head.answered(self._look(writing, which, rows), beside).float()
            if null is not None:
                untold = self._through(rows, null, self._of_image(writing.position_B[which]))
                nothing = self.head.answered(untold, beside).float()
                answer = nothing + self.how.guidance * (answer - nothing)
            fresh = None
            if ancestral and then:
                fresh = normals(seeds_B + 1 + then, numbers).view_as(x)
            limit = self.config.noise.clean_limit
            x = self.process.step(x, answer, (now, then), limit=limit, fresh=fresh)
        return x

    def _null(self, position_B: Tensor) -> Block:
        """What an image sees without its condition: its begin token, which saw nothing."""
        count = len(position_B)
        every = torch.arange(count, device=self.device)
        cache = KeyValueCache(count, 1)
        alone = Intervals.causal_lengths([1] * count, self.device)
        begins = self.embed.tokens(self.ids([self.form.image_begin] * count))
        self.fold(begins, position_B - 1, Prefill(cache, alone, every, torch.zeros_like(every)))
        causal = not self.form.sees_whole_image
        one = torch.ones_like(every)
        return Block(cache, every, one, 1, self.config.image.rows, causal=causal)

    def _rows(self, latents: Tensor, time: int) -> tuple[Tensor, Tensor]:
        """Rows `[N, n, D]` of latents at one time, and what the edge hands on beside them."""
        times_N = torch.full((len(latents),), time, device=self.device)
        return self.image.rows(latents, times_N)
