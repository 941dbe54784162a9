"""The sequence format of the small Emu."""

import pytest
from small_emu import IDS, small

from mmtrain.data.tokens import SequenceFormat
from mmtrain.models.emu.spec import EMU


@pytest.fixture(scope="session")
def form() -> SequenceFormat:
    """Special ids and image size of `small_emu.small`."""
    return EMU.sequence(small(), IDS)
