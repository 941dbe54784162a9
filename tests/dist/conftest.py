"""A world with demo data for the tests of each module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from world import Forge, World

from mmtrain.data.shapes import write_shapes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder starts ranks."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.dist)


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    """What starts ranks."""
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world of shapes."""
    folder = tmp_path_factory.mktemp("data") / "demo_data"
    write_shapes(folder, 400, 0)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, forge: Forge, demo_data: Path) -> World:
    """Ranks on demand, in a folder of the module's own with `demo_data`."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "demo_data").symlink_to(demo_data)
    return World(folder, forge)
