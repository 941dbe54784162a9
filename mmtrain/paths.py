"""File names that an index, a manifest or a record brings along: they stay in their folder."""

import os
from pathlib import Path, PurePosixPath

from mmtrain.errors import ContentError


def inside(folder: Path, name: object, source: Path, *, links: bool = False) -> Path:
    """The file `name` of a folder; nothing is opened or made.

    Args:
        folder: the folder that the file must be in.
        name: as `source` gives it.
        source: the file that names it, for the message.
        links: allow a symbolic link that leads out. Caches of the Hugging Face hub consist of
            such links, so what is only read, and by a format that runs no code, may be one.

    Raises:
        ContentError: the name is absolute or climbs out, is no file name, or is a link that leads
            out (a forged index could have any file read or written).
    """
    if not isinstance(name, str) or not _stays(name):
        raise ContentError(
            f"{source}: names the file {name!r}, which leaves {folder}: the index is forged; "
            "nothing was read or written. Get the folder again from where you trust it"
        )
    path = folder / name
    steps = [path, *path.parents][: len(PurePosixPath(name).parts)]
    if not links and any(step.is_symlink() for step in steps):
        target = path.resolve()
        if not target.is_relative_to(folder.resolve()):
            raise ContentError(
                f"{source}: names the file {name!r}, which is a symbolic link to {target}, outside "
                f"of {folder}; it was not read. Put the file itself there"
            )
    return path


def below(folder: Path, name: str) -> Path | None:
    """The file that a record names, or None when the name leads out of the folder.

    Links count as their names: pictures are linked together by those who own them.
    """
    path = folder / name
    is_below = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
    return path if is_below else None


def _stays(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and not set(name) & set("\\\0")
