"""Libraries of kernels are built once, never stale, and by any number of processes at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels import build

needs_compiler = pytest.mark.skipif(build.find_host_compiler() is None, reason="needs g++")
HEADER, SOURCE = "constant.h", "answer.cu"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of one function, and an empty cache."""
    monkeypatch.setenv("MMTRAIN_KERNEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / HEADER).write_text("#define ANSWER 41\n")
    path = tmp_path / SOURCE
    path.write_text(f'#include "{HEADER}"\nextern "C" int answer() {{ return ANSWER + 1; }}\n')
    return path


@needs_compiler
def test_a_library_is_compiled_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.emulator([source]).answer() == 42
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail("compiled again"))
    assert build.emulator([source]).answer() == 42


@needs_compiler
def test_an_edited_header_makes_a_new_library(source: Path) -> None:
    assert build.emulator([source]).answer() == 42
    (source.parent / HEADER).write_text("#define ANSWER 1\n")
    assert build.emulator([source]).answer() == 2
    assert build.emulator([source], ["-DOTHER"]).answer() == 2
    assert len(list(build.cache_folder().glob("*.so"))) == 3


@needs_compiler
def test_processes_that_build_at_once_all_get_a_whole_library(source: Path) -> None:
    root = Path(build.__file__).resolve().parents[1]
    script = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from pathlib import Path; from kernels.build import emulator\n"
        f"print(emulator([Path({str(source)!r})]).answer())"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["42"] * 3
    assert [path.suffix for path in build.cache_folder().iterdir()] == [".so"]


@needs_compiler
def test_a_refused_source_is_an_error_with_the_compilers_words(source: Path) -> None:
    source.write_text("int broken( {")
    with pytest.raises(build.BuildError, match="broken"):
        build.emulator([source])
    assert list(build.cache_folder().iterdir()) == []


def test_without_a_compiler_the_error_says_what_to_install(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(build.BuildError, match=r"install it, or name a compiler in CXX"):
        build.emulator([source])
    with pytest.raises(build.BuildError, match="install the CUDA toolkit"):
        build.build_library()


def test_a_library_built_elsewhere_is_found_without_a_compiler(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda *args, **kwargs: None)
    build.cache_folder().mkdir()
    carried = build.cache_folder() / f"kernels-{build.library_hash()}-sm_80-sm_90a.so"
    carried.touch()
    (build.cache_folder() / "kernels-0123456789abcdef-sm_80.so").touch()  # of other sources
    assert build.built_libraries() == {carried: ("sm_80", "sm_90a")}
