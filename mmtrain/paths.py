"""Names of files that other files hold: they stay in their folder.

An index, a manifest or an annotation comes with what it names, from anywhere. A name that climbs
out would have others read, copied or written over.
"""

import os
from pathlib import Path, PurePosixPath

from mmtrain.errors import ContentError


def inside(folder: Path, name: object, index: Path | None = None) -> Path:
    """The file of a folder that an index names; it need not be there.

    Links inside the folder are followed, and those of huggingface_hub's cache, whose
    `snapshots/<revision>/` link into the `blobs/` beside them.

    Args:
        folder: where the file must be.
        name: as it was read.
        index: who names it, for the message; the folder if left out.

    Raises:
        ContentError: it is no file name, or leads out of the folder.
    """
    place = index or folder
    if not isinstance(name, str) or not name or "\0" in name:
        raise ContentError(f"{place}: {str(name)[:80]!r} is no file name; the index is forged")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise ContentError(
            f"{place}: file name {name[:200]!r} leaves its folder, nothing was opened; the index "
            "is forged: get it from where it was published, or write it again"
        )
    path = folder / pure
    target = path.resolve()
    if not any(target.is_relative_to(home) for home in _homes(folder.resolve())):
        raise ContentError(
            f"{path}: is a link to {target}, out of its folder, nothing was opened; put the file "
            "itself there"
        )
    return path


def below(folder: Path, name: str) -> Path | None:
    """The file that a record names, or None when the name leads out of the folder.

    Links count as their names: pictures are linked together by those who own them.
    """
    path = folder / name
    is_below = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
    return path if is_below else None


def _homes(folder: Path) -> list[Path]:
    """Where the files of a folder may lie."""
    caches = [above.parent / "blobs" for above in folder.parents if above.name == "snapshots"]
    return [folder, *caches]
