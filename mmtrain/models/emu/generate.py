"""Writing with an Emu on one device: text (greedy, top-p, beam), visual embeddings, ranking.

Prompts may hold images. They are prefilled packed, without padding between them, then every step
adds one row a sequence through a key-value cache; by causality the result is that of a model
without a cache.

B sequences   T packed rows   D width   V vocabulary   Q visual rows of an image
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mmtrain.data.tokens import SequenceFormat
from mmtrain.errors import ContentError
from mmtrain.models.emu.model import EmuHead
from mmtrain.nn.block import KEYS
from mmtrain.nn.cache import KeyValueCache, Prefill, Step
from mmtrain.nn.choice import Beams, BeamSearch, Choose, greedy
from mmtrain.nn.embed import SplicedEmbedding, splice
from mmtrain.nn.flow import Flow
from mmtrain.nn.masks import Intervals


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a sequence starts with.

    Attributes:
        tokens: ids, <s> included; each image is [IMG], Q x <image>, [/IMG].
        pixels: normalised images `[n, 3, H, W]` in the order of their groups, or None.
    """

    tokens: tuple[int, ...]
    pixels: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a sequence may write."""

    new_tokens: int = 64  # of text, over all its pieces
    images: int = 0  # at most; 0 = text alone


Written = list[int] | Tensor  # text, or the visual rows [Q, D] of an image


class _Open:
    """A sequence that is being written: its pieces, and what its next row is."""

    def __init__(self, begins_image: bool, limits: Limits, form: SequenceFormat) -> None:
        self.pieces: list[Written] = []
        self.rows: list[Tensor] = []  # of the image in the making
        self.form = form
        self.tokens_left, self.images_left = limits.new_tokens, limits.images
        self.in_image = self.closing = False
        if begins_image:
            self._begin_image()
        self.done = not self.in_image and not self.tokens_left

    def take(self, token: int, visual_D: Tensor) -> int | Tensor:
        """Use what the last row predicts; the next row, as an id or as it is."""
        if self.in_image:
            self.rows.append(visual_D)
            if len(self.rows) == self.form.visual_tokens:
                self.pieces.append(torch.stack(self.rows))
                self.in_image, self.closing = False, True
                self.done = not self.tokens_left
            return visual_D
        if self.closing:  # [/IMG] is no label, so it is never asked for
            self.closing = False
            return self.form.image_end
        if self.done:
            return self.form.eos
        if token == self.form.image_begin:
            self._begin_image()
            return token
        if not self.pieces or isinstance(self.pieces[-1], Tensor):
            self.pieces.append([])
        cast(list[int], self.pieces[-1]).append(token)
        self.tokens_left -= 1
        self.done = token == self.form.eos or not self.tokens_left
        return token

    def _begin_image(self) -> None:
        self.in_image, self.rows = True, []
        self.images_left -= 1


@dataclass(frozen=True)
class Packed:
    """Sequences one after another in one row."""

    rows_TD: Tensor
    positions_T: Tensor
    segments_T: Tensor
    lengths: tuple[int, ...]

    @property
    def intervals(self) -> Intervals:
        """What each row sees: its own sequence up to itself."""
        return Intervals.causal_lengths(self.lengths, self.rows_TD.device)

    @property
    def last_B(self) -> Tensor:
        """Row of each sequence's last token."""
        return torch.tensor(self.lengths, device=self.rows_TD.device).cumsum(0) - 1


class Writing:
    """Sequences in the middle of being written: the cache and where each one stands."""

    def __init__(self, cache: KeyValueCache, lengths: Sequence[int], device: torch.device) -> None:
        """Start with `lengths` positions already in the cache."""
        self.cache = cache
        self.position_B = torch.tensor(lengths, device=device)
        self.longest = max(lengths)

    def select(self, sequence_B: Tensor) -> None:
        """Keep, copy and reorder sequences."""
        self.cache.select(sequence_B)
        self.position_B = self.position_B[sequence_B]

    def advance(self) -> Step:
        """Room for one more row a sequence."""
        self.longest += 1
        step = Step(self.cache, self.position_B, self.longest)
        self.position_B = self.position_B + 1
        return step


class EmuSampler:
    """An Emu built by `model.build_plain`, and the ids its sequences are made of."""

    def __init__(self, layers: Mapping[str, nn.Module], form: SequenceFormat) -> None:
        """Take the layers in order of the fold; they are used in place, on their device."""
        names = list(layers)
        self.form = form
        self._encoder = [layers[name] for name in names[: names.index("embed")]]
        self._tower = [layers[name] for name in names[: names.index("causal")]]
        self._blocks = [layers[name] for name in names if name.startswith("blocks.")]
        self._embed = cast(SplicedEmbedding, layers["embed"])
        self.head = cast(EmuHead, layers["head"])
        self.device = self._embed.tokens.weight.device
        self.width = int(self._embed.tokens.weight.shape[1])  # D

    def encode(self, pixels: Tensor) -> Tensor:
        """Visual rows `[n, Q, D]` of images `[n, 3, H, W]`."""
        flow = Flow(pixels.to(self.device), {})
        for layer in self._encoder:
            flow = layer(flow)
        return flow.hidden

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """Mean token of the vision tower `[n, C]` of images `[n, 3, H, W]`: how alike they are."""
        flow = Flow(pixels.to(self.device), {})
        for layer in self._tower:
            flow = layer(flow)
        return flow.hidden.mean(1)

    def pack(self, prompts: Sequence[Prompt]) -> Packed:
        """Embed prompts, visual rows in place, and lay them one after another.

        Raises:
            ContentError: a prompt's images do not fill its <image> positions.
        """
        for number, prompt in enumerate(prompts):
            self._check(number, prompt)
        lengths = tuple(len(prompt.tokens) for prompt in prompts)
        tokens_T = self._ids([token for prompt in prompts for token in prompt.tokens])
        rows_TD = self._embed.tokens(tokens_T)
        pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
        if sum(len(images) for images in pixels):
            slots = (tokens_T == self.form.image_slot).nonzero().squeeze(-1)
            visual_NQD = self.encode(torch.cat(pixels))
            rows_TD = splice(rows_TD, slots, visual_NQD.flatten(0, 1))
        return self._lay(rows_TD, lengths)

    def hidden(self, packed: Packed) -> Tensor:
        """Trunk rows `[T, D]` before the final norm, without a cache."""
        return self._fold(packed.rows_TD, packed.positions_T, packed.intervals)

    def start(self, prompts: Sequence[Prompt], room: int) -> tuple[Writing, Tensor]:
        """Prefill prompts and leave `room` more positions; also the last rows `[B, D]`."""
        return self.start_packed(self.pack(prompts), room)

    def start_packed(self, packed: Packed, room: int) -> tuple[Writing, Tensor]:
        """`start` for sequences that are embedded already."""
        cache = KeyValueCache(len(packed.lengths), max(packed.lengths) + room)
        keys = Prefill(cache, packed.intervals, packed.segments_T, packed.positions_T)
        hidden_TD = self._fold(packed.rows_TD, packed.positions_T, keys)
        return Writing(cache, packed.lengths, self.device), hidden_TD[packed.last_B]

    def step(self, writing: Writing, rows_BD: Tensor) -> Tensor:
        """Append one embedded row to every sequence; its trunk row `[B, D]`."""
        keys = writing.advance()
        return self._fold(rows_BD, keys.position_B, keys)

    @torch.inference_mode()
    def text(
        self, prompts: Sequence[Prompt], new_tokens: int, choose: Choose = greedy
    ) -> list[list[int]]:
        """Continue each prompt by at most `new_tokens` ids, the closing </s> included."""
        writing, hidden_BD = self.start(prompts, new_tokens)
        written: list[list[int]] = [[] for _ in prompts]
        for left in range(new_tokens, 0, -1):
            ids_B = choose(self.head.logits(hidden_BD))
            for ids, new in zip(written, ids_B.tolist(), strict=True):
                if not ids or ids[-1] != self.form.eos:
                    ids.append(new)
            if left == 1 or all(ids[-1] == self.form.eos for ids in written):
                break
            hidden_BD = self.step(writing, self._embed.tokens(ids_B))
        return written

    @torch.inference_mode()
    def write(
        self, prompts: Sequence[Prompt], limits: Limits, choose: Choose = greedy
    ) -> list[list[Written]]:
        """Continue each prompt with text and images in turn.

        An image begins where a prompt ends with [IMG], and where the model chooses [IMG], which
        it only learns with `data.learn_image_begin`. Its visual rows are fed back as they are, as
        in `rollout`; [/IMG] is put after them, and text goes on.
        """
        form = self.form
        begun = [prompt.tokens[-1] == form.image_begin for prompt in prompts]
        room = limits.new_tokens + (limits.images + 1) * (form.visual_tokens + 2)
        writing, hidden_BD = self.start(prompts, room)
        sequences = [_Open(image, limits, form) for image in begun]
        while True:
            logits_BV = self.head.logits(hidden_BD)
            logits_BV[:, [form.pad, form.image_slot, form.image_end]] = -torch.inf
            used_up = [one.images_left <= 0 for one in sequences]
            logits_BV[used_up, form.image_begin] = -torch.inf
            ids = choose(logits_BV).tolist()
            rows_BD = self.head.regressed(hidden_BD)
            following = [
                one.take(token, row)
                for one, token, row in zip(sequences, ids, rows_BD, strict=True)
            ]
            if all(one.done for one in sequences):
                return [one.pieces for one in sequences]
            tokens_B = [form.pad if isinstance(row, Tensor) else row for row in following]
            embedded_BD = self._embed.tokens(self._ids(tokens_B))
            rows_BD = torch.stack(
                [
                    row if isinstance(row, Tensor) else embedded
                    for row, embedded in zip(following, embedded_BD, strict=True)
                ]
            )
            hidden_BD = self.step(writing, rows_BD)

    @torch.inference_mode()
    def rollout(self, prompts: Sequence[Prompt]) -> Tensor:
        """Visual embeddings `[B, Q, D]` of the image that follows each prompt.

        [IMG] is appended; the regression head's output is fed back as it is, Q times.
        """
        steps = self.form.visual_tokens
        opened = [Prompt((*p.tokens, self.form.image_begin), p.pixels) for p in prompts]
        writing, hidden_BD = self.start(opened, steps)
        written = [self.head.regressed(hidden_BD)]
        while len(written) < steps:
            written.append(self.head.regressed(self.step(writing, written[-1])))
        return torch.stack(written, 1)

    @torch.inference_mode()
    def negative_log_likelihoods(
        self, prompt: Prompt, candidates: Sequence[Sequence[int]]
    ) -> Tensor:
        """Summed over each candidate's tokens after `prompt`, float32 `[len(candidates)]`.

        The release ranks by this sum over (prompt + candidate - 1) positions, lower is better.
        """
        base = self.pack([prompt]).rows_TD
        rows, labels = [], []
        for ids in candidates:
            rows += [base, self._embed.tokens(self._ids(ids))]
            labels += [[-100] * (len(prompt.tokens) - 1), ids, [-100]]
        lengths = tuple(len(prompt.tokens) + len(ids) for ids in candidates)
        packed = self._lay(torch.cat(rows), lengths)
        labels_T = self._ids([label for part in labels for label in part])
        loss_T = self.head.cross_entropy(self.head.logits(self.hidden(packed)), labels_T)
        return torch.stack([part.sum() for part in torch.split(loss_T, list(lengths))])

    @torch.inference_mode()
    def beam(self, prompt: Prompt, options: Beams) -> list[int]:
        """The best continuation of one prompt; </s> closes it when it fits."""
        writing, hidden_BD = self.start([prompt], options.new_tokens)
        search = BeamSearch(options, self.form.eos)
        writing.select(self._ids([0] * options.beams))
        hidden_BD = hidden_BD.expand(options.beams, -1)
        for _ in range(options.new_tokens):
            came_from, ids = search.extend(self.head.logits(hidden_BD).float().log_softmax(-1))
            if search.done or search.length > options.new_tokens:
                break
            writing.select(self._ids(came_from))
            hidden_BD = self.step(writing, self._embed.tokens(self._ids(ids)))
        return search.best()

    def _fold(self, rows: Tensor, positions: Tensor, keys: object) -> Tensor:
        flow = Flow(rows, {"positions": positions}, derived={KEYS: keys})
        for block in self._blocks:
            flow = block(flow)
        return flow.hidden

    def _lay(self, rows_TD: Tensor, lengths: tuple[int, ...]) -> Packed:
        counts = torch.tensor(lengths, device=self.device)
        segments_T = torch.arange(len(lengths), device=self.device).repeat_interleave(counts)
        starts_B = counts.cumsum(0) - counts
        positions_T = torch.arange(len(rows_TD), device=self.device) - starts_B[segments_T]
        return Packed(rows_TD, positions_T, segments_T, lengths)

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self.device)

    def _check(self, number: int, prompt: Prompt) -> None:
        images = 0 if prompt.pixels is None else len(prompt.pixels)
        slots = prompt.tokens.count(self.form.image_slot)
        if slots != images * self.form.visual_tokens:
            raise ContentError(
                f"prompt {number}: {slots} <image> positions for {images} images; an image takes "
                f"{self.form.visual_tokens} between [IMG] and [/IMG]"
            )
        if not prompt.tokens:
            raise ContentError(f"prompt {number} is empty; start it with <s> = {self.form.bos}")
