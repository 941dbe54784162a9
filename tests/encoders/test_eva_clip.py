"""The vision tower against a public class of the same arithmetic.

transformers has no EVA-01-CLIP, but the BLIP-2 vision tower is the same network (EVA ViT-g with
learned q and v biases and no k bias); its final norm is left out here as in Emu.
"""

import pytest
import torch
from transformers import Blip2VisionConfig, Blip2VisionModel

from mmtrain.encoders.eva_clip import PatchStem, VisionBlock
from mmtrain.nn.flow import Flow

WIDTH, HEADS, LAYERS, SIZE = 32, 4, 2, 28


@pytest.fixture
def towers() -> tuple[list[torch.nn.Module], Blip2VisionModel]:
    torch.manual_seed(0)
    config = Blip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=14,
        layer_norm_eps=1e-6,
        qkv_bias=True,
    )
    theirs = Blip2VisionModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stem = PatchStem(tokens=5, patch_size=14, width=WIDTH)
    blocks = [
        VisionBlock(width=WIDTH, heads=HEADS, mlp_width=48, norm_eps=1e-6) for _ in range(LAYERS)
    ]
    state = theirs.state_dict()
    stem.load_state_dict(
        {
            "cls": state["embeddings.class_embedding"].flatten(),
            "position": state["embeddings.position_embedding"][0],
            "patch.weight": state["embeddings.patch_embedding.weight"],
            "patch.bias": state["embeddings.patch_embedding.bias"],
        }
    )
    for i, block in enumerate(blocks):
        block.load_state_dict(renamed(state, f"encoder.layers.{i}."))
    return [stem, *blocks], theirs


def renamed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    out = {}
    q, k, v = state[f"{prefix}self_attn.qkv.weight"].chunk(3)
    q_bias, k_bias, v_bias = state[f"{prefix}self_attn.qkv.bias"].chunk(3)
    k_bias.zero_()
    out |= {"attention.q.weight": q, "attention.k.weight": k, "attention.v.weight": v}
    out |= {"attention.q.bias": q_bias, "attention.v.bias": v_bias}
    names = {
        "layer_norm1": "norm1",
        "self_attn.projection": "attention.out",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    }
    for theirs, ours in names.items():
        for leaf in ("weight", "bias"):
            out[f"{ours}.{leaf}"] = state[f"{prefix}{theirs}.{leaf}"]
    return out


def test_the_tower_is_that_of_blip2_before_its_final_norm(
    towers: tuple[list[torch.nn.Module], Blip2VisionModel],
) -> None:
    layers, theirs = towers
    pixels = torch.randn(3, 3, SIZE, SIZE)
    flow = Flow(pixels, {})
    for layer in layers:
        flow = layer(flow)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(flow.hidden, expected, atol=1e-4, rtol=1e-5)


def test_images_do_not_see_each_other(
    towers: tuple[list[torch.nn.Module], Blip2VisionModel],
) -> None:
    layers, _ = towers
    pixels = torch.randn(2, 3, SIZE, SIZE)

    def features(batch: torch.Tensor) -> torch.Tensor:
        flow = Flow(batch, {})
        for layer in layers:
            flow = layer(flow)
        return flow.hidden

    torch.testing.assert_close(features(pixels)[:1], features(pixels[:1]))
