"""Old versions with known faults are named, installed or allowed; `make lint` asks."""

import importlib.util
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

ADVISORIES = """
[[advisory]]
package = "torch"
id = "CVE-2025-32434"
affected = "<2.6"
what = "torch.load runs code in spite of weights_only=True"

[[advisory]]
package = "torch"
id = "CVE-2026-24747"
affected = "<2.10"
what = "a forged checkpoint corrupts memory in the weights_only unpickler"
"""

PROJECT = """
[project]
dependencies = ["Torch{torch}"]
[project.optional-dependencies]
dev = ["ruff"]
"""


@pytest.fixture
def audit(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "audit_dependencies", repository / "tools/audit_dependencies.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def run(
    audit: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Audit a project with a bound of torch, where some version of it is installed."""

    def audited(bound: str, version: str | None) -> tuple[int, list[str]]:
        (tmp_path / "pyproject.toml").write_text(PROJECT.format(torch=bound))
        (tmp_path / "advisories.toml").write_text(ADVISORIES)
        here = {"torch": Version(version)} if version else {}
        monkeypatch.setattr(audit, "installed", here.get)
        files = ("--project", "pyproject.toml"), ("--advisories", "advisories.toml")
        code = audit.main(
            [word for option, name in files for word in (option, str(tmp_path / name))]
        )
        return code, capsys.readouterr().err.splitlines()

    return audited


def test_this_project_and_what_is_installed_here_pass(
    audit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main([]) == 0, capsys.readouterr().err
    assert "none applies" in capsys.readouterr().out


def test_an_old_installed_version_is_named(run: Run) -> None:
    code, lines = run(">=2.11", "2.5.1+cu124")
    assert code == 1 and len(lines) == 2
    assert "torch 2.5.1+cu124 is installed" in lines[0] and "CVE-2025-32434" in lines[0]
    code, (line,) = run(">=2.11", "2.9.1")
    assert code == 1 and "CVE-2026-24747" in line


def test_a_low_bound_is_named(run: Run) -> None:
    code, (line,) = run(">=2.6,<3", "2.11")
    assert code == 1 and "pyproject.toml allows torch 2.6" in line and "raise the bound" in line
    code, (line, _) = run("", None)
    assert code == 1 and "no lower bound" in line


def test_fixed_versions_pass(run: Run) -> None:
    assert run(">=2.10", "2.14.1+cu130") == (0, [])
    assert run("==2.11", None) == (0, [])


def test_every_advisory_is_about_a_dependency(audit: ModuleType, repository: Path) -> None:
    listed = tomllib.loads((repository / "tools/advisories.toml").read_text())["advisory"]
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert {entry["package"] for entry in listed} <= set(audit.lower_bounds(project))
    assert len({entry["id"] for entry in listed}) == len(listed)


def test_lint_asks(repository: Path) -> None:
    lint = (repository / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert "tools/audit_dependencies.py" in lint
