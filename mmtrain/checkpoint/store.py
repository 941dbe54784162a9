"""Checkpoint folders: written under another name, committed by one rename.

`checkpoints/step-00000100.partial/` is filled by every rank, the manifest comes last, then the
folder is renamed to `step-00000100` and its parent synced. A reader looks at committed folders
only. Tensors are safetensors: no pickle is written or read.
"""

import os
import re
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmtrain.checkpoint.manifest import FileEntry, Manifest, describe_file
from mmtrain.errors import ContentError, MissingError, StorageError

_COMMITTED = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial"


def folder_of(root: Path, step: int) -> Path:
    """The committed folder of a step."""
    return root / f"step-{step:08d}"


def committed(root: Path) -> list[Path]:
    """Committed checkpoints below `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _COMMITTED.fullmatch(path.name)]
    return sorted(path for path in found if path.is_dir())


def begin(root: Path, step: int) -> Path:
    """Make the empty partial folder of a step; one rank calls it, then a barrier."""
    partial = folder_of(root, step).with_suffix(_PARTIAL)
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
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
        sync(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error
    return path.name, describe_file(path)


def commit(root: Path, manifest: Manifest) -> Path:
    """Write the manifest and give the folder its name; one rank calls it after all parts."""
    final = folder_of(root, manifest.step)
    partial = final.with_suffix(_PARTIAL)
    try:
        manifest.write(partial)
        sync(partial / "manifest.json")
        sync(partial)
        if final.exists():  # the same step saved twice, e.g. by a resumed run
            shutil.rmtree(final)
        partial.rename(final)
        sync(root)
    except OSError as error:
        raise StorageError(f"{final}: cannot be committed: {error}") from error
    return final


def retain(root: Path, keep: int) -> None:
    """Remove committed checkpoints but the `keep` newest."""
    for folder in committed(root)[: -max(1, keep)]:
        doomed = folder.with_suffix(".removed")
        folder.rename(doomed)  # never half a committed checkpoint
        shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_part(folder: Path, rank: int, manifest: Manifest) -> dict[str, Tensor]:
    """One rank's tensors, after a check of the file's size and hash.

    Raises:
        MissingError: the file is not there.
        ContentError: its size or hash is not what the manifest says.
    """
    name = rank_file(rank)
    verify_file(folder, name, manifest)
    with safe_open(folder / name, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a dict


def verify_file(folder: Path, name: str, manifest: Manifest) -> None:
    """Compare a file with its manifest entry.

    Raises:
        MissingError: the file is not there, or the manifest does not know it.
        ContentError: its size or hash differs.
    """
    path, expected = folder / name, manifest.files.get(name)
    if expected is None or not path.exists():
        raise MissingError(f"{path}: missing; use an earlier checkpoint of the run")
    found = describe_file(path)
    if found != expected:
        raise ContentError(
            f"{path}: found {found.bytes} bytes, sha256 {found.sha256[:12]}; the manifest says "
            f"{expected.bytes} bytes, sha256 {expected.sha256[:12]}; use an earlier checkpoint"
        )
