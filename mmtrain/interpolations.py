"""What the text of a recipe may hold: a recipe may come from someone else, and is only data.

`${a.b}` copies another key. Resolvers (`${oc.env:HOME}`, `${oc.decode:...}`, and what other code
of the process registers) read the environment or run code, so they are refused by their text,
before OmegaConf sees a value; its table of resolvers is left as it is. Copies of copies grow
without bound, so files, texts and the resolved recipe have limits.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmtrain.errors import Problem
from mmtrain.schema import MISSING, join

MAX_FILE_BYTES = 1 << 18  # a resolved recipe is about 5 KB
MAX_TEXT = 1 << 12  # characters of one value
MAX_NODES = 10_000  # a recipe with all its defaults has a few hundred
MAX_DEPTH = 24  # the schema has 4 levels

_MARKS = re.compile(r"\$\{|\}|:")
_COPY = re.compile(r"\$\{([^${}]+)\}")


def read_file(path: Path) -> Any:
    """Content of a YAML file as OmegaConf's nodes; no tag of it makes an object.

    Raises:
        ValueError: it cannot be read as YAML; the text says why, in one line.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{size:,} bytes; a recipe has {MAX_FILE_BYTES:,} at most")
        return OmegaConf.load(path, max_yaml_expanded_nodes=MAX_NODES)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise ValueError(one_line(error).partition(" See https")[0]) from error
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error


def checked(content: Any, source: str, found: list[Problem], place: str = "") -> Any:
    """Plain data without the values that are refused; each becomes a problem of its own.

    Args:
        content: what a file or an override says, `${...}` as written.
        source: the file or the override, for the message.
        found: problems are added here.
        place: dotted key of `content`.
    """
    if isinstance(content, Mapping):
        inner = {key: (join(place, str(key)), value) for key, value in content.items()}
        kept = {k: checked(v, source, found, p) for k, (p, v) in inner.items() if _fine(v)}
    elif isinstance(content, list):
        inner = {i: (f"{place}[{i}]", value) for i, value in enumerate(content)}
        kept = {i: checked(v, source, found, p) for i, (p, v) in inner.items() if _fine(v)}
    else:
        return content
    found += [
        Problem(f"{source} {p}", _why(value)) for p, value in inner.values() if not _fine(value)
    ]
    return kept if isinstance(content, Mapping) else list(kept.values())


def resolved(config: DictConfig, found: list[Problem]) -> Any:
    """Plain data with every `${...}` replaced, faulty ones left out; None when it has no end."""
    plain = OmegaConf.to_container(config, resolve=False)
    if (grown := next(_grown(plain, plain, ""), None)) is not None:
        found.append(grown)
        return None
    try:
        return _resolved(config, "", found, iter(range(MAX_NODES)), 0)
    except _TooLargeError as error:
        found.append(Problem(str(error), "its ${...} copy what holds copies again; write it out"))
        return None


def one_line(error: Exception) -> str:
    """The message of an error of OmegaConf or PyYAML, without what it says of its own objects."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("full_key", "object")))


class _TooLargeError(Exception):
    """A recipe that grows without bound; the text is the key where it was noticed."""


def _fine(value: Any) -> bool:
    return not isinstance(value, str) or not _why(value)


def _why(text: str) -> str:
    """Why a text is refused, or nothing."""
    if len(text) > MAX_TEXT:
        return f"a text of {len(text):,} characters; at most {MAX_TEXT:,}"
    depth = 0
    for mark in _MARKS.findall(text):
        if mark == ":" and depth:
            return (
                f"{text!r} is refused, nothing was read or run: resolvers can read the environment "
                "and run code; write the value itself, or ${a.b} to copy another key; for a value "
                "of this machine: an override, as in output=$HOME/runs"
            )
        depth = max(0, depth + {"${": 1, "}": -1, ":": 0}[mark])
    return ""


def _grown(node: Any, root: Any, place: str) -> Iterator[Problem]:
    """Texts that join a copy with more text, where the copied key is not written out itself."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _grown(value, root, join(place, str(key)))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _grown(value, root, f"{place}[{number}]")
    elif isinstance(node, str) and "${" in node and not _COPY.fullmatch(node):
        copies = _COPY.findall(node)
        if len(copies) < node.count("${") or not all(_written_out(c, root) for c in copies):
            text = "a ${...} with text beside it copies a key that is written out, without ${...}"
            yield Problem(place, f"found {node!r}; {text}")


def _written_out(key: str, root: Any) -> bool:
    """Whether a key holds a plain value without `${...}`; relative keys are not followed."""
    node = root
    for part in re.split(r"[.\[\]]+", key.strip().rstrip("]")):
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return False
    return isinstance(node, (str, int, float)) and "${" not in str(node)


def _resolved(node: Any, place: str, found: list[Problem], left: Iterator[int], depth: int) -> Any:
    if not isinstance(node, (DictConfig, ListConfig)):
        return node
    keys: Sequence[Any] = list(node) if isinstance(node, DictConfig) else range(len(node))
    plain: dict[Any, Any] = {}
    for key in keys:
        where = join(place, str(key)) if isinstance(node, DictConfig) else f"{place}[{key}]"
        if next(left, None) is None or depth > MAX_DEPTH:
            raise _TooLargeError(where if len(where) < 60 else where[:60] + "...")
        try:
            plain[key] = MISSING if OmegaConf.is_missing(node, key) else node[key]
        except OmegaConfBaseException as error:
            written: Any = OmegaConf.to_container(node, resolve=False)
            found.append(Problem(where, f"cannot resolve {written[key]!r}: {one_line(error)}"))
            continue
        plain[key] = _resolved(plain[key], where, found, left, depth + 1)
    return plain if isinstance(node, DictConfig) else list(plain.values())
