"""Writing images with an Emu on one device: visual embeddings, one a step, fed back as they are.

B sequences   D width   V vocabulary   Q visual rows of an image
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mmtrain.data.tokens import SequenceFormat
from mmtrain.models.emu.model import EmuHead
from mmtrain.models.writing import Limits, Prompt, TrunkSampler, Written
from mmtrain.nn.choice import Choose, greedy
from mmtrain.nn.flow import Flow


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


class EmuSampler(TrunkSampler):
    """An Emu built by `model.build_plain`, and the ids its sequences are made of."""

    head: EmuHead

    def __init__(self, layers: Mapping[str, nn.Module], form: SequenceFormat) -> None:
        """Take the layers in order of the fold; they are used in place, on their device."""
        super().__init__(layers, form)
        names = list(layers)
        self._encoder = [layers[name] for name in names[: names.index("embed")]]
        self._tower = [layers[name] for name in names[: names.index("causal")]]

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
            embedded_BD = self.embed.tokens(self.ids(tokens_B))
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
