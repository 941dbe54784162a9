"""The floors of the house: who may import whom (docs/architecture.md)."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mmtrain"

# engine -> the files and folders that may import it; import-linter cannot see single submodules
FENCES = {
    "torch.distributed": ("parallel", "train", "run.py"),
    "megatron": ("parallel",),
    "deepspeed": ("parallel", "train"),
    "streaming": ("data",),
}


def imports(path: Path) -> Iterator[str]:
    """Every module name a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("engine", FENCES)
def test_each_engine_enters_by_its_own_rooms(engine: str) -> None:
    trespassers = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in FENCES[engine]
        and any(f"{name}.".startswith(f"{engine}.") for name in imports(path))
    ]
    assert trespassers == []


def test_deepspeed_is_started_in_one_file() -> None:
    calls = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(
            isinstance(node, ast.Attribute)
            and node.attr == "initialize"
            and isinstance(node.value, ast.Name)
            and node.value.id == "deepspeed"
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]
    assert calls == ["train/engine.py"]


def test_rooms_import_only_from_floors_below() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_package_files_of_rooms_are_empty() -> None:
    for path in PACKAGE.glob("*/**/__init__.py"):
        assert path.read_text() == "", path


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports them by it, and would collect nothing at all."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert [name for name, count in Counter(names).items() if count > 1] == []
