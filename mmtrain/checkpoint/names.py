"""Other people's parameter names, and ours.

A `NameMap` is a list of rules that reads both ways: a released state dict to canonical tensors and
back. It is strict: a name that no rule knows, a name that is missing, and a part that does not fit
are all reported together. Tensors that are left out are rules too, with their reason.

In a pattern `*` stands for a block number; the k-th `*` of one side is the k-th of the other. The
pattern of a tensor that is left out may end in `**`: anything.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mmtrain.errors import ContentError


@dataclass(frozen=True)
class Same:
    """One tensor on either side; the foreign one may have leading dims of length 1."""

    foreign: str
    canonical: str
    leading: int = 0  # leading dims of length 1 that only the foreign tensor has

    @property
    def parts(self) -> tuple[str, ...]:
        """Canonical patterns."""
        return (self.canonical,)

    def read(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Foreign to canonical."""
        return (tensor.flatten(0, self.leading) if self.leading else tensor,)

    def write(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Canonical to foreign."""
        (tensor,) = parts
        return tensor.reshape((1,) * self.leading + tensor.shape)


@dataclass(frozen=True)
class Fused:
    """One foreign tensor holds several canonical ones, equal parts one after another in dim 0."""

    foreign: str
    canonical: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Canonical patterns."""
        return self.canonical

    def read(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Foreign to canonical."""
        return torch.tensor_split(tensor, len(self.canonical))

    def write(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Canonical to foreign."""
        return torch.cat(parts)


@dataclass(frozen=True)
class Dropped:
    """A foreign tensor no model of ours reads; a conversion keeps it aside for the way back."""

    foreign: str
    reason: str


@dataclass(frozen=True)
class Elsewhere(Dropped):
    """A foreign tensor of another model in the same file; it is not kept."""


Rule = Same | Fused | Dropped


@dataclass(frozen=True)
class NameMap:
    """Rules between the names of one release and the canonical names; the first match decides."""

    release: str  # what the foreign names belong to, for messages
    rules: tuple[Rule, ...] = field(repr=False)

    def canonical_names(self, foreign: str) -> tuple[str, ...] | None:
        """Canonical names of a foreign one: empty when dropped, None when unknown."""
        found = self._by_foreign(foreign)
        if found is None:
            return None
        rule, numbers = found
        return () if isinstance(rule, Dropped) else tuple(_fill(p, numbers) for p in rule.parts)

    def rule_of(self, foreign: str) -> tuple[Rule, tuple[str, ...]] | None:
        """The rule for a foreign name and the canonical names it gives, or None when unknown."""
        found = self._by_foreign(foreign)
        if found is None:
            return None
        rule, numbers = found
        parts = () if isinstance(rule, Dropped) else rule.parts
        return rule, tuple(_fill(pattern, numbers) for pattern in parts)

    def writing(self, canonical: str) -> tuple[str, Same | Fused, tuple[str, ...]] | None:
        """Foreign name, rule and all canonical parts of the tensor that holds a canonical one."""
        found = self._by_canonical(canonical)
        if found is None:
            return None
        rule, numbers = found
        parts = tuple(_fill(pattern, numbers) for pattern in rule.parts)
        return _fill(rule.foreign, numbers), rule, parts

    def foreign_name(self, canonical: str) -> str | None:
        """The foreign name that holds a canonical tensor, or None when unknown."""
        found = self._by_canonical(canonical)
        return None if found is None else _fill(found[0].foreign, found[1])

    def dropped(self, foreign: Iterable[str]) -> dict[str, str]:
        """Those of `foreign` that are left out, and why."""
        found = ((name, self._by_foreign(name)) for name in foreign)
        return {name: hit[0].reason for name, hit in found if hit and isinstance(hit[0], Dropped)}

    def to_canonical(
        self, tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size] | None = None
    ) -> dict[str, Tensor]:
        """Read a release.

        Args:
            tensors: foreign name to tensor, the whole release.
            expected: canonical name to shape of the model that will take them, or None.

        Raises:
            ContentError: every unknown name, missing name and wrong shape at once.
        """
        out: dict[str, Tensor] = {}
        faults: list[str] = []
        for name, tensor in tensors.items():
            found = self._by_foreign(name)
            if found is None:
                faults.append(f"{name}: unknown name")
                continue
            rule, numbers = found
            if not isinstance(rule, Dropped):
                filled = (_fill(pattern, numbers) for pattern in rule.parts)
                out.update(zip(filled, rule.read(tensor), strict=True))
        faults += [] if expected is None else self._differences(out, expected)
        self._raise(faults, "reading")
        return out

    def to_foreign(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write a release; dropped tensors are not written.

        Args:
            tensors: canonical name to tensor; every part of a fused tensor must be there.

        Raises:
            ContentError: every unknown name and every missing part at once.
        """
        out: dict[str, Tensor] = {}
        faults: list[str] = []
        for name in tensors:
            found = self._by_canonical(name)
            if found is None:
                faults.append(f"{name}: no foreign name")
                continue
            rule, numbers = found
            parts = [_fill(pattern, numbers) for pattern in rule.parts]
            target = _fill(rule.foreign, numbers)
            missing = [part for part in parts if part not in tensors]
            faults += [f"{part}: missing, {target} needs it beside {name}" for part in missing]
            if not missing and target not in out:
                out[target] = rule.write(tuple(tensors[part] for part in parts))
        self._raise(faults, "writing")
        return out

    def _differences(
        self, found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
    ) -> Iterable[str]:
        for name in expected.keys() - found.keys():
            yield f"{self.foreign_name(name)}: missing, the model needs it for {name}"
        for name in found.keys() - expected.keys():
            yield f"{self.foreign_name(name)}: the model has no {name}; are its sizes those?"
        for name in found.keys() & expected.keys():
            if found[name].shape != expected[name]:
                shape, wanted = tuple(found[name].shape), tuple(expected[name])
                yield f"{self.foreign_name(name)}: shape {shape} for {name}, the model has {wanted}"

    def _raise(self, faults: Iterable[str], doing: str) -> None:
        if faults := sorted(set(faults)):
            raise ContentError(f"{doing} names of {self.release}:\n" + "\n".join(faults))

    @cached_property
    def _foreign_patterns(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(_numbered(rule.foreign), rule) for rule in self.rules]

    @cached_property
    def _canonical_patterns(self) -> list[tuple[re.Pattern[str], Same | Fused]]:
        kept = [rule for rule in self.rules if not isinstance(rule, Dropped)]
        return [(_numbered(part), rule) for rule in kept for part in rule.parts]

    def _by_foreign(self, name: str) -> tuple[Rule, tuple[str, ...]] | None:
        hits = ((pattern.fullmatch(name), rule) for pattern, rule in self._foreign_patterns)
        return next(((rule, hit.groups()) for hit, rule in hits if hit), None)

    def _by_canonical(self, name: str) -> tuple[Same | Fused, tuple[str, ...]] | None:
        hits = ((pattern.fullmatch(name), rule) for pattern, rule in self._canonical_patterns)
        return next(((rule, hit.groups()) for hit, rule in hits if hit), None)


def _numbered(pattern: str) -> re.Pattern[str]:
    anything = pattern.endswith("**")
    numbered = r"(\d+)".join(map(re.escape, pattern.removesuffix("**").split("*")))
    return re.compile(numbered + (".*" if anything else ""))


def _fill(pattern: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern
