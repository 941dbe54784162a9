"""A conversion as a list of what becomes of every tensor, made before a number is read.

A `Draft` is filled from the names, shapes and number types of a source alone, and collects every
fault; `Draft.plan` raises them together. The `Plan` that comes out can be printed (`--dry-run`) or
written (`mmtrain.convert.writing`), which reads one tensor at a time.

Strict means: every tensor of the source is used, left out by a rule that says why, or a fault;
every tensor the target must have is made, in its shape.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmtrain.checkpoint.names import Dropped, Elsewhere, Fused, NameMap, Rule, Same
from mmtrain.checkpoint.tensorfile import TensorInfo, info_of
from mmtrain.convert.recognise import kind_of
from mmtrain.convert.sources import Source
from mmtrain.errors import ContentError
from mmtrain.nn.lora import adapted_weights, merge

SHOWN_FAULTS = 12
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Made:
    """One tensor of the target.

    Attributes:
        target: its name.
        info: its shape and number type.
        make: reads or computes it.
        sources: names of the tensors it is made of.
        how: what is done; empty when it is copied.
    """

    target: str
    info: TensorInfo
    make: Callable[[], Tensor]
    sources: tuple[str, ...] = ()
    how: str = ""

    def to(self, dtype: torch.dtype | None) -> "Made":
        """The same tensor in another number type; whole numbers stay as they are."""
        if dtype is None or not self.info.dtype.is_floating_point or self.info.dtype is dtype:
            return self
        how = f"{self.how}, to {short_name(dtype)}" if self.how else f"to {short_name(dtype)}"
        info = TensorInfo(self.info.shape, dtype)
        return replace(self, info=info, make=lambda: self.make().to(dtype), how=how)


@dataclass(frozen=True)
class LeftOut:
    """A tensor of the source that has no place in the target.

    Attributes:
        source: its name.
        info: its shape and number type.
        reason: why, by which rule.
        kept: whether it is kept aside for the way back.
    """

    source: str
    info: TensorInfo
    reason: str
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion writes.

    Attributes:
        title: from what to what.
        made: tensors of the target, in order.
        left_out: tensors of the source that are not used.
        kept: those of them that are kept aside for the way back.
        texts: small files beside the weights, by name.
        remarks: what the user should know.
    """

    title: str
    made: tuple[Made, ...]
    left_out: tuple[LeftOut, ...] = ()
    kept: tuple[Made, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of everything that is written, small files aside."""
        return sum(made.info.bytes for made in (*self.made, *self.kept))

    def to(self, dtype: torch.dtype | None) -> "Plan":
        """The same plan with its weights in another number type."""
        return replace(self, made=tuple(made.to(dtype) for made in self.made))

    def table(self) -> str:
        """The plan as text; blocks that repeat stand in one line, numbered N."""
        rows = [
            (" + ".join(made.sources) or "-", str(made.info), made.target, made.how or "copy")
            for made in self.made
        ]
        rows += [
            (out.source, str(out.info), "kept aside" if out.kept else "left out", out.reason)
            for out in self.left_out
        ]
        numbers = sum(made.info.meta().numel() for made in self.made)
        created = sum(not made.sources for made in self.made)
        foot = (
            f"{len(self.made):,} tensors of {numbers:,} numbers ({created:,} created), "
            f"{len(self.left_out):,} left out ({len(self.kept):,} kept aside), {self.bytes:,} bytes"
        )
        heads = ("", "source", "shape and type", "target", "how")
        return "\n".join([self.title, "", *_aligned([heads, *_folded(rows)]), "", foot])


class Draft:
    """A plan in the making; faults are collected."""

    def __init__(self, source: Source, what: str) -> None:
        """Begin with a source; `what` it should be, for messages."""
        self.source = source
        self.what = what
        self.made: dict[str, Made] = {}
        self.left_out: list[LeftOut] = []
        self.remarks: list[str] = []
        self.faults: list[str] = []

    def read(self, names: NameMap) -> "Draft":
        """Map every tensor of the source by the rules of `names`."""
        unknown = []
        for name, info in self.source.infos.items():
            found = names.rule_of(name)
            if found is None:
                unknown.append(name)
            elif isinstance(found[0], Dropped):
                kept = not isinstance(found[0], Elsewhere)
                self.left_out.append(LeftOut(name, info, found[0].reason, kept))
            else:
                self._read_by(name, *found)
        self.unknown(unknown)
        return self

    def _read_by(self, name: str, rule: Rule, parts: tuple[str, ...]) -> None:
        assert not isinstance(rule, Dropped)
        metas = rule.read(self.source.infos[name].meta())
        for number, (part, meta) in enumerate(zip(parts, metas, strict=True)):

            def make(number: int = number) -> Tensor:
                return rule.read(self.source.get(name))[number]

            how = f"part {number + 1} of {len(parts)}" if len(parts) > 1 else ""
            self.add(Made(part, info_of(meta), make, (name,), how))

    def write(self, names: NameMap) -> "Draft":
        """Map canonical tensors, all of a source, to the names of a release."""
        infos = self.source.infos
        for name in infos:
            found = names.writing(name)
            if found is None:
                self.faults.append(f"{name} ({infos[name]}): {names.release} has no name for it")
                continue
            target, rule, parts = found
            missing = [part for part in parts if part not in infos]
            self.faults += [f"{part}: missing, {target} needs it beside {name}" for part in missing]
            if not missing and target not in self.made:
                self._write_by(target, rule, parts)
        return self

    def _write_by(self, target: str, rule: Same | Fused, parts: tuple[str, ...]) -> None:
        def make() -> Tensor:
            return rule.write(tuple(self.source.get(part) for part in parts))

        info = info_of(rule.write(tuple(self.source.infos[part].meta() for part in parts)))
        how = f"{len(parts)} joined" if len(parts) > 1 else ""
        self.add(Made(target, info, make, parts, how))

    def merge_adapters(self, scale: float) -> None:
        """Fold every adapter among the canonical targets into the weight beside it."""
        for base, (a, b) in adapted_weights(self.made).items():
            missing = [name for name in (base, a, b) if name not in self.made]
            if missing:
                self.faults.append(f"{base}: cannot be merged, {', '.join(missing)} missing")
                continue
            trio = [self.made.pop(name) for name in (base, a, b)]

            def make(trio: list[Made] = trio) -> Tensor:
                weight, down, up = (part.make() for part in trio)
                return merge(weight, down, up, scale)

            sources = tuple(name for part in trio for name in part.sources)
            self.add(Made(base, trio[0].info, make, sources, f"W + {scale:g} B A"))

    def unknown(self, names: list[str]) -> None:
        """Tensors of the source that have no place.

        Raises:
            ContentError: none has; the source is something else.
        """
        if names and len(names) == len(self.source.infos):
            looks = kind_of(self.source.infos)
            hint = f"; it looks like {looks}" if looks else ""
            raise ContentError(
                f"{self.source.path}: none of its {len(names)} tensors has a name of {self.what} "
                f"(found {', '.join(names[:3])}, ...){hint}"
            )
        if 2 * len(names) > len(self.source.infos) and (looks := kind_of(names)):
            self.faults.append(f"{len(names)} of its names look like {looks}")
        self.faults += [f"{name} ({self.source.infos[name]}): unknown name" for name in names]

    def add(self, made: Made) -> None:
        """Add one tensor of the target."""
        if made.target in self.made:
            first = ", ".join(self.made[made.target].sources)
            self.faults.append(f"{', '.join(made.sources)}: is {made.target}, and so is {first}")
        self.made[made.target] = made

    def leave_out(self, name: str, reason: str) -> None:
        """Leave a tensor of the source out, and do not keep it."""
        self.left_out.append(LeftOut(name, self.source.infos[name], reason, kept=False))

    def require(
        self, expected: Mapping[str, tuple[int, ...]], named: Callable[[str], str | None]
    ) -> "Draft":
        """Compare what is made with what the target must have.

        Args:
            expected: shape of every tensor of the target.
            named: the source's name for one of the target, for messages.
        """
        for name, shape in expected.items():
            found = self.made.get(name)
            theirs = named(name) or name
            if found is None:
                self.faults.append(f"{theirs}: missing; {name} is made of it")
            elif found.info.shape != shape:
                have, want = _shape(found.info.shape), _shape(shape)
                swapped = " (swapped dims?)" if found.info.shape == shape[::-1] else ""
                self.faults.append(
                    f"{', '.join(found.sources) or theirs}: gives {name} the shape {have}, "
                    f"expected {want}{swapped}"
                )
        for name in self.made.keys() - expected.keys():
            sources = ", ".join(self.made[name].sources)
            self.faults.append(f"{sources}: the model has no {name}; are its sizes those?")
        return self

    def plan(self, title: str, texts: Mapping[str, str]) -> Plan:
        """The plan, when there is no fault.

        Raises:
            ContentError: every fault at once.
        """
        if self.faults:
            raise_faults(self.source, self.what, self.faults)
        return Plan(
            title=title,
            made=tuple(self.made[name] for name in sorted(self.made)),
            left_out=tuple(self.left_out),
            kept=tuple(copy_of(self.source, out.source) for out in self.left_out if out.kept),
            texts=texts,
            remarks=tuple(self.remarks),
        )


def copy_of(source: Source, name: str, target: str | None = None) -> Made:
    """A tensor as it is, under its own or another name."""
    return Made(target or name, source.infos[name], lambda: source.get(name), (name,))


def raise_faults(source: Source, what: str, faults: Iterable[str]) -> None:
    """Raise all faults of a source as one error."""
    listed = list(dict.fromkeys(faults))
    more = [f"... and {len(listed) - SHOWN_FAULTS} more"] if len(listed) > SHOWN_FAULTS else []
    lines = "\n  ".join([*listed[:SHOWN_FAULTS], *more])
    raise ContentError(
        f"{source.path}: does not fit {what}, {len(listed)} faults; nothing was written\n  {lines}"
    )


def short_name(dtype: torch.dtype) -> str:
    """As in `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _folded(rows: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Rows that differ in their numbers between dots alone, as one: N where the numbers differ."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in rows:
        groups.setdefault(tuple(_NUMBER.sub("N", cell) for cell in row), []).append(row)
    for group in groups.values():
        times = f"{len(group)} x" if len(group) > 1 else ""
        yield (times, *(_fold(cells) for cells in zip(*group, strict=True)))


def _fold(cells: tuple[str, ...]) -> str:
    """One cell for several; a number stays where all agree on it."""
    numbers = [_NUMBER.findall(cell) for cell in cells]
    agreed = iter(found[0] if len(set(found)) == 1 else "N" for found in zip(*numbers, strict=True))
    return _NUMBER.sub(lambda _: next(agreed), cells[0])


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
