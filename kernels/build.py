"""Builds the CUDA kernels: for GPUs with nvcc, for the host emulator with g++.

    python kernels/build.py                   # every architecture that the compiler knows
    python kernels/build.py --arch sm_90a     # one

Every library is named after a hash of its sources and flags and kept in a cache folder
(`$MMTRAIN_KERNEL_CACHE`, or `~/.cache/mmtrain/kernels`): nothing is compiled twice, an edited
kernel is never mistaken for the old one, and a library that was built elsewhere serves from here,
without a compiler. Libraries are written under a temporary name and renamed, so any number of
processes may build at once.

The GPU library holds kernels and bindings; `mmtrain.ops.extension` loads it. Tests call kernels in
the emulator through ctypes:

    from kernels.build import SOURCES, emulator
    library = emulator([SOURCES / "qk_norm_rope.cu"])
"""

import argparse
import ctypes
import hashlib
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
BINDINGS = SOURCES / "bindings.cpp"
HEADERS = ("*.h", "*.cuh")

# -arch=sm_90a alone would add a pass for plain compute_90, which knows no sm_90a instructions
ARCHITECTURES = {
    "sm_80": "arch=compute_80,code=[sm_80,compute_80]",  # its PTX serves GPUs newer than the list
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "sm_100": "arch=compute_100,code=sm_100",
}
NVCC_FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC")
# of the oldest torch that may load the library: 2.11
BINDINGS_FLAGS = ("-O2", "-std=c++20", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000")
EMULATOR_FLAGS = (
    "-O1", "-std=c++17", "-DMMTRAIN_EMULATE", "-shared", "-fPIC", "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas",
)  # fmt: skip


class BuildError(RuntimeError):
    """A compiler is missing or refused a source; the text says which and why."""


def cache_folder() -> Path:
    """Where built libraries are kept."""
    chosen = os.environ.get("MMTRAIN_KERNEL_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "mmtrain" / "kernels"


def find_host_compiler() -> str | None:
    """The C++ compiler that builds bindings and emulator, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("g++")


def find_nvcc() -> str | None:
    """The CUDA compiler, or None."""
    places = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    found = [shutil.which("nvcc", path=f"{place}/bin") for place in places if place]
    return shutil.which("nvcc") or next(filter(None, found), None)


def emulator(sources: Sequence[Path], flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The kernels of `sources` on the host, built if the cache has none.

    Args:
        sources: `.cu` files; headers of their folders count as part of them.
        flags: added to the compiler's, such as `-DNAME=1`.

    Raises:
        BuildError: without g++ (ask `find_host_compiler` first), or with its messages.
    """
    command = [_host_compiler(), *EMULATOR_FLAGS, *flags]
    path = cache_folder() / f"emulator-{content_hash(sources, command)}.so"
    if not path.exists():
        with _renamed(path) as made:
            _run([*command, "-x", "c++", *map(str, sources), "-o", made])
    return ctypes.CDLL(str(path))


def emulated_extension() -> Path:
    """The GPU library with the emulator in the GPU's place: it implements the ops on the CPU."""
    compiler = _host_compiler()
    path = cache_folder() / f"emulated-{library_hash()}.so"
    if path.exists():
        return path
    with _renamed(path) as made, tempfile.TemporaryDirectory() as folder:
        bindings = _compile_bindings(folder, compiler, ("-DMMTRAIN_EMULATE",))
        kernels = ["-x", "c++", *map(str, kernel_sources()), "-x", "none"]
        # its problems are small: compiling fast is worth more than running fast
        flags = (*EMULATOR_FLAGS, "-O0")
        _run([compiler, *flags, *kernels, bindings, *_torch_link(), "-o", made])
    return path


def kernel_sources() -> list[Path]:
    """Every `.cu` of the library."""
    return sorted(SOURCES.glob("*.cu"))


def library_hash() -> str:
    """Hash of everything a library is made of but its architectures."""
    return content_hash(
        [*kernel_sources(), BINDINGS], (*NVCC_FLAGS, *BINDINGS_FLAGS, *EMULATOR_FLAGS)
    )


def built_libraries() -> dict[Path, tuple[str, ...]]:
    """GPU libraries of the present sources in the cache, and their architectures."""
    start = f"kernels-{library_hash()}-"
    found = cache_folder().glob(f"{start}*.so")
    return {path: tuple(path.stem.removeprefix(start).split("-")) for path in sorted(found)}


def known_architectures(nvcc: str) -> tuple[str, ...]:
    """Those of `ARCHITECTURES` that the compiler knows."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return tuple(name for name in ARCHITECTURES if name.removesuffix("a") in known)


def build_library(architectures: Sequence[str] = (), jobs: int = 1) -> Path:
    """The GPU library, from the cache if it is there.

    Args:
        architectures: names of `ARCHITECTURES`; none means all that the compiler knows.
        jobs: sources compiled at once.

    Raises:
        BuildError: without nvcc or g++, or with a compiler's messages.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc in PATH, CUDA_HOME or /usr/local/cuda: install the CUDA toolkit")
    compiler = _host_compiler()
    chosen = tuple(architectures) or known_architectures(nvcc)
    path = cache_folder() / f"kernels-{library_hash()}-{'-'.join(chosen)}.so"
    if path.exists():
        return path
    with _renamed(path) as made, tempfile.TemporaryDirectory() as folder:
        sources = kernel_sources()
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda s: compile_kernels(s, chosen, nvcc), sources))
        bindings = _compile_bindings(folder, compiler)
        _run([nvcc, "-shared", bindings, *map(str, objects), *_torch_link(), "-o", made])
    return path


def compile_kernels(source: Path, architectures: Sequence[str], nvcc: str) -> Path:
    """Object file of one `.cu`, from the cache if it is there; beside it, `.txt`, ptxas' report.

    The report's first line is the compiler's processor seconds.
    """
    targets = [f"-gencode={ARCHITECTURES[name]}" for name in architectures]
    command = [nvcc, *NVCC_FLAGS, *targets, "-Xptxas=-v", "-c"]
    path = cache_folder() / f"{source.stem}-{content_hash([source], command)}.o"
    if path.exists():
        return path
    before = _children_seconds()
    with _renamed(path) as made:
        report = _run([*command, str(source), "-o", made])
        with _renamed(path.with_suffix(".txt")) as beside:
            Path(beside).write_text(f"{_children_seconds() - before:.1f} s\n{report}")
    return path


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def content_hash(sources: Iterable[Path], flags: Iterable[str]) -> str:
    """Hash of the sources, of the headers beside them and of the flags; paths do not count."""
    files = {Path(source) for source in sources}
    for folder in {file.parent for file in files}:
        files.update(header for pattern in HEADERS for header in folder.glob(pattern))
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    for word in flags:
        digest.update(Path(word).name.encode() + b"\0")
    return digest.hexdigest()[:16]


def _host_compiler() -> str:
    compiler = find_host_compiler()
    if compiler is None:
        raise BuildError("no g++ in PATH: install it, or name a compiler in CXX")
    return compiler


def _compile_bindings(folder: str, compiler: str, flags: Sequence[str] = ()) -> str:
    made, include = f"{folder}/bindings.o", f"-isystem{_torch_folder() / 'include'}"
    _run([compiler, *BINDINGS_FLAGS, *flags, include, "-c", str(BINDINGS), "-o", made])
    return made


def _torch_link() -> list[str]:
    """Only libtorch_cpu: torch hides its libraries from ones that do not link them."""
    return [f"-L{_torch_folder() / 'lib'}", "-ltorch_cpu", "-ldl"]


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")  # its headers are wanted, so it is not imported
    if found is None or found.origin is None:
        raise BuildError("the bindings need torch's headers: install torch")
    return Path(found.origin).parent


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-8000:]}")
    return done.stdout + done.stderr


@contextmanager
def _renamed(path: Path) -> Iterator[str]:
    """A path to write to, which becomes `path` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        yield str(made)
        made.rename(path)


def main() -> int:
    """Build the GPU library and say where it lies."""
    parser = argparse.ArgumentParser(description="Build the CUDA kernels.")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, default=[])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        path = build_library(arguments.arch, arguments.jobs)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
