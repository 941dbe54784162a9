"""Diffusers folders: a UNet there and back, cross-attention for another width, a VAE checked."""

import json
from pathlib import Path

import pytest
import torch
from converted import Convert, assert_equal, tensors_of
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.5's UNet in small."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd") / "unet"
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd") / "vae"
    AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder)
    return folder


def test_a_unet_folder_comes_back_to_the_bit(convert: Convert, tmp_path: Path, unet: Path) -> None:
    convert("import", "unet", unet, tmp_path / "full")
    full = tensors_of(tmp_path / "full")
    theirs = load_file(unet / WEIGHTS)
    assert_equal(full, {f"unet.{name}": tensor for name, tensor in theirs.items()})
    convert("export", "unet", tmp_path / "full", tmp_path / "back")
    assert_equal(load_file(tmp_path / "back" / WEIGHTS), theirs)
    was, now = (json.loads((f / "config.json").read_text()) for f in (unet, tmp_path / "back"))
    assert now == was
    back = UNet2DConditionModel.from_pretrained(tmp_path / "back")
    assert_equal(back.state_dict(), theirs)


def test_a_bin_file_is_read_alike(convert: Convert, tmp_path: Path, unet: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/config.json").write_text((unet / "config.json").read_text())
    torch.save(load_file(unet / WEIGHTS), tmp_path / "bin/diffusion_pytorch_model.bin")
    convert("import", "unet", tmp_path / "bin", tmp_path / "full")
    convert("import", "unet", unet, tmp_path / "same")
    assert_equal(tensors_of(tmp_path / "full"), tensors_of(tmp_path / "same"))


def test_cross_attention_is_drawn_anew_for_another_width_and_nothing_else(
    convert: Convert, tmp_path: Path, unet: Path
) -> None:
    said = convert("import", "unet", unet, tmp_path / "x", "--width", 20, "--dry-run")
    assert "uniform +-1/sqrt(20), seed 0" in said and "reads 12 channels of text" in said
    for name, seed in (("full", 3), ("again", 3), ("other", 4)):
        convert("import", "unet", unet, tmp_path / name, "--width", 20, "--seed", seed)
    full, theirs = tensors_of(tmp_path / "full"), load_file(unet / WEIGHTS)
    drawn = [name for name in theirs if ".attn2.to_k." in name or ".attn2.to_v." in name]
    assert len(drawn) == 2 * 4  # one transformer down, one in the middle, two up
    for name, tensor in theirs.items():
        found = full[f"unet.{name}"]
        if name not in drawn:
            assert torch.equal(found, tensor), name
            continue
        assert found.shape == (tensor.shape[0], 20)
        assert 0.8 * 20**-0.5 < float(found.abs().max()) <= 20**-0.5
    assert_equal(tensors_of(tmp_path / "again"), full)
    other = tensors_of(tmp_path / "other")
    assert all(not torch.equal(other[f"unet.{name}"], full[f"unet.{name}"]) for name in drawn)
    convert("export", "unet", tmp_path / "full", tmp_path / "back")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "back")
    assert model.config.cross_attention_dim == 20
    with torch.inference_mode():
        model(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 20))


def test_a_vae_is_checked_and_copied(convert: Convert, tmp_path: Path, vae: Path) -> None:
    convert("import", "vae", vae, tmp_path / "copy")
    theirs = load_file(vae / WEIGHTS)
    assert_equal(load_file(tmp_path / "copy" / WEIGHTS), theirs)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in theirs.items():
        for now, then in old.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        renamed[name] = tensor
    assert renamed.keys() != theirs.keys()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text((vae / "config.json").read_text())
    torch.save(renamed, tmp_path / "old/diffusion_pytorch_model.bin")
    convert("import", "vae", tmp_path / "old", tmp_path / "new")
    assert_equal(load_file(tmp_path / "new" / WEIGHTS), theirs)
    AutoencoderKL.from_pretrained(tmp_path / "new")


def test_faults_of_a_folder_are_named_together(
    convert: Convert, tmp_path: Path, unet: Path, vae: Path
) -> None:
    said = convert("import", "unet", vae, tmp_path / "x", code=65)
    assert (
        "_class_name is AutoencoderKL, expected UNet2DConditionModel" in said or "expected" in said
    )
    weights = load_file(unet / WEIGHTS)
    key = next(name for name in weights if ".attn2.to_k." in name)
    weights[key] = weights[key].T.contiguous()
    del weights["conv_in.bias"]
    weights["extra.weight"] = torch.ones(2)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text((unet / "config.json").read_text())
    save_file(weights, tmp_path / "bad" / WEIGHTS)
    said = convert("import", "unet", tmp_path / "bad", tmp_path / "x", code=65)
    for words in (
        "3 faults",
        "swapped dims",
        "conv_in.bias: missing",
        "extra.weight (2 f32): unknown",
    ):
        assert words in said
    assert not (tmp_path / "x").exists()
    convert("import", "unet", unet, tmp_path / "full")
    said = convert("export", "llama", tmp_path / "full", tmp_path / "x", code=65)
    assert "heads" in said or "unet" in said
