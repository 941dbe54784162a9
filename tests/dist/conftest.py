"""A world with demo data, shared by all tests of one session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from world import World

from mmtrain.data.shapes import write_shapes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder starts ranks."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.dist)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Ranks on demand, in a folder with `demo_data`."""
    folder = tmp_path_factory.mktemp("world")
    write_shapes(folder / "demo_data", 400, 0)
    world = World(folder)
    yield world
    world.close()
