"""Builds the CUDA kernels, for a GPU with nvcc and for the host emulator with g++.

Every library is named after a hash of its sources and flags and is kept in a cache folder, so that
nothing is compiled twice and an edited kernel is never mistaken for the old one. A build writes to
a temporary name and renames it: any number of processes may build at once.

    from kernels.build import SOURCES, emulator
    library = emulator([SOURCES / "qk_norm_rope.cu"])        # a ctypes library

Cache: `$MMTRAIN_KERNEL_CACHE`, or `~/.cache/mmtrain/kernels`.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
HEADERS = ("*.h", "*.cuh")
EMULATOR_FLAGS = (
    "-O1", "-std=c++17", "-DMMTRAIN_EMULATE", "-shared", "-fPIC", "-fvisibility=default",
    "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas",
)  # fmt: skip


class BuildError(RuntimeError):
    """A compiler is missing or refused a source; the text says which and why."""


def cache_folder() -> Path:
    """Where built libraries are kept."""
    chosen = os.environ.get("MMTRAIN_KERNEL_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "mmtrain" / "kernels"


def find_host_compiler() -> str | None:
    """The C++ compiler that builds the emulator, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("g++")


def emulator(sources: Sequence[Path], flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The kernels of `sources` on the host, built if the cache has none.

    Args:
        sources: `.cu` files; headers of their folders count as part of them.
        flags: added to the compiler's, such as `-DNAME=1`.

    Raises:
        BuildError: without g++ (ask `find_host_compiler` first), or with its messages.
    """
    compiler = find_host_compiler()
    if compiler is None:
        raise BuildError("the emulator needs g++; install it or name a compiler in CXX")
    command = [compiler, *EMULATOR_FLAGS, *flags, "-x", "c++", *map(str, sources)]
    return ctypes.CDLL(str(cached("emulator", sources, command)))


def cached(name: str, sources: Sequence[Path], command: Sequence[str]) -> Path:
    """Library made by `command -o LIBRARY`, from the cache if it is there."""
    path = cache_folder() / f"{name}-{content_hash(sources, command)}.so"
    if not path.exists():
        compile_to(path, command)
    return path


def content_hash(sources: Iterable[Path], command: Sequence[str]) -> str:
    """Hash of the sources, of the headers beside them and of the flags; paths do not count."""
    files = {Path(source) for source in sources}
    for folder in {file.parent for file in files}:
        files.update(header for pattern in HEADERS for header in folder.glob(pattern))
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    for word in command:
        digest.update(Path(word).name.encode() + b"\0")
    return digest.hexdigest()[:16]


def compile_to(path: Path, command: Sequence[str]) -> None:
    """Run `command -o` a temporary file and rename it to `path`.

    Raises:
        BuildError: with the end of the compiler's messages.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-8000:]}")
        made.rename(path)
