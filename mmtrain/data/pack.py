"""Packs planned from lengths: every rank computes the same list of packs, without media.

Draws -> windows of up to W documents -> rules -> packs under two budgets (positions and images) by
a strategy (`data.packing`) -> numbered 0, 1, 2, ... A window ends where its packs are full, and
where the weights of sources change. Within a window packs are shuffled, within a pack documents
keep the order of draws.

Going forward is free of repetition. A jump to pack n plans every window before n unless `seek` is
given a `Mark` (a checkpoint keeps one).
"""

import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from mmtrain.data.choices import Overlong, Packing
from mmtrain.data.mixture import Cursor, DrawnDocument, Draws
from mmtrain.data.packing import STRATEGIES
from mmtrain.data.rules import WRAPPER_POSITIONS, Draw, RuleOptions, Selection, select
from mmtrain.errors import ContentError
from mmtrain.nn.noise import seed_of

log = logging.getLogger(__name__)

_KEPT_WINDOWS = 4
_EMPTY_WINDOWS = 64  # windows in a row without one token before a plan gives up
_NO_LIMIT = 1 << 40


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
    """A place in a plan: window `window` begins with pack `first_pack` and draws from `cursor`."""

    window: int
    first_pack: int
    cursor: Cursor = field(default_factory=Cursor)


@dataclass(frozen=True)
class Cuts:
    """What had no room in a sequence: of conversations, whole trailing turns."""

    turns: int = 0  # left out of conversations that were shortened
    shortened: int = 0  # conversations
    left_out: int = 0  # conversations whose first turn is too long already
    dropped: int = 0  # documents of a source that drops those longer than its limit

    def after(self, selection: Selection) -> "Cuts":
        """These and one more."""
        if not selection.pieces:
            return replace(self, left_out=self.left_out + 1)
        turns = self.turns + selection.turns_left_out
        return replace(self, turns=turns, shortened=self.shortened + 1)

    def __add__(self, other: "Cuts") -> "Cuts":
        return Cuts(
            self.turns + other.turns,
            self.shortened + other.shortened,
            self.left_out + other.left_out,
            self.dropped + other.dropped,
        )

    def __str__(self) -> str:
        chats = (
            f"{self.turns} trailing turns of {self.shortened} conversations had no room, "
            f"{self.left_out} conversations were left out"
        )
        dropped = f"{self.dropped} documents longer than max_tokens were dropped"
        some = (chats if self.shortened or self.left_out else "", dropped if self.dropped else "")
        return ", ".join(filter(None, some))


@dataclass(frozen=True)
class _Window:
    """A planned window: its packs in their order of training, and where the next one begins."""

    packs: list[tuple[PlannedDocument, ...]]
    cursor: Cursor
    is_last: bool


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
        packing: Packing = Packing.first_fit,
        step_packs: int = 1,
        first_step: int = 0,
    ) -> None:
        """Plan packs of `draws`; nothing is computed yet.

        Args:
            draws: the order of documents.
            group_length: positions of one image (`SequenceFormat.group_length`).
            pack_tokens: positions of a pack.
            pack_images: images of a pack at most.
            window_documents: documents packed together at most.
            seed: of the rules' random choices and the order of packs in a window.
            packing: the strategy.
            step_packs: packs of one optimizer step; weights of sources change with steps.
            first_step: the plan begins with its packs.
        """
        assert min(group_length, pack_tokens, window_documents, step_packs) > 0 <= pack_images
        self.draws = draws
        self.pack_tokens = pack_tokens
        self.pack_images = pack_images
        self._group_length = group_length
        self._window_documents = window_documents
        self._seed = seed
        self._strategy = STRATEGIES[packing]
        self._step_packs = step_packs
        self._options = [self._limited(source.options) for source in draws.sources]
        self._begin = Mark(0, first_step * step_packs)
        self._marks = [self._begin]  # of windows in a row; the last is the end known so far
        self._last_window: int | None = None  # where finite draws end, once seen
        self.cuts: dict[str, Cuts] = {}  # by source: conversations that were too long
        self._told = -1  # last window of `cuts`
        self._windows: OrderedDict[int, _Window] = OrderedDict()
        self._chosen: tuple[DrawnDocument, PlannedDocument | None, Cuts] | None = None

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, in the order of `PlannedDocument.source`."""
        return tuple(source.name for source in self.draws.sources)

    @property
    def first_pack(self) -> int:
        """Number of the first pack."""
        return self._begin.first_pack

    def pack(self, number: int) -> PackPlan:
        """Pack `number`; without documents past the end of finite draws.

        Raises:
            ContentError: the rules leave nothing of the documents.
        """
        mark = self._mark_of(number)
        if mark is None:
            return PackPlan(number, ())
        return PackPlan(number, self._window(mark).packs[number - mark.first_pack])

    def packs(self) -> int:
        """Number of packs of finite draws (plans them all)."""
        while not self._finished:
            self._extend()
        return self._marks[-1].first_pack

    def mark(self, number: int) -> Mark:
        """Where pack `number` lies, so that a later process need not plan what comes before."""
        return self._mark_of(number) or self._marks[-1]

    def seek(self, mark: Mark) -> None:
        """Trust a mark of the same plan and forget what was computed."""
        mark = max(mark, self._begin, key=lambda place: place.first_pack)  # 0 of a new run
        self._windows.clear()
        self._restart(mark)

    def silence(self) -> None:
        """Say nothing of what is cut and what runs dry: this plan only looks ahead."""
        self._told = _NO_LIMIT

    def _restart(self, mark: Mark) -> None:
        if mark.window and not mark.cursor.draws:  # of a checkpoint that kept no cursor
            draws = mark.window * self._window_documents
            mark = replace(mark, cursor=Cursor(draws))
        self._marks = [mark]

    @property
    def _finished(self) -> bool:
        return self._last_window is not None and self._marks[-1].window > self._last_window

    def _mark_of(self, number: int) -> Mark | None:
        """The window that holds a pack; None past the end."""
        assert number >= self._begin.first_pack, (number, self._begin)
        if number < self._marks[0].first_pack:
            self._restart(self._begin)
        empty = 0
        while number >= (before := self._marks[-1].first_pack) and not self._finished:
            self._extend()
            empty = 0 if self._marks[-1].first_pack > before else empty + 1
            if empty == _EMPTY_WINDOWS:
                raise ContentError(
                    f"{empty * self._window_documents} documents in a row of sources "
                    f"{', '.join(self.source_names)} leave no text and no image under their rules "
                    f"and limits ({self.pack_tokens} positions, {self.pack_images} images a pack)"
                )
        if number >= self._marks[-1].first_pack:
            return None
        return self._marks[bisect_right(self._marks, number, key=lambda m: m.first_pack) - 1]

    def _extend(self) -> None:
        mark = self._marks[-1]
        window = self._window(mark)
        first = mark.first_pack + len(window.packs)
        self._marks.append(Mark(mark.window + 1, first, window.cursor))

    def _window(self, mark: Mark) -> _Window:
        if mark.window in self._windows:
            self._windows.move_to_end(mark.window)
            return self._windows[mark.window]
        window = self._plan(mark)
        if window.is_last:
            self._last_window = mark.window
        self._windows[mark.window] = window
        if len(self._windows) > _KEPT_WINDOWS:
            self._windows.popitem(last=False)
        return window

    def _plan(self, mark: Mark) -> _Window:
        """Draw up to W documents and pack those that fill whole packs."""
        step = mark.first_pack // self._step_packs
        drawn: list[tuple[PlannedDocument | None, tuple[str, Cuts], Cursor]] = []
        draws = self.draws.draw(mark.cursor, step, self.cost)
        for item, cursor in islice(draws, self._window_documents):
            planned, cuts = self._choose(item)
            drawn.append((planned, (self.draws.sources[item.source].name, cuts), cursor))
        is_last = len(drawn) < self._window_documents
        places = [at for at, (planned, _, _) in enumerate(drawn) if planned is not None]
        documents = [planned for planned, _, _ in drawn if planned is not None]
        most = self._packs_until_change(mark, step)
        if documents and (most < len(documents) or not is_last):
            taken = self._strategy.whole(self._sizes(documents), self._budgets, most)
            if taken < len(documents):
                documents, drawn, is_last = documents[:taken], drawn[: places[taken]], False
        cursor = drawn[-1][2] if drawn else mark.cursor
        self._tell(mark, cursor, [cuts for _, cuts, _ in drawn])
        return _Window(self._arrange(documents, mark.window), cursor, is_last)

    def _packs_until_change(self, mark: Mark, step: int) -> int:
        """Packs before the next step that changes a weight."""
        steps = [begin for source in self.draws.sources for begin in source.weight_steps]
        following = min((begin for begin in steps if begin > step), default=None)
        return _NO_LIMIT if following is None else following * self._step_packs - mark.first_pack

    @property
    def _budgets(self) -> tuple[int, int]:
        return self.pack_tokens, self.pack_images

    def _sizes(self, documents: Sequence[PlannedDocument]) -> list[tuple[int, int]]:
        return [(item.selection.positions, item.selection.images) for item in documents]

    def _arrange(
        self, documents: list[PlannedDocument], window: int
    ) -> list[tuple[PlannedDocument, ...]]:
        """The packs of a window's documents, in their order of training."""
        packs = [
            tuple(documents[index] for index in pack)
            for pack in self._strategy.pack(self._sizes(documents), self._budgets)
        ]
        draw = Draw(self._seed, "window", window)
        return [packs[index] for index in _shuffled(len(packs), draw)]

    def cost(self, item: DrawnDocument) -> int:
        """Positions that a document takes in a pack; 0 when its rule leaves nothing of it."""
        planned, _ = self._choose(item)
        return 0 if planned is None else planned.selection.positions

    def _choose(self, item: DrawnDocument) -> tuple[PlannedDocument | None, Cuts]:
        """What the rules take of a draw, or None, and what they cut."""
        if self._chosen is not None and self._chosen[0] is item:  # its cost was asked just now
            return self._chosen[1:]
        source = self.draws.sources[item.source]
        lengths = source.lengths.document(item.number)
        key = (self._seed, item.epoch, source.name, lengths.sample_id)
        options, cuts = self._options[item.source], Cuts()
        selection = select(lengths, options, self._group_length, Draw(*key))
        if options.overlong is Overlong.drop:
            unlimited = replace(options, max_positions=_NO_LIMIT)
            whole = select(lengths, unlimited, self._group_length, Draw(*key))
            if whole.positions > options.max_positions:
                selection, cuts = Selection((), WRAPPER_POSITIONS, 0), Cuts(dropped=1)
        if selection.turns_left_out:
            cuts = cuts.after(selection)
        planned = None
        if selection.pieces:
            planned = PlannedDocument(
                item.source,
                item.number,
                item.epoch,
                lengths.sample_id,
                selection,
                seed_of("noise", *key),
            )
        self._chosen = (item, planned, cuts)
        return planned, cuts

    def _tell(self, mark: Mark, cursor: Cursor, cuts: Sequence[tuple[str, Cuts]]) -> None:
        """Keep what a window cut, once, and tell; also which sources ran dry in it."""
        if mark.window <= self._told:
            return
        self._told = mark.window
        for name in dict.fromkeys(name for name, cut in cuts if cut != Cuts()):
            total = sum((cut for owner, cut in cuts if owner == name), Cuts())
            self.cuts[name] = self.cuts.get(name, Cuts()) + total
            first, last = mark.cursor.draws, cursor.draws - 1
            log.info("source %s: %s (documents %d to %d)", name, total, first, last)
        for index, source in enumerate(self.draws.sources):
            if self.draws.is_dry(index, cursor) and not self.draws.is_dry(index, mark.cursor):
                step = mark.first_pack // self._step_packs
                log.warning(
                    "source %s ran dry in the window of step %d, after %g epochs (%d documents); "
                    "its share goes to the other sources",
                    source.name,
                    step + 1,
                    source.epochs,
                    cursor.counts[index],
                )

    def _limited(self, options: RuleOptions) -> RuleOptions:
        return replace(
            options,
            max_positions=max(min(options.max_positions, self.pack_tokens), WRAPPER_POSITIONS),
            max_images=min(options.max_images, self.pack_images),
        )


def _shuffled(count: int, draw: Draw) -> list[int]:
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = draw.below(last + 1)
        order[last], order[other] = order[other], order[last]
    return order
