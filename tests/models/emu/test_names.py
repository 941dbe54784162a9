"""The release at full size: every name, every shape, every count of the specification."""

import math

import pytest
import torch
from safetensors.torch import load_file

from mmtrain.errors import ContentError
from mmtrain.models.emu.config import EmuConfig
from mmtrain.models.emu.model import build_plain, parameters
from mmtrain.models.emu.names import RELEASE

# specification of the release: name (N = block), shape, blocks
TABLE: list[tuple[str, tuple[int, ...], int]] = [
    ("visual.cls_token", (1, 1, 1408), 1),
    ("visual.pos_embed", (1, 257, 1408), 1),
    ("visual.patch_embed.proj.weight", (1408, 3, 14, 14), 1),
    ("visual.patch_embed.proj.bias", (1408,), 1),
    *(
        (f"visual.blocks.N.norm{i}.{leaf}", (1408,), 40)
        for i in (1, 2)
        for leaf in ("weight", "bias")
    ),
    ("visual.blocks.N.attn.qkv.weight", (4224, 1408), 40),
    ("visual.blocks.N.attn.q_bias", (1408,), 40),
    ("visual.blocks.N.attn.v_bias", (1408,), 40),
    ("visual.blocks.N.attn.proj.weight", (1408, 1408), 40),
    ("visual.blocks.N.attn.proj.bias", (1408,), 40),
    ("visual.blocks.N.mlp.fc1.weight", (6144, 1408), 40),
    ("visual.blocks.N.mlp.fc1.bias", (6144,), 40),
    ("visual.blocks.N.mlp.fc2.weight", (1408, 6144), 40),
    ("visual.blocks.N.mlp.fc2.bias", (1408,), 40),
    ("visual.norm.weight", (1408,), 1),
    ("visual.norm.bias", (1408,), 1),
    ("visual.head.weight", (1024, 1408), 1),
    ("visual.head.bias", (1024,), 1),
    ("ln_visual.weight", (1408,), 1),
    ("ln_visual.bias", (1408,), 1),
    ("cformer.causal_tokens", (1, 32, 768), 1),
    ("cformer.cformer.embed_tokens.weight", (32128, 768), 1),
    *(
        (f"cformer.cformer.block.N.layer.0.SelfAttention.{x}.weight", (768, 768), 12)
        for x in "qkvo"
    ),
    (
        "cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        (32, 12),
        1,
    ),
    *(
        (f"cformer.cformer.block.N.layer.1.EncDecAttention.{x}.weight", (768, width), 12)
        for x, width in (("q", 768), ("o", 768), ("k", 1408), ("v", 1408))
    ),
    ("cformer.cformer.block.N.layer.2.DenseReluDense.wi.weight", (3072, 768), 12),
    ("cformer.cformer.block.N.layer.2.DenseReluDense.wo.weight", (768, 3072), 12),
    *((f"cformer.cformer.block.N.layer.{i}.layer_norm.weight", (768,), 12) for i in range(3)),
    ("cformer.cformer.final_layer_norm.weight", (768,), 1),
    ("cformer.projection.weight", (5120, 768), 1),
    ("cformer.projection.bias", (5120,), 1),
    ("decoder.lm.model.embed_tokens.weight", (32004, 5120), 1),
    *((f"decoder.lm.model.layers.N.self_attn.{x}_proj.weight", (5120, 5120), 40) for x in "qkvo"),
    ("decoder.lm.model.layers.N.self_attn.rotary_emb.inv_freq", (64,), 40),
    ("decoder.lm.model.layers.N.mlp.gate_proj.weight", (13824, 5120), 40),
    ("decoder.lm.model.layers.N.mlp.up_proj.weight", (13824, 5120), 40),
    ("decoder.lm.model.layers.N.mlp.down_proj.weight", (5120, 13824), 40),
    ("decoder.lm.model.layers.N.input_layernorm.weight", (5120,), 40),
    ("decoder.lm.model.layers.N.post_attention_layernorm.weight", (5120,), 40),
    ("decoder.lm.model.norm.weight", (5120,), 1),
    ("decoder.lm.lm_head.weight", (32004, 5120), 1),
    ("decoder.lm.stu_regress_head.weight", (5120, 5120), 1),
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
