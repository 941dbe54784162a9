"""Checkpoint folders: written under another name, committed by one rename.

`checkpoints/step-00000100.partial/` is filled by every rank, the manifest comes last, then the
folder is renamed to `step-00000100` and its parent synced. A reader looks at committed folders
only; one that turns out damaged is renamed to `step-00000100.damaged` and kept. Tensors are
safetensors: no pickle is written or read.

    rank files: write, fsync -> manifest: write, fsync -> fsync folder -> rename -> fsync parent
"""

import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from mmtrain.checkpoint import manifest as manifests
from mmtrain.checkpoint.manifest import FileEntry, Manifest, describe_file
from mmtrain.checkpoint.tensorfile import info_of, write_tensors
from mmtrain.disk import sync
from mmtrain.errors import ContentError, MissingError, MmtrainError, StorageError

log = logging.getLogger(__name__)

_COMMITTED = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial"
_REMOVED = ".removed"
_DAMAGED = ".damaged"


def folder_of(root: Path, step: int) -> Path:
    """The committed folder of a step."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a committed folder."""
    return int(folder.name.removeprefix("step-"))


def partial_of(root: Path, step: int) -> Path:
    """The folder that a step is written to before it is committed."""
    return folder_of(root, step).with_suffix(_PARTIAL)


def committed(root: Path) -> list[Path]:
    """Committed checkpoints below `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _COMMITTED.fullmatch(path.name)]
    return sorted(path for path in found if path.is_dir())


def begin(root: Path, step: int) -> Path:
    """Make the empty partial folder of a step; one rank calls it, then a barrier."""
    partial = partial_of(root, step)
    try:
        if partial.exists():  # left by a save that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"{partial}: cannot be made: {error}") from error
    return partial


def rank_file(rank: int) -> str:
    """Name of a rank's part."""
    return f"rank-{rank:05d}.safetensors"


def write_part(partial: Path, rank: int, tensors: dict[str, Tensor]) -> tuple[str, FileEntry]:
    """Write and sync one rank's tensors; returns the file's name and its entry."""
    path = partial / rank_file(rank)
    try:
        infos = {name: info_of(tensor) for name, tensor in tensors.items()}
        write_tensors(path, infos, tensors.__getitem__)
        return path.name, describe_file(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error


def commit(root: Path, manifest: Manifest) -> Path:
    """Write the manifest and give the folder its name; one rank calls it after all parts.

    A sound checkpoint of the same step is never replaced: it stays, and the new one is dropped.
    """
    final, partial = folder_of(root, manifest.step), partial_of(root, manifest.step)
    try:
        if final.exists() and _is_sound(final):
            shutil.rmtree(partial)
            return final
        manifest.write(partial)
        sync(partial / manifests.NAME)
        sync(partial)
        if final.exists():
            set_aside(final, "it is damaged, and its step was saved again")
        partial.rename(final)
        sync(root)
    except OSError as error:
        raise StorageError(f"{final}: cannot be committed: {error}") from error
    return final


def discard(root: Path, step: int) -> None:
    """Remove what a failed save has written."""
    shutil.rmtree(partial_of(root, step), ignore_errors=True)


def retain(root: Path, keep: int, keep_every_steps: int = 0) -> None:
    """Remove committed checkpoints but the `keep` newest and every `keep_every_steps`-th step.

    The newest is looked at first; when its files are not what its manifest says, nothing is
    removed.

    Raises:
        StorageError: one cannot be removed.
    """
    found = committed(root)
    if not found or not _is_sound(found[-1]):
        return
    for folder in found[: -max(1, keep)]:
        if keep_every_steps and step_of(folder) % keep_every_steps == 0:
            continue
        doomed = folder.with_suffix(_REMOVED)
        try:
            folder.rename(doomed)  # never half a committed checkpoint
            shutil.rmtree(doomed)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be removed: {error}") from error


def sweep(root: Path) -> None:
    """Remove what killed saves and removals have left; only while no other run writes here."""
    for path in root.glob("step-*"):
        if path.suffix in (_PARTIAL, _REMOVED):
            log.info("%s: left by a process that was killed, removed", path)
            shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path, reason: str) -> None:
    """Rename a damaged checkpoint, so that no reader takes it for one; nothing is deleted."""
    aside = folder.with_suffix(_DAMAGED)
    number = 1
    while aside.exists():
        aside, number = folder.with_suffix(f"{_DAMAGED}-{number}"), number + 1
    try:
        folder.rename(aside)
    except OSError as error:
        log.warning("%s: %s; it cannot be renamed (%s)", folder, reason, error)
        return
    log.warning("%s: %s; kept as %s", folder, reason, aside)


def verify_sizes(folder: Path, manifest: Manifest) -> None:
    """Hold the sizes of all files against the manifest.

    Raises:
        MissingError: a file is not there.
        ContentError: one has another size.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise MissingError(f"{path}: missing; use an earlier checkpoint of the run")
        size = path.stat().st_size
        if size != expected.bytes:
            raise ContentError(
                f"{path}: found {size} bytes, the manifest says {expected.bytes}; use an earlier "
                "checkpoint of the run"
            )


def verify_file(folder: Path, name: str, manifest: Manifest) -> None:
    """Compare a file with its manifest entry.

    Raises:
        MissingError: the file is not there, or the manifest does not know it.
        ContentError: its size or hash differs.
        StorageError: it cannot be read.
    """
    path, expected = folder / name, manifest.files.get(name)
    if expected is None or not path.exists():
        raise MissingError(f"{path}: missing; use an earlier checkpoint of the run")
    try:
        found = describe_file(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error
    if found != expected:
        raise ContentError(
            f"{path}: found {found.bytes} bytes, sha256 {found.sha256[:12]}; the manifest says "
            f"{expected.bytes} bytes, sha256 {expected.sha256[:12]}; use an earlier checkpoint"
        )


def faults(folder: Path, names: Iterable[str] | None = None) -> Iterator[MmtrainError]:
    """What is wrong with a committed checkpoint: its manifest, all sizes, the hash of some files.

    Args:
        folder: the checkpoint.
        names: files to hash; None = all of them.
    """
    try:
        manifest = Manifest.read(folder)
        verify_sizes(folder, manifest)
    except (ContentError, MissingError) as error:
        yield error
        return
    for name in manifest.files if names is None else names:
        try:
            verify_file(folder, name, manifest)
        except MmtrainError as error:
            yield error


def _is_sound(folder: Path) -> bool:
    """Whether the manifest and all sizes are right; hashes are not looked at."""
    return next(faults(folder, names=()), None) is None
