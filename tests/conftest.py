"""What several test files share: the demo world, written once a session."""

from pathlib import Path

import pytest

from mmtrain.data.shapes import write_shapes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo world: 120 training documents, held-out splits and a tokenizer."""
    out = tmp_path_factory.mktemp("shapes") / "demo_data"
    write_shapes(out, 120, seed=0)
    return out
