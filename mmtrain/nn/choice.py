"""How the next token is chosen: greedily, from the nucleus, or by beam search.

Beam search follows transformers 4.31, under which Emu was evaluated.

B sequences   V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Choose(Protocol):
    """How ids are chosen for some sequences."""

    def __call__(self, logits_BV: Tensor, which: Sequence[int] | None = None) -> Tensor:
        """Logits `[B, V]` to ids `[B]`; `which` sequences the rows are of, None for all."""
        ...


def greedy(logits_BV: Tensor, which: Sequence[int] | None = None) -> Tensor:
    """The most likely id of each row."""
    return logits_BV.argmax(-1)


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """Draw from the most likely ids that together hold `top_p` (Holtzman, arXiv:1904.09751)."""

    top_p: float = 0.9
    temperature: float = 1.0
    seed: int = 0

    def rows(self, first: int, count: int) -> Choose:
        """A choice for prompts `first .. first + count`, each with a generator of its own.

        What a prompt becomes depends on the seed and its number, not on the prompts beside it, and
        torch's global generator is not touched.
        """
        generators = [
            # torch's generator on the host reads the low 32 bits of a seed
            torch.Generator().manual_seed((self.seed * 0x9E3779B1 + number) % 2**32)
            for number in range(first, first + count)
        ]

        def choose(logits_BV: Tensor, which: Sequence[int] | None = None) -> Tensor:
            own = generators if which is None else [generators[number] for number in which]
            chance, ids = (logits_BV.float().cpu() / self.temperature).softmax(-1).sort(-1, True)
            before = chance.cumsum(-1) - chance
            kept = chance.masked_fill(before >= self.top_p, 0.0)  # the likeliest is always kept
            drawn = torch.stack(
                [
                    row.multinomial(1, generator=generator)
                    for row, generator in zip(kept, own, strict=True)
                ]
            )
            return ids.gather(-1, drawn).squeeze(-1).to(logits_BV.device)

        return choose


@dataclass(frozen=True, kw_only=True)
class Beams:
    """Beam search as transformers 4.31 does it from embeddings: one <s> counts in every length."""

    beams: int = 5
    new_tokens: int = 50
    length_penalty: float = 0.0  # score = summed log-probability / length ** penalty
    minimum_length: int = 1  # </s> may be the minimum_length-th new id at the earliest


class BeamSearch:
    """Hypotheses of one prompt, on the host: what survives a step, what is finished, what wins."""

    def __init__(self, options: Beams, eos: int) -> None:
        """Start with one live beam: the others are copies of it and must not win a place."""
        self.options = options
        self.eos = eos
        self.ids: list[list[int]] = [[] for _ in range(options.beams)]
        self.scores = [0.0] + [-1e9] * (options.beams - 1)
        self.finished: list[tuple[float, list[int]]] = []
        self.done = False

    @property
    def length(self) -> int:
        """Ids of every live beam, the <s> that generation from embeddings seeds included."""
        return 1 + len(self.ids[0])

    def extend(self, chance_BV: Tensor) -> tuple[list[int], list[int]]:
        """Take log-probabilities of the next id; each new beam's former beam and its new id."""
        if self.length < self.options.minimum_length:
            chance_BV[:, self.eos] = -torch.inf
        total = (chance_BV + torch.tensor(self.scores, device=chance_BV.device)[:, None]).flatten()
        # with one end token, twice the beams are enough to refill all of them
        scores, flat = (x.tolist() for x in total.topk(2 * self.options.beams))
        live: list[tuple[float, int, int]] = []
        for rank, (score, index) in enumerate(zip(scores, flat, strict=True)):
            beam, token = divmod(index, chance_BV.shape[-1])
            if token != self.eos:
                live.append((score, beam, token))
            elif rank < self.options.beams:
                self._finish(score, self.ids[beam])
            if len(live) == self.options.beams:
                break
        self.ids = [[*self.ids[beam], token] for _, beam, token in live]
        self.scores = [score for score, _, _ in live]
        self.done = self._nothing_better(max(scores))
        return [beam for _, beam, _ in live], [token for _, _, token in live]

    def best(self) -> list[int]:
        """The winner; open beams compete too, unless the search had decided."""
        if not self.done:
            for score, ids in zip(self.scores, self.ids, strict=True):
                self._finish(score, ids)
        ids = max(self.finished, key=lambda entry: entry[0])[1]
        return [*ids, self.eos] if len(ids) < self.options.new_tokens else list(ids)

    def _finish(self, score: float, ids: list[int]) -> None:
        penalised = score / float(1 + len(ids)) ** self.options.length_penalty
        self.finished.append((penalised, ids))
        self.finished.sort(key=lambda entry: entry[0], reverse=True)
        del self.finished[self.options.beams :]

    def _nothing_better(self, best_score: float) -> bool:
        if len(self.finished) < self.options.beams:
            return False
        attainable = best_score / float(self.length) ** self.options.length_penalty
        return bool(self.finished[-1][0] >= attainable)
