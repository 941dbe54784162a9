"""Packs planned from lengths: every rank computes the same list of packs, without media.

Draws -> windows of W documents -> rules -> packs under two budgets (positions and images), as few
as first-fit-decreasing needs and evenly filled -> numbered 0, 1, 2, ... Within a window packs are
shuffled, within a pack documents keep the order of draws.

Cost: about 40 us a document; going forward is free of repetition. A jump to pack n plans every
window before n unless `seek` is given a `Mark` (a checkpoint keeps one).
"""

import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmtrain.data.mixture import DrawnDocument, Draws
from mmtrain.data.rules import WRAPPER_POSITIONS, Draw, RuleOptions, Selection, select
from mmtrain.errors import ContentError
from mmtrain.nn.noise import seed_of

log = logging.getLogger(__name__)

_KEPT_WINDOWS = 4
_EMPTY_WINDOWS = 64  # windows in a row without one token before a plan gives up


@dataclass(frozen=True)
class PlannedDocument:
    """A document of a pack: where to read it and what of it to take."""

    source: int
    number: int
    epoch: int
    sample_id: str
    selection: Selection
    noise: int  # seeds the numbers of its rows (`nn.noise.row_numbers`); of this draw alone


@dataclass(frozen=True)
class PackPlan:
    """One pack; a pack past the end of a finite plan has no documents."""

    number: int
    documents: tuple[PlannedDocument, ...]

    @property
    def tokens(self) -> int:
        """Positions in use."""
        return sum(document.selection.positions for document in self.documents)

    @property
    def images(self) -> int:
        """Images of all documents."""
        return sum(document.selection.images for document in self.documents)


@dataclass(frozen=True)
class Mark:
    """A place in a plan: window `window` begins with pack `first_pack`."""

    window: int
    first_pack: int


@dataclass(frozen=True)
class Cuts:
    """What had no room in a sequence: of conversations, whole trailing turns."""

    turns: int = 0  # left out of conversations that were shortened
    shortened: int = 0  # conversations
    left_out: int = 0  # conversations whose first turn is too long already

    def after(self, selection: Selection) -> "Cuts":
        """These and one more."""
        if not selection.pieces:
            return replace(self, left_out=self.left_out + 1)
        return Cuts(self.turns + selection.turns_left_out, self.shortened + 1, self.left_out)

    def __add__(self, other: "Cuts") -> "Cuts":
        return Cuts(
            self.turns + other.turns,
            self.shortened + other.shortened,
            self.left_out + other.left_out,
        )


class Plan:
    """The list of packs of a run, computed window by window and forgotten again."""

    def __init__(
        self,
        draws: Draws,
        *,
        group_length: int,
        pack_tokens: int,
        pack_images: int,
        window_documents: int,
        seed: int,
    ) -> None:
        """Plan packs of `draws`; nothing is computed yet.

        Args:
            draws: the order of documents.
            group_length: positions of one image (`SequenceFormat.group_length`).
            pack_tokens: positions of a pack.
            pack_images: images of a pack at most.
            window_documents: documents packed together.
            seed: of the rules' random choices and the order of packs in a window.
        """
        assert min(group_length, pack_tokens, window_documents) > 0 <= pack_images
        self.draws = draws
        self.pack_tokens = pack_tokens
        self.pack_images = pack_images
        self._group_length = group_length
        self._window_documents = window_documents
        self._seed = seed
        self._options = [self._limited(source.options) for source in draws.sources]
        self._base = 0  # first window of `_firsts`
        self._firsts = [0]  # first pack of window base + i; the last entry is the end known so far
        self._last_window: int | None = None  # where finite draws end, once seen
        self.cuts: dict[str, Cuts] = {}  # by source: conversations that were too long
        self._counted = -1  # last window of `cuts`
        self._windows: OrderedDict[int, list[tuple[PlannedDocument, ...]]] = OrderedDict()

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, in the order of `PlannedDocument.source`."""
        return tuple(source.name for source in self.draws.sources)

    def pack(self, number: int) -> PackPlan:
        """Pack `number`; without documents past the end of finite draws.

        Raises:
            ContentError: the rules leave nothing of the documents.
        """
        window = self._window_of(number)
        if window is None:
            return PackPlan(number, ())
        first = self._firsts[window - self._base]
        return PackPlan(number, self._packs(window)[number - first])

    def packs(self) -> int:
        """Number of packs of finite draws (plans them all)."""
        while not self._finished:
            self._extend()
        return self._firsts[-1]

    def mark(self, number: int) -> Mark:
        """Where pack `number` lies, so that a later process need not plan what comes before."""
        window = self._window_of(number)
        known = window if window is not None else self._base + len(self._firsts) - 1
        return Mark(known, self._firsts[known - self._base])

    def seek(self, mark: Mark) -> None:
        """Trust a mark of the same plan and forget what was computed."""
        self._restart(mark)

    def _restart(self, mark: Mark) -> None:
        self._base, self._firsts = mark.window, [mark.first_pack]

    @property
    def _finished(self) -> bool:
        known = self._base + len(self._firsts) - 1
        return self._last_window is not None and known > self._last_window

    def _window_of(self, number: int) -> int | None:
        assert number >= 0, number
        if number < self._firsts[0]:
            self._restart(Mark(0, 0))
        empty = 0
        while number >= self._firsts[-1] and not self._finished:
            before = self._firsts[-1]
            self._extend()
            empty = 0 if self._firsts[-1] > before else empty + 1
            if empty == _EMPTY_WINDOWS:
                raise ContentError(
                    f"{empty * self._window_documents} documents in a row of sources "
                    f"{', '.join(self.source_names)} leave no text and no image under their rules "
                    f"and limits ({self.pack_tokens} positions, {self.pack_images} images a pack)"
                )
        if number >= self._firsts[-1]:
            return None
        return self._base + bisect_right(self._firsts, number) - 1

    def _extend(self) -> None:
        window = self._base + len(self._firsts) - 1
        packs = self._packs(window)
        self._firsts.append(self._firsts[-1] + len(packs))

    def _packs(self, window: int) -> list[tuple[PlannedDocument, ...]]:
        if window in self._windows:
            self._windows.move_to_end(window)
            return self._windows[window]
        packs = self._arrange(self._select(window), window)
        self._windows[window] = packs
        if len(self._windows) > _KEPT_WINDOWS:
            self._windows.popitem(last=False)
        return packs

    def _arrange(
        self, documents: list[PlannedDocument], window: int
    ) -> list[tuple[PlannedDocument, ...]]:
        """The packs of a window's documents, in their order of training."""
        packs = [
            tuple(documents[index] for index in pack)
            for pack in fit(
                [(item.selection.positions, item.selection.images) for item in documents],
                self.pack_tokens,
                self.pack_images,
            )
        ]
        draw = Draw(self._seed, "window", window)
        return [packs[index] for index in _shuffled(len(packs), draw)]

    def _select(self, window: int) -> list[PlannedDocument]:
        start = window * self._window_documents
        drawn = self.draws.window(start, start + self._window_documents)
        if len(drawn) < self._window_documents:
            self._last_window = window
        documents, cuts = self._planned(drawn)
        self._count(window, cuts)
        return documents

    def _planned(
        self, drawn: Sequence[DrawnDocument]
    ) -> tuple[list[PlannedDocument], dict[str, Cuts]]:
        """What the rules take of some draws, and what they cut, by source."""
        documents = []
        cuts: dict[str, Cuts] = {}
        for item in drawn:
            source = self.draws.sources[item.source]
            lengths = source.lengths.document(item.number)
            key = (self._seed, item.epoch, source.name, lengths.sample_id)
            selection = select(lengths, self._options[item.source], self._group_length, Draw(*key))
            if selection.turns_left_out:
                cuts[source.name] = cuts.get(source.name, Cuts()).after(selection)
            if selection.pieces:
                documents.append(
                    PlannedDocument(
                        item.source,
                        item.number,
                        item.epoch,
                        lengths.sample_id,
                        selection,
                        seed_of("noise", *key),
                    )
                )
        return documents, cuts

    def _count(self, window: int, cuts: Mapping[str, Cuts]) -> None:
        """Keep what a window cut, once, and tell."""
        if window <= self._counted:
            return
        self._counted = window
        for name, cut in cuts.items():
            self.cuts[name] = self.cuts.get(name, Cuts()) + cut
            log.info(
                "source %s: %d trailing turns of %d conversations had no room, %d conversations "
                "were left out (documents %d to %d)",
                name,
                cut.turns,
                cut.shortened,
                cut.left_out,
                window * self._window_documents,
                (window + 1) * self._window_documents - 1,
            )

    def _limited(self, options: RuleOptions) -> RuleOptions:
        return replace(
            options,
            max_positions=max(min(options.max_positions, self.pack_tokens), WRAPPER_POSITIONS),
            max_images=min(options.max_images, self.pack_images),
        )


def fit(sizes: Sequence[tuple[int, int]], tokens: int, images: int) -> list[list[int]]:
    """As few packs as first-fit-decreasing needs, filled evenly where that is possible.

    First-fit puts documents of one length together: a pack of clips, a pack of text. So its
    number of packs is kept, and documents are dealt out again, the largest first, each to the
    emptiest pack; every pack then holds the same mixture and ranks have the same work. Where that
    does not fit, first-fit's packs stay.

    Args:
        sizes: (positions, images) of each document, each within the budgets.
        tokens: positions of a pack.
        images: images of a pack.

    Returns:
        Packs as ascending indices into `sizes`.
    """
    shares = [
        max(length / tokens, pictures / images if images else 0.0) for length, pictures in sizes
    ]
    order = sorted(range(len(sizes)), key=lambda index: (-shares[index], index))
    first_fit = _first_fit(sizes, order, tokens, images)
    even = _deal(sizes, order, tokens, images, len(first_fit))
    return [sorted(pack) for pack in even or first_fit]


def _first_fit(
    sizes: Sequence[tuple[int, int]], order: Sequence[int], tokens: int, images: int
) -> list[list[int]]:
    free: list[tuple[int, int]] = []
    packs: list[list[int]] = []
    for index in order:
        length, pictures = sizes[index]
        assert length <= tokens and pictures <= images, (sizes[index], tokens, images)
        place = next(
            (at for at, (room, slots) in enumerate(free) if length <= room and pictures <= slots),
            len(packs),
        )
        if place == len(packs):
            packs.append([])
            free.append((tokens, images))
        packs[place].append(index)
        free[place] = (free[place][0] - length, free[place][1] - pictures)
    return packs


def _deal(
    sizes: Sequence[tuple[int, int]], order: Sequence[int], tokens: int, images: int, count: int
) -> list[list[int]] | None:
    """Each document to the pack that stays emptiest with it; None when one fits nowhere."""
    used = [(0, 0)] * count
    packs: list[list[int]] = [[] for _ in range(count)]
    for index in order:
        length, pictures = sizes[index]
        load, place = min(
            (max((room + length) / tokens, (slots + pictures) / images if images else 0.0), at)
            for at, (room, slots) in enumerate(used)
        )
        if load > 1.0:
            return None
        packs[place].append(index)
        used[place] = (used[place][0] + length, used[place][1] + pictures)
    return packs


def _shuffled(count: int, draw: Draw) -> list[int]:
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = draw.below(last + 1)
        order[last], order[other] = order[other], order[last]
    return order
