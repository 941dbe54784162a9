"""LLaMA folders of Hugging Face and of Meta: to the trunk's full tensors and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import GOLDEN, Convert, assert_equal, tensors_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmtrain.convert.meta_llama import pair_halves

SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 32, "num_attention_heads": 4},
    "grouped": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2},
    "one-key-head": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1},
    "wide-heads": {"hidden_size": 64, "num_attention_heads": 2, "rope_theta": 5e5},
    "tied": {"hidden_size": 32, "num_attention_heads": 4, "tie_word_embeddings": True},
}


def llama(size: str, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        intermediate_size=40,
        num_hidden_layers=layers,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        **SIZES[size],
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model: LlamaForCausalLM) -> Tensor:
    ids = torch.arange(24).view(2, 12) * 2 % 48
    with torch.inference_mode():
        out: Tensor = model(ids).logits
    return out


@pytest.mark.parametrize("size", SIZES)
def test_a_llama_comes_back_to_the_bit_with_its_logits(
    convert: Convert, tmp_path: Path, size: str
) -> None:
    theirs = llama(size)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    convert("import", "llama", tmp_path / "theirs", tmp_path / "full")
    convert("export", "llama", tmp_path / "full", tmp_path / "back", "--shard-gb", 2e-5)
    assert_equal(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))
    back = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(logits(back), logits(theirs))
    was, now = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("theirs", "back"))
    assert now == was


def test_a_folder_of_bin_files_is_read_alike(convert: Convert, tmp_path: Path) -> None:
    theirs = llama("grouped")
    theirs.save_pretrained(tmp_path / "theirs")
    state = dict(theirs.state_dict())
    for layer in range(3):  # as transformers wrote it until 4.31
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    half = len(state) // 2
    parts = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
    folder = tmp_path / "bins"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "theirs/config.json").read_text())
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert("import", "llama", folder, tmp_path / "full")
    convert("import", "llama", tmp_path / "theirs", tmp_path / "same")
    assert_equal(tensors_of(tmp_path / "full"), tensors_of(tmp_path / "same"))
    convert("export", "llama", tmp_path / "full", tmp_path / "back")
    assert_equal(tensors_of(tmp_path / "back"), state)


def meta_folder(model: LlamaForCausalLM, folder: Path, parts: int, words: str = "columns") -> None:
    """Write a model as Meta does: neighbouring pairs of channels, cut for tensor-parallel ranks."""
    config = model.config
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    renamed = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "lm_head": "output",
    }
    shards: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for name, tensor in model.state_dict().items():
        short = name.removeprefix("model.").replace("embed_tokens", "tok_embeddings")
        for theirs, metas in renamed.items():
            short = short.replace(theirs, metas)
        if ".wq." in short or ".wk." in short:
            count = heads if ".wq." in short else keys
            rows, width = tensor.shape
            tensor = tensor.view(count, 2, rows // count // 2, width).transpose(1, 2)
            tensor = tensor.reshape(rows, width)
        dim = 1 if short.endswith(("wo.weight", "w2.weight")) else 0
        if short == "tok_embeddings.weight" and words == "columns":
            dim = 1
        for number, shard in enumerate(shards):
            whole = tensor.dim() == 1
            shard[short] = tensor if whole else tensor.chunk(parts, dim)[number].clone()
    folder.mkdir()
    for number, shard in enumerate(shards):
        shard["rope.freqs"] = torch.ones(4)
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    parameters = {
        "dim": config.hidden_size,
        "n_heads": heads,
        "n_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
    }
    if keys != heads:
        parameters["n_kv_heads"] = keys
    (folder / "params.json").write_text(json.dumps(parameters))


@pytest.mark.parametrize(
    "size, parts, words",
    [
        ("small", 1, "columns"),
        ("small", 4, "columns"),
        ("grouped", 2, "columns"),
        ("small", 2, "rows"),
    ],
)
def test_metas_files_give_the_logits_of_the_hugging_face_folder(
    convert: Convert, tmp_path: Path, size: str, parts: int, words: str
) -> None:
    theirs = llama(size)
    meta_folder(theirs, tmp_path / "meta", parts, words)
    theirs.save_pretrained(tmp_path / "theirs")
    convert("import", "meta-llama", tmp_path / "meta", tmp_path / "full")
    convert("import", "llama", tmp_path / "theirs", tmp_path / "same")
    assert_equal(tensors_of(tmp_path / "full"), tensors_of(tmp_path / "same"))
    convert("export", "llama", tmp_path / "full", tmp_path / "back")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(logits(back), logits(theirs))


def test_rows_of_neighbouring_pairs_become_paired_halves() -> None:
    rows = torch.arange(8.0)[:, None]  # two heads of four channels
    assert pair_halves(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_parts_of_different_models_are_found_out(convert: Convert, tmp_path: Path) -> None:
    meta_folder(llama("small"), tmp_path / "meta", 2)
    path = tmp_path / "meta/consolidated.01.pth"
    shard = torch.load(path, weights_only=True)
    shard["norm.weight"] += 1
    torch.save(shard, path)
    said = convert("import", "meta-llama", tmp_path / "meta", tmp_path / "full", code=65)
    assert "norm.weight differs between parts" in said and not (tmp_path / "full").exists()


def test_a_missing_part_is_named(convert: Convert, tmp_path: Path) -> None:
    meta_folder(llama("small"), tmp_path / "meta", 4)
    (tmp_path / "meta/consolidated.01.pth").unlink()
    said = convert("import", "meta-llama", tmp_path / "meta", tmp_path / "full", code=66)
    assert "consolidated.01.pth missing" in said
    (tmp_path / "meta/consolidated.03.pth").unlink()  # the last one cannot be told by its number
    (tmp_path / "meta/consolidated.02.pth").rename(tmp_path / "meta/consolidated.01.pth")
    said = convert("import", "meta-llama", tmp_path / "meta", tmp_path / "full", code=65)
    assert "tok_embeddings" in said or "expected" in said


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is 'llama3'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        (
            {"hidden_act": "gelu", "head_dim": 99},
            "hidden_act is 'gelu', our trunk has 'silu'; head_dim",
        ),
    ],
)
def test_what_would_change_the_numbers_is_refused(
    convert: Convert, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    llama("small", layers=1).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    said = convert("import", "llama", tmp_path / "theirs", tmp_path / "full", code=65)
    assert words in said and not (tmp_path / "full").exists()


def test_the_trunk_of_an_emu_goes_out_as_a_llama(convert: Convert, tmp_path: Path) -> None:
    convert("import", "emu", GOLDEN / "weights.safetensors", tmp_path / "full")
    said = convert("export", "llama", tmp_path / "full", tmp_path / "hf", "--dry-run")
    assert "not part of a LLaMA" in said and "head.regress.weight" in said
    convert("export", "llama", tmp_path / "full", tmp_path / "hf")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    golden = load_file(GOLDEN / "io.safetensors")
    mask = golden["in.attention_mask"]
    with torch.inference_mode():
        found = model(inputs_embeds=golden["out.inputs_embeds"], attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], golden["out.logits"][real], atol=2e-5, rtol=0)


def test_a_trunk_that_does_not_know_its_heads_asks_for_them(
    convert: Convert, tmp_path: Path
) -> None:
    theirs = llama("grouped")
    theirs.save_pretrained(tmp_path / "theirs")
    convert("import", "llama", tmp_path / "theirs", tmp_path / "full")
    (tmp_path / "full/mmtrain.json").unlink()
    said = convert("export", "llama", tmp_path / "full", tmp_path / "back", code=65)
    assert "--heads" in said
    convert("export", "llama", tmp_path / "full", tmp_path / "back", "--heads", 6)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 2)
