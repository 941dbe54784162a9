"""Plans to files: one tensor in memory at a time, nothing under its name before it is whole."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from mmtrain.checkpoint.portable import new_folder
from mmtrain.checkpoint.tensorfile import write_sharded, write_tensors
from mmtrain.convert.pickles import SUFFIXES, write_pickle
from mmtrain.convert.plan import Made, Plan
from mmtrain.errors import Problem, RecipeError, StorageError

DROPPED = "dropped.safetensors"  # in a folder of full tensors: what the model does not use
SHARD_BYTES = 4 << 30


def write_folder(plan: Plan, out: Path, limit_bytes: int = SHARD_BYTES) -> None:
    """Write shards, their index, what is kept aside and the small files.

    Raises:
        StorageError: `out` is not empty, there is no room, or writing failed.
        ContentError: numbers of the source cannot be read.
    """
    require_room(plan, out)
    with new_folder(out) as partial:
        made = {made.target: made for made in plan.made}
        infos = {name: part.info for name, part in made.items()}
        write_sharded(partial, infos, lambda name: made[name].make(), limit_bytes)
        if plan.kept:
            _write_one(plan.kept, partial / DROPPED)
        _write_texts(plan, partial)


def write_single(plan: Plan, out: Path, name: str) -> None:
    """Write a folder with one weight file `name` and the small files."""
    require_room(plan, out)
    with new_folder(out) as partial:
        _write_one(plan.made, partial / name)
        _write_texts(plan, partial)


def write_file(plan: Plan, out: Path) -> None:
    """Write one weight file; its suffix says of which kind.

    Raises:
        RecipeError: the suffix is of no known kind.
        StorageError: the file is there already, there is no room, or writing failed.
    """
    check_file_name(out)
    if out.exists():
        raise StorageError(f"{out}: is there already; name a new file, nothing was overwritten")
    require_room(plan, out)
    partial = out.with_name(f"{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write_one(plan.made, partial)
        os.replace(partial, out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def check_file_name(out: Path) -> None:
    """A release is one file; its kind is its suffix."""
    allowed = (".safetensors", *SUFFIXES)
    if out.suffix not in allowed:
        raise RecipeError(
            [Problem(str(out), f"a release is one file; end its name in {', '.join(allowed)}")]
        )


def require_room(plan: Plan, out: Path) -> None:
    """Refuse before anything is written when the disk cannot hold it.

    Raises:
        StorageError: there is not enough room.
    """
    where = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(where).free
    if plan.bytes > free:
        raise StorageError(
            f"{out}: needs {plan.bytes:,} bytes, {where} has {free:,} left; free some or write "
            "elsewhere; nothing was written"
        )


def _write_one(parts: tuple[Made, ...], path: Path) -> None:
    made = {part.target: part for part in parts}
    infos = {name: part.info for name, part in made.items()}
    final = path.name.removesuffix(".partial")
    write = write_pickle if Path(final).suffix in SUFFIXES else write_tensors
    write(path, infos, lambda name: made[name].make())


def _write_texts(plan: Plan, folder: Path) -> None:
    for name, text in plan.texts.items():
        (folder / name).write_text(text)
