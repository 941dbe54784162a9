"""Writing with a trunk on one device: text (greedy, top-p, beam) and ranking, for every family.

Prompts may hold images. They are prefilled packed, without padding between them, then every step
adds one row a sequence through a key-value cache; by causality the result is that of a model
without a cache. How images become rows, and how they are written, is the family's.

B sequences   T packed rows   D width   V vocabulary   Q visual rows of an image
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import torch
from PIL import Image
from torch import Tensor, nn

from mmtrain.data.tokens import SequenceFormat
from mmtrain.errors import ContentError
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


@dataclass(frozen=True)
class Packed:
    """Sequences one after another in one row.

    Attributes:
        rows_TD: embedded.
        slots_T: place of each row in its sequence.
        positions_T: what rotary embeddings turn it by.
        segments_T: sequence of each row.
        lengths: of the sequences.
        spans_T: on the host, image of each row, -1 outside; None = causal.
    """

    rows_TD: Tensor
    slots_T: Tensor
    positions_T: Tensor
    segments_T: Tensor
    lengths: tuple[int, ...]
    spans_T: Tensor | None = None

    @property
    def intervals(self) -> Intervals:
        """What each row sees: its own sequence up to itself, or up to the end of its image."""
        device = self.rows_TD.device
        if self.spans_T is None:
            return Intervals.causal_lengths(self.lengths, device)
        counts = torch.tensor(self.lengths)
        segments_T = torch.arange(len(counts)).repeat_interleave(counts)
        own = Intervals.image_bidirectional(segments_T, self.spans_T)
        return Intervals(own.lo_T, own.hi_T, device)

    @property
    def last_B(self) -> Tensor:
        """Row of each sequence's last token."""
        return torch.tensor(self.lengths, device=self.rows_TD.device).cumsum(0) - 1


class Writing:
    """Sequences in the middle of being written: the cache and where each one stands.

    Attributes:
        slot_B: where the cache takes the next row of each.
        position_B: of that row, in rotary embeddings; behind the slot where rows share positions.
    """

    def __init__(self, cache: KeyValueCache, packed: Packed) -> None:
        """Start with the rows of `packed` already in the cache."""
        self.cache = cache
        self.slot_B = packed.slots_T[packed.last_B] + 1
        self.position_B = packed.positions_T[packed.last_B] + 1
        self.longest = max(packed.lengths)

    def select(self, sequence_B: Tensor) -> None:
        """Keep, copy and reorder sequences."""
        self.cache.select(sequence_B)
        self.slot_B = self.slot_B[sequence_B]
        self.position_B = self.position_B[sequence_B]

    def advance(self) -> tuple[Step, Tensor]:
        """Room for one more row a sequence, and its positions `[B]`."""
        self.longest += 1
        step, position_B = Step(self.cache, self.slot_B, self.longest), self.position_B
        self.slot_B, self.position_B = self.slot_B + 1, position_B + 1
        return step, position_B


class LanguageHead(Protocol):
    """What the last layer of a family says of a row's next token."""

    cross_entropy: nn.Module

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Language logits `[T, V]` of trunk rows (before the final norm)."""
        ...


class TrunkSampler(ABC):
    """A model on one device, and the ids its sequences are made of.

    Attributes:
        draws: whether the images it writes are pictures, which need no decoder.
    """

    draws = False

    def __init__(self, layers: Mapping[str, nn.Module], form: SequenceFormat) -> None:
        """Take the layers in order of the fold; they are used in place, on their device."""
        self.form = form
        self.blocks = [layers[name] for name in layers if name.startswith("blocks.")]
        self.embed = cast(SplicedEmbedding, layers["embed"])
        self.head = cast(Any, layers["head"])
        self.device = self.embed.tokens.weight.device
        self.width = int(self.embed.tokens.weight.shape[1])  # D

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Visual rows `[n, Q, D]` of images `[n, 3, H, W]`."""

    @abstractmethod
    def write(
        self, prompts: Sequence[Prompt], limits: Limits, choose: Choose = greedy
    ) -> list[list[Written]]:
        """Continue each prompt with text and images in turn."""

    @abstractmethod
    def rollout(self, prompts: Sequence[Prompt]) -> Tensor:
        """The image that follows each prompt, `[B, ...]`, in the family's own form."""

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """Numbers `[n, C]` of images `[n, 3, H, W]` that tell how alike they are."""
        return self.encode(pixels).mean(1)

    def picture(self, image: Tensor) -> Image.Image | None:
        """An image that was written, to look at; None where only a decoder can draw it."""
        return None

    def drawing(
        self,
        *,
        scheduler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
    ) -> Self:
        """The same sampler, told how to draw images; of use where the model draws them itself."""
        return self

    def pack(self, prompts: Sequence[Prompt]) -> Packed:
        """Embed prompts, visual rows in place, and lay them one after another.

        Raises:
            ContentError: a prompt's images do not fill its <image> positions.
        """
        for number, prompt in enumerate(prompts):
            self._check(number, prompt)
        lengths = tuple(len(prompt.tokens) for prompt in prompts)
        tokens = [token for prompt in prompts for token in prompt.tokens]
        tokens_T = self.ids(tokens)
        rows_TD = self.embed.tokens(tokens_T)
        pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
        if sum(len(images) for images in pixels):
            slots = (tokens_T == self.form.image_slot).nonzero().squeeze(-1)
            visual_NQD = self.encode(torch.cat(pixels))
            rows_TD = splice(rows_TD, slots, visual_NQD.flatten(0, 1))
        return self.lay(rows_TD, lengths, tokens)

    def hidden(self, packed: Packed) -> Tensor:
        """Trunk rows `[T, D]` before the final norm, without a cache."""
        return self.fold(packed.rows_TD, packed.positions_T, packed.intervals)

    def start(self, prompts: Sequence[Prompt], room: int) -> tuple[Writing, Tensor]:
        """Prefill prompts and leave `room` more positions; also the last rows `[B, D]`."""
        return self.start_packed(self.pack(prompts), room)

    def start_packed(self, packed: Packed, room: int) -> tuple[Writing, Tensor]:
        """`start` for sequences that are embedded already."""
        cache = KeyValueCache(len(packed.lengths), max(packed.lengths) + room)
        keys = Prefill(cache, packed.intervals, packed.segments_T, packed.slots_T)
        hidden_TD = self.fold(packed.rows_TD, packed.positions_T, keys)
        return Writing(cache, packed), hidden_TD[packed.last_B]

    def step(self, writing: Writing, rows_BD: Tensor) -> Tensor:
        """Append one embedded row to every sequence; its trunk row `[B, D]`."""
        keys, position_B = writing.advance()
        return self.fold(rows_BD, position_B, keys)

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
            hidden_BD = self.step(writing, self.embed.tokens(ids_B))
        return written

    @torch.inference_mode()
    def negative_log_likelihoods(
        self, prompt: Prompt, candidates: Sequence[Sequence[int]]
    ) -> Tensor:
        """Summed over each candidate's tokens after `prompt`, float32 `[len(candidates)]`.

        The release ranks by this sum over (prompt + candidate - 1) positions, lower is better.
        """
        base = self.pack([prompt]).rows_TD
        rows, labels, tokens = [], [], []
        for ids in candidates:
            rows += [base, self.embed.tokens(self.ids(ids))]
            labels += [[-100] * (len(prompt.tokens) - 1), ids, [-100]]
            tokens += [*prompt.tokens, *ids]
        lengths = tuple(len(prompt.tokens) + len(ids) for ids in candidates)
        packed = self.lay(torch.cat(rows), lengths, tokens)
        labels_T = self.ids([label for part in labels for label in part])
        loss_T = self.head.cross_entropy(self.head.logits(self.hidden(packed)), labels_T)
        return torch.stack([part.sum() for part in torch.split(loss_T, list(lengths))])

    @torch.inference_mode()
    def beam(self, prompt: Prompt, options: Beams) -> list[int]:
        """The best continuation of one prompt; </s> closes it when it fits."""
        writing, hidden_BD = self.start([prompt], options.new_tokens)
        search = BeamSearch(options, self.form.eos)
        writing.select(self.ids([0] * options.beams))
        hidden_BD = hidden_BD.expand(options.beams, -1)
        for _ in range(options.new_tokens):
            came_from, ids = search.extend(self.head.logits(hidden_BD).float().log_softmax(-1))
            if search.done or search.length > options.new_tokens:
                break
            writing.select(self.ids(came_from))
            hidden_BD = self.step(writing, self.embed.tokens(self.ids(ids)))
        return search.best()

    def fold(self, rows: Tensor, positions: Tensor, keys: object) -> Tensor:
        """Rows `[T, D]` through the trunk at some positions; what they see is up to `keys`."""
        flow = Flow(rows, {"positions": positions}, derived={KEYS: keys})
        for block in self.blocks:
            flow = block(flow)
        return flow.hidden

    def _spans(self, tokens: Sequence[int]) -> Tensor | None:
        """Image of each row where rows see their whole image; None where there is none."""
        inside = torch.tensor(tokens) == self.form.image_slot
        if not self.form.sees_whole_image or not bool(inside.any()):
            return None
        number = (torch.tensor(tokens) == self.form.image_begin).cumsum(0)
        return torch.where(inside, number, -1)

    def lay(self, rows_TD: Tensor, lengths: tuple[int, ...], tokens: Sequence[int]) -> Packed:
        """Embedded sequences one after another; `tokens` tell which rows are of images."""
        counts = torch.tensor(lengths, device=self.device)
        segments_T = torch.arange(len(lengths), device=self.device).repeat_interleave(counts)
        starts_B = counts.cumsum(0) - counts
        slots_T = torch.arange(len(rows_TD), device=self.device) - starts_B[segments_T]
        positions_T = self.positions(slots_T, tokens)
        return Packed(rows_TD, slots_T, positions_T, segments_T, lengths, self._spans(tokens))

    def positions(self, slots_T: Tensor, tokens: Sequence[int]) -> Tensor:
        """Rotary positions of rows; a family whose images take fewer of them says so here."""
        return slots_T

    def ids(self, ids: Sequence[int]) -> Tensor:
        """Ids as a tensor on the device."""
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
