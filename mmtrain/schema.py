"""Plain data from YAML into frozen dataclasses, with every fault collected.

OmegaConf's structured configs stop at the first fault; a person who waits in a queue wants all
of them. So the schema is walked here, and OmegaConf's own nodes judge single values (what counts
as a whole number, a truth value, an enum), which keeps its rules.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import BooleanNode, EnumNode, FloatNode, IntegerNode, StringNode
from omegaconf.errors import OmegaConfBaseException

from mmtrain.errors import Problem

MISSING = "???"  # OmegaConf's mark of a value that must be given
INVALID = object()  # what reading gives for a value that is at fault

_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_NODES: dict[type, Any] = {int: IntegerNode, float: FloatNode, bool: BooleanNode, str: StringNode}


@dataclass
class Reader:
    """Builds dataclasses out of plain data.

    Attributes:
        types: what stands where the schema says `Any`, by dotted key.
        known: every dotted key of the schema, for suggestions.
        problems: faults found so far.
        doubtful: keys whose value is not what was meant (faulty, missing, misspelt elsewhere);
            faults that other checks derive from them are noise.
    """

    types: Mapping[str, Any]
    known: Sequence[str] = ()
    problems: list[Problem] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)

    def read(self, kind: Any, value: Any, place: str) -> Any:
        """Turn `value` into `kind`; a fault is noted and `INVALID` returned."""
        if kind is Any:
            kind = self.types.get(place, Any)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if origin in (types.UnionType, typing.Union):
            (inner,) = (a for a in arguments if a is not type(None))
            return None if value is None else self.read(inner, value, place)
        if value == MISSING:
            return self._fault(place, f"missing; set it here or as {place}=...: {wanted(kind)}")
        if dataclasses.is_dataclass(kind):
            return self._section(typing.cast(type, kind), value, place)
        if origin is dict:
            return self._table(arguments[1], value, place)
        if origin is tuple:
            return self._list(arguments[0], value, place)
        return self._scalar(kind, value, place)

    def _section(self, kind: type, value: Any, place: str) -> Any:
        if not isinstance(value, Mapping):
            return self._fault(place, f"found {show(value)}; wanted: {wanted(kind)}")
        hints = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        for key in value:
            if key not in fields:
                self._unknown(join(place, str(key)), value[key], list(fields))
        given = {}
        for name, spec in fields.items():
            where = join(place, name)
            if name in value:
                found = self.read(hints[name], value[name], where)
                if found is not INVALID:
                    given[name] = found
            elif _is_mandatory(spec) and where not in self.doubtful:
                self.read(hints[name], MISSING, where)
        if any(_is_mandatory(spec) for name, spec in fields.items() if name not in given):
            self.doubtful.add(place)
            return INVALID
        return kind(**given)

    def _table(self, kind: Any, value: Any, place: str) -> Any:
        if not isinstance(value, Mapping):
            return self._fault(place, f"found {show(value)}; wanted: {wanted(dict[str, Any])}")
        entries = {str(k): v for k, v in value.items() if v is not None}
        read = {key: self.read(kind, entry, join(place, key)) for key, entry in entries.items()}
        return {key: found for key, found in read.items() if found is not INVALID}

    def _list(self, kind: Any, value: Any, place: str) -> Any:
        if not isinstance(value, (list, tuple)):
            return self._fault(place, f"found {show(value)}; wanted: a list, as in [a, b]")
        read = [self.read(kind, entry, f"{place}[{i}]") for i, entry in enumerate(value)]
        return tuple(found for found in read if found is not INVALID)

    def _scalar(self, kind: type, value: Any, place: str) -> Any:
        if type(value) is kind:
            return value
        if value is False and issubclass(kind, Enum) and "off" in kind.__members__:
            return kind["off"]  # YAML reads a bare `off` as false
        try:
            if issubclass(kind, Enum):
                node: Any = EnumNode(kind, value, is_optional=False)
            else:
                node = _NODES[kind](value, is_optional=False)
            return node._value()
        except (OmegaConfBaseException, ValueError, TypeError):
            near = ""
            if issubclass(kind, Enum):
                near = suggestion(str(value), [member.name for member in kind])
            return self._fault(place, f"found {show(value)}; wanted: {wanted(kind)}{near}")

    def _fault(self, place: str, text: str) -> object:
        self.problems.append(Problem(place, text))
        self.doubtful.add(place)
        return INVALID

    def _unknown(self, place: str, value: Any, allowed: list[str]) -> None:
        section, _, key = place.rpartition(".")
        near = [join(section, name) for name in difflib.get_close_matches(key, allowed, 1, 0.6)]
        leaves = {known.rpartition(".")[2]: known for known in reversed(self.known)}
        near += [leaves[leaf] for leaf in difflib.get_close_matches(key, list(leaves), 1, 0.8)]
        hint = f"did you mean {near[0]}? " if near else ""
        self.doubtful.update(near[:1])
        where = f"keys of {section}" if section else "top-level keys"
        self.problems.append(
            Problem(
                place, f"unknown key (value {show(value)}); {hint}{where}: {', '.join(allowed)}"
            )
        )


def join(place: str, key: str) -> str:
    """Dotted key of `key` inside `place`; a key that holds dots is written in brackets."""
    if "." in key:
        return f"{place}[{key}]"
    return f"{place}.{key}" if place else key


def show(value: Any) -> str:
    """A value as a fault quotes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a section" if value else "an empty section"
    if isinstance(value, list):
        return "a list"
    return repr(value)


def wanted(kind: Any) -> str:
    """What a value may be, in words."""
    if typing.get_origin(kind) is dict:
        return "a table of names and values"
    if typing.get_origin(kind) is tuple:
        return "a list"
    if dataclasses.is_dataclass(kind):
        return f"a section with {', '.join(f.name for f in dataclasses.fields(kind))}"
    if issubclass(kind, Enum):
        return "one of " + ", ".join(member.name for member in kind)
    return _WANTED[kind]


def suggestion(word: str, allowed: Sequence[str]) -> str:
    """` (did you mean x?)`, or nothing when no allowed word is near."""
    near = difflib.get_close_matches(word, allowed, 1, 0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def to_plain(value: Any) -> Any:
    """A dataclass as the plain data a YAML holds; `Reader.read` undoes it."""
    if isinstance(value, Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    return value


def dotted_keys(kind: Any, types: Mapping[str, Any], place: str = "") -> list[str]:
    """Every dotted key of a schema; entries of tables are not listed."""
    if kind is Any:
        kind = types.get(place)
    if kind is None or not dataclasses.is_dataclass(kind):
        return [place]
    hints = typing.get_type_hints(kind)
    inner = [
        dotted_keys(hints[f.name], types, join(place, f.name)) for f in dataclasses.fields(kind)
    ]
    return ([place] if place else []) + [key for keys in inner for key in keys]


def _is_mandatory(spec: "dataclasses.Field[Any]") -> bool:
    """Whether a key has no default; `???` is one that only fills the place."""
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
