"""The release at full size: every name, every shape, every count of the specification."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmtrain.errors import ContentError
from mmtrain.models.emu.config import EmuConfig
from mmtrain.models.emu.model import build_plain, parameters
from mmtrain.models.emu.names import RELEASE

# specification of the release: name (N = block), shape, blocks
TABLE: list[tuple[str, tuple[int, ...], int]] = [
    (name, tuple(shape), blocks)
    for name, shape, blocks in json.loads(
        (Path(__file__).parents[2] / "golden/emu_release.json").read_text()
    )
]
SHAPES = {
    name.replace("N", str(block)) if ".N." in name else name: shape
    for name, shape, blocks in TABLE
    for block in range(blocks)
}
DEAD = {
    "visual.norm.weight",
    "visual.norm.bias",
    "visual.head.weight",
    "visual.head.bias",
    "cformer.cformer.embed_tokens.weight",
}


@pytest.fixture(scope="module")
def model_shapes() -> dict[str, torch.Size]:
    """The default configuration is the release."""
    return {name: p.shape for name, p in parameters(build_plain(EmuConfig(), "meta")).items()}


def numbers(prefix: str, names: set[str]) -> int:
    return sum(math.prod(SHAPES[name]) for name in names if name.startswith(prefix))


def test_the_table_has_the_published_counts() -> None:
    stored = {name for name in SHAPES if not name.endswith("inv_freq")}
    assert len(SHAPES) == 1096 and len(stored) == 1056
    assert sum(math.prod(shape) for shape in SHAPES.values()) == 14_208_421_632
    assert numbers("visual.", stored) == 1_012_588_928
    assert numbers("ln_visual.", stored) == 2_816
    assert numbers("cformer.", stored) == 153_707_648
    assert numbers("decoder.", stored) == 13_042_119_680
    tensors = {p: sum(n.startswith(p) for n in stored) for p in ("visual.", "cformer.", "decoder.")}
    assert tensors == {"visual.": 528, "cformer.": 162, "decoder.": 364}


def test_the_release_at_full_size_loads_by_name(model_shapes: dict[str, torch.Size]) -> None:
    with torch.device("meta"):
        released = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    found = RELEASE.to_canonical(released, expected=model_shapes)
    assert found.keys() == model_shapes.keys()
    # 1,056 tensors, 5 dead ones left out, 40 fused qkv weights become three
    assert len(found) == 1056 - len(DEAD) + 2 * 40


def test_what_is_left_out_is_dead_or_recomputed_and_says_why() -> None:
    dropped = RELEASE.dropped(SHAPES)
    buffers = {name for name in SHAPES if name.endswith("inv_freq")}
    assert dropped.keys() == DEAD | buffers
    assert numbers("", DEAD) == 26_119_936
    assert all("bfloat16" in dropped[name] for name in buffers)
    assert all("never used" in dropped[name] for name in DEAD)


def test_parts_have_the_parameter_counts_of_the_release(
    model_shapes: dict[str, torch.Size],
) -> None:
    def count(*prefixes: str) -> int:
        return sum(s.numel() for n, s in model_shapes.items() if n.startswith(prefixes))

    assert count("vision.") == 1_012_588_928 - numbers("visual.", DEAD)
    assert count("vision_norm.") == 2_816
    assert count("causal.") == 153_707_648 - 24_674_304
    assert count("embed.", "blocks.", "head.") == 13_042_119_680


def test_exported_names_and_shapes_are_those_of_the_release(
    model_shapes: dict[str, torch.Size],
) -> None:
    with torch.device("meta"):
        ours = {name: torch.empty(shape) for name, shape in model_shapes.items()}
    exported = {name: tuple(t.shape) for name, t in RELEASE.to_foreign(ours).items()}
    dropped = RELEASE.dropped(SHAPES)
    assert exported == {n: s for n, s in SHAPES.items() if n not in dropped}


def test_reading_and_writing_are_inverse(repository: object) -> None:
    released = load_file(repository / "tests/golden/emu_a/weights.safetensors")  # type: ignore[operator]
    back = RELEASE.to_foreign(RELEASE.to_canonical(released))
    assert back.keys() == released.keys() - RELEASE.dropped(released).keys()
    assert all(torch.equal(back[name], released[name]) for name in back)


def test_all_faults_of_a_release_are_reported_at_once(model_shapes: dict[str, torch.Size]) -> None:
    with torch.device("meta"):
        released = {name: torch.empty(shape) for name, shape in SHAPES.items()}
        released["decoder.lm.lm_head.weight"] = torch.empty(32000, 5120)
    del released["ln_visual.bias"]
    released["decoder.lm.model.layers.0.self_attn.q_proj.base_layer.weight"] = torch.empty(0)
    with pytest.raises(ContentError) as fault:
        RELEASE.to_canonical(released, expected=model_shapes)
    text = str(fault.value)
    assert "lm_head.weight: shape (32000, 5120)" in text and "(32004, 5120)" in text
    assert "ln_visual.bias: missing" in text
    assert "base_layer.weight: unknown name" in text


def test_half_of_a_fused_tensor_is_not_written() -> None:
    with pytest.raises(ContentError, match=r"attention\.k\.weight: missing"):
        RELEASE.to_foreign({"vision.blocks.3.attention.q.weight": torch.zeros(2, 2)})
