"""The trunk's fused way, as on a GPU, trains like the modules themselves on every layout.

Layers then read the parameters of norms and similarity without calling these modules: hooks that
gather parameters (ZeRO-3) or sum gradients over tensor ranks must be served all the same.
"""

from typing import Any

import pytest
from fused import CALLED
from world import World

KEYS = ("loss", "loss_text", "loss_image", "grad_norm")
# heads of 32 channels, the narrowest that the op takes; every part that it can take over
MODEL = (
    "model.language.width=128", "model.language.kv_heads=2", "model.language.layers=2",
    "model.language.qk_norm=rms", "model.language.attention=cosine",
)  # fmt: skip
STEPS = ("train.steps=5", "schedule.warmup_steps=1", "train.global_batch_packs=4")

LAYOUTS = {
    "one": (1,),
    "tp2": (2, "parallel.tensor=2"),
    "tp2-sequence": (2, "parallel.tensor=2", "parallel.sequence=true"),
    "pp2": (2, "parallel.pipeline=2"),
    "dp2-zero3": (2, "parallel.zero_stage=3"),
}


@pytest.fixture(scope="module")
def chain(world: World) -> list[dict[str, Any]]:
    """One rank, module after module."""
    lines = world.train("chain", 1, *MODEL, *STEPS)
    assert not list(world.folder.glob(f"{CALLED}*"))
    return lines


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("one", "tp2") else ())
        for name in LAYOUTS
    ],
)
def test_the_fused_trunk_trains_as_its_modules_do(
    world: World, chain: list[dict[str, Any]], layout: str
) -> None:
    ranks, *overrides = LAYOUTS[layout]
    fused = World(world.folder, world.forge, patch="fused:force:")
    found = fused.train(f"fused-{layout}", ranks, *MODEL, *STEPS, *overrides)
    signs = sorted(world.folder.glob(f"{CALLED}*"))
    assert [sign.name for sign in signs] == [f"{CALLED}{rank}" for rank in range(ranks)]
    for sign in signs:
        sign.unlink()
    assert len(found) == len(chain) == 5
    for line, wanted in zip(found, chain, strict=True):
        for key in KEYS:
            assert line[key] == pytest.approx(wanted[key], rel=1e-6), (line["step"], key)
