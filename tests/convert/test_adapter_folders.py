"""LoRA adapters in and out as PEFT folders, against the `peft` package where it is installed."""

import json
from pathlib import Path

import pytest
import torch
from converted import GOLDEN, Convert, assert_equal, tensors_of
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

INSTRUCT = GOLDEN / "instruct_weights.safetensors"


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=104,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-6,
    )
    return LlamaForCausalLM(config).eval()


def test_an_adapter_folder_comes_back_to_the_bit(convert: Convert, tmp_path: Path) -> None:
    convert("import", "emu-instruct", INSTRUCT, tmp_path / "full", "--alpha", 8)
    convert("export", "peft", tmp_path / "full", tmp_path / "adapter")
    found = load_file(tmp_path / "adapter/adapter_model.safetensors")
    released = {
        name.removeprefix("decoder.lm.").replace(".default.", "."): tensor
        for name, tensor in load_file(INSTRUCT).items()
        if ".lora_" in name
    }
    assert_equal(found, released)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")
    assert sorted(config["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    convert("import", "peft", tmp_path / "adapter", tmp_path / "alone")
    convert("export", "peft", tmp_path / "alone", tmp_path / "again")
    assert_equal(load_file(tmp_path / "again/adapter_model.safetensors"), released)
    assert json.loads((tmp_path / "again/adapter_config.json").read_text()) == config


def test_adapters_stand_beside_their_base_or_are_merged_into_it(
    convert: Convert, tmp_path: Path
) -> None:
    convert("import", "emu-instruct", INSTRUCT, tmp_path / "full", "--alpha", 8)
    convert("export", "peft", tmp_path / "full", tmp_path / "adapter")
    both, bare = tensors_of(tmp_path / "full"), tmp_path / "bare"
    convert("export", "emu", tmp_path / "full", tmp_path / "merged.safetensors", "--merge-lora")
    state = {
        name.replace("base_model.model.", ""): tensor
        for name, tensor in load_file(INSTRUCT).items()
        if ".lora_" not in name
    }
    save_file(state, tmp_path / "state.safetensors")
    convert("import", "emu", tmp_path / "state.safetensors", bare)
    convert("import", "peft", tmp_path / "adapter", tmp_path / "beside", "--base", bare)
    assert_equal(tensors_of(tmp_path / "beside"), both)
    convert("import", "peft", tmp_path / "adapter", tmp_path / "in", "--base", bare, "--merge-lora")
    convert("import", "emu", tmp_path / "merged.safetensors", tmp_path / "wanted")
    kept = "dropped.safetensors"
    assert_equal(load_file(tmp_path / "in" / kept), load_file(tmp_path / "wanted" / kept))
    assert_equal(tensors_of(tmp_path / "in"), tensors_of(tmp_path / "wanted"))


def test_peft_loads_what_is_written_and_its_own_files_are_read(
    convert: Convert, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = base()
    model.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(20).view(1, 20)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.inference_mode():
        wanted = wrapped(ids).logits
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    convert("import", "peft", tmp_path / "adapter", tmp_path / "alone")
    lora = json.loads((tmp_path / "alone/mmtrain.json").read_text())["lora"]
    assert lora == {"rank": 3, "alpha": 6.0, "targets": ["q", "v", "down"]}
    convert("export", "peft", tmp_path / "alone", tmp_path / "back")
    written = load_file(tmp_path / "back/adapter_model.safetensors")
    assert_equal(written, load_file(tmp_path / "adapter/adapter_model.safetensors"))
    again = peft.PeftModel.from_pretrained(base(), str(tmp_path / "back")).eval()
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, wanted)
    convert("import", "llama", tmp_path / "theirs", tmp_path / "full")
    convert(
        "import",
        "peft",
        tmp_path / "adapter",
        tmp_path / "merged",
        "--base",
        tmp_path / "full",
        "--merge-lora",
    )
    convert("export", "llama", tmp_path / "merged", tmp_path / "hf")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.inference_mode():
        torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": 5}, "says rank 5"),
    ],
)
def test_other_adapters_are_refused_by_name(
    convert: Convert, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    convert("import", "emu-instruct", INSTRUCT, tmp_path / "full")
    convert("export", "peft", tmp_path / "full", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    said = convert("import", "peft", tmp_path / "adapter", tmp_path / "x", code=65)
    assert words in said and not (tmp_path / "x").exists()


def test_adapters_that_do_not_fit_are_named(convert: Convert, tmp_path: Path) -> None:
    convert("import", "emu-instruct", INSTRUCT, tmp_path / "full")
    convert("export", "peft", tmp_path / "full", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    half = next(name for name in weights if "lora_B" in name)
    del weights[half]
    save_file(weights, path)
    said = convert("import", "peft", tmp_path / "adapter", tmp_path / "x", code=65)
    assert "half of its adapter is missing" in said
    small = LlamaForCausalLM(LlamaConfig(48, 32, 40, 2, 4))
    small.save_pretrained(tmp_path / "small")
    convert("import", "llama", tmp_path / "small", tmp_path / "base")
    convert("export", "peft", tmp_path / "full", tmp_path / "whole")
    said = convert(
        "import", "peft", tmp_path / "whole", tmp_path / "x", "--base", tmp_path / "base", code=65
    )
    assert "adapts blocks.0.attention.q.weight of shape (64, 64), the base has (32, 32)" in said
    said = convert("export", "peft", tmp_path / "base", tmp_path / "x", code=65)
    assert "holds no adapters" in said
