"""The published sizes through the front door, on sparse files: headers without numbers."""

import json
import math
from pathlib import Path

import pytest
import torch
from converted import ROOT, Convert

from mmtrain.checkpoint.portable import Description
from mmtrain.checkpoint.tensorfile import TensorInfo
from mmtrain.convert import release
from mmtrain.convert.canonical import EVERYTHING, Canonical
from mmtrain.convert.diffusion import unet_shapes
from mmtrain.convert.release import Adapters
from mmtrain.convert.sources import Source
from mmtrain.models.emu.config import EmuConfig, LanguageConfig
from mmtrain.models.emu.names import with_peft
from mmtrain.models.emu.sizes import expected_shapes
from mmtrain.nn.lora import LoraConfig

Shapes = dict[str, tuple[int, ...]]
SD_15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
RECIPE = ROOT / "configs/emu/14b_pretrain.yaml"


def manifest() -> Shapes:
    """Every name and shape of the pretrain release, as the specification lists them."""
    table = json.loads((ROOT / "tests/golden/emu_release.json").read_text())
    return {
        name.replace("N", str(block)) if ".N." in name else name: tuple(shape)
        for name, shape, blocks in table
        for block in range(blocks)
    }


def instruct_manifest() -> Shapes:
    """The instruct release: two more words, PEFT's prefix, 320 halves of adapters."""
    out: Shapes = {}
    for name, shape in manifest().items():
        words = name.endswith(("embed_tokens.weight", "lm_head.weight")) and "lm." in name
        out[with_peft(name)] = (32006, 5120) if words else shape
    for layer in range(40):
        for letter in "qkvo":
            stem = f"decoder.lm.base_model.model.model.layers.{layer}.self_attn.{letter}_proj"
            out[f"{stem}.lora_A.default.weight"] = (16, 5120)
            out[f"{stem}.lora_B.default.weight"] = (5120, 16)
    return out


def numbers(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def sparse(path: Path, shapes: Shapes, kind: str = "BF16", width: int = 2) -> Path:
    """A safetensors file of holes."""
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + math.prod(shape) * width
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + place)
    return path


def canonical(config: EmuConfig) -> Canonical:
    """A folder of full tensors without numbers."""
    shapes = expected_shapes(config, EVERYTHING)
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
    source = Source(Path("full"), infos, {}, lambda name: infos[name].meta())
    return Canonical(source, Description(kind="emu", model={}))


def test_the_pretrain_release_goes_in_and_comes_out_whole(convert: Convert, tmp_path: Path) -> None:
    shapes = manifest()
    assert (len(shapes), numbers(shapes)) == (1096, 14_208_421_632)
    path = sparse(tmp_path / "emu.safetensors", shapes)
    said = convert("import", "emu", path, tmp_path / "x", "--recipe", RECIPE, "--dry-run")
    assert (
        "1,131 tensors of 14,182,299,136 numbers (0 created), 45 left out (45 kept aside)" in said
    )
    plan = release.write_pretrained(canonical(EmuConfig()), Adapters.keep, None)
    assert {made.target: made.info.shape for made in plan.made} == shapes


def test_the_instruct_release_goes_in_and_comes_out_whole(convert: Convert, tmp_path: Path) -> None:
    shapes = instruct_manifest()
    assert (len(shapes), numbers(shapes)) == (1416, 14_234_656_512)
    path = sparse(tmp_path / "instruct.safetensors", shapes)
    said = convert("import", "emu-instruct", path, tmp_path / "x", "--dry-run")
    assert "1,451 tensors of 14,208,534,016 numbers" in said
    said = convert("import", "emu-instruct", path, tmp_path / "x", "--dry-run", "--merge-lora")
    assert "W + 1 B A" in said and "1,131 tensors" in said
    config = EmuConfig(language=LanguageConfig(vocabulary=32006), lora=LoraConfig(rank=16))
    plan = release.write_instruct(canonical(config))
    assert {made.target: made.info.shape for made in plan.made} == shapes


def test_eva_clip_and_a_llama_make_the_start_of_the_published_run(
    convert: Convert, tmp_path: Path
) -> None:
    shapes = manifest()
    tower = {name: shape for name, shape in shapes.items() if name.startswith("visual.")}
    text = {"text.positional_embedding": (77, 768), "logit_scale": ()}
    eva = sparse(tmp_path / "eva.safetensors", tower | text, "F16")
    llama = tmp_path / "llama"
    llama.mkdir()
    trunk = {
        name.removeprefix("decoder.lm."): (32000, 5120) if shape[0] == 32004 else shape
        for name, shape in shapes.items()
        if name.startswith("decoder.lm.") and "stu_regress_head" not in name
    }
    sparse(llama / "model.safetensors", trunk, "F16")
    config = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "rms_norm_eps": 1e-6,
    }
    (llama / "config.json").write_text(json.dumps(config))
    said = convert(
        "start", "--llama", llama, "--eva", eva, "--recipe", RECIPE, tmp_path / "x", "--dry-run"
    )
    assert "1,131 tensors of 14,182,299,136 numbers" in said
    assert "rows 32000-32003 added: mean of the 32000" in said
    assert "text.positional_embedding" in said and "left out" in said


@pytest.mark.parametrize("width, total", [(768, 859_520_964), (5120, 968_146_884)])
def test_the_unet_of_sd_15_under_emus_embeddings(
    convert: Convert, tmp_path: Path, width: int, total: int
) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SD_15))
    shapes = unet_shapes(SD_15, folder)
    sparse(folder / "diffusion_pytorch_model.safetensors", shapes, "F32", 4)
    said = convert("import", "unet", folder, tmp_path / "x", "--width", width, "--dry-run")
    drawn = 0 if width == 768 else 32
    assert f"686 tensors of {total:,} numbers ({drawn} created), {drawn} left out" in said
