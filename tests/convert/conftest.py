"""The tool as a function."""

import importlib.util
from collections.abc import Callable

import pytest
from converted import ROOT, Convert


def _tool() -> Callable[[list[str]], int]:
    path = ROOT / "tools/convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], int] = module.main
    return main


_MAIN = _tool()


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Convert:
    """Run the tool's command line; its output, when it ends with the code that is expected."""

    def run(*words: object, code: int = 0) -> str:
        found = _MAIN([str(word) for word in words])
        out = capsys.readouterr()
        assert found == code, f"exit code {found}\n{out.out}\n{out.err}"
        return out.out + out.err

    return run
