"""The Emu releases and EVA-CLIP: there and back to the bit, under all names they come with."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from converted import GOLDEN, Convert, assert_equal, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtrain.models.emu.golden import Golden
from mmtrain.models.emu.names import RELEASE

PRETRAIN, INSTRUCT = GOLDEN / "weights.safetensors", GOLDEN / "instruct_weights.safetensors"


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
@pytest.mark.parametrize("kind, file", [("emu", PRETRAIN), ("emu-instruct", INSTRUCT)])
def test_a_release_comes_back_to_the_bit(
    convert: Convert, tmp_path: Path, kind: str, file: Path, suffix: str
) -> None:
    convert("import", kind, file, tmp_path / "full")
    out = tmp_path / f"back.{suffix}"
    convert("export", kind, tmp_path / "full", out)
    assert_equal(tensors_of(out), load_file(file))
    if suffix != "safetensors":
        assert zipfile.ZipFile(out).testzip() is None  # check sums are those of the numbers


def test_full_tensors_are_those_of_the_name_map(convert: Convert, tmp_path: Path) -> None:
    convert("import", "emu", PRETRAIN, tmp_path / "full")
    wanted = RELEASE.to_canonical(load_file(PRETRAIN))
    assert_equal(tensors_of(tmp_path / "full"), wanted)
    described = json.loads((tmp_path / "full/mmtrain.json").read_text())
    sizes = Golden(GOLDEN).config(94)
    assert described["kind"] == "emu" and described["lora"] is None
    for section, known in described["model"].items():
        for key, value in known.items():
            found = getattr(getattr(sizes, section), key)
            assert value == getattr(found, "value", found) or key == "context", (section, key)
    assert "heads" not in described["model"]["vision"]  # nothing in the file tells them


def test_many_small_shards_hold_the_same(convert: Convert, tmp_path: Path) -> None:
    convert("import", "emu", PRETRAIN, tmp_path / "full", "--shard-gb", 1e-4)
    files = sorted(p.name for p in (tmp_path / "full").glob("model-*"))
    assert len(files) > 4 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_equal(tensors_of(tmp_path / "full"), RELEASE.to_canonical(load_file(PRETRAIN)))


def newer_peft(name: str) -> str:
    """A name as PEFT writes it from 0.7 on, adapters without an adapter's name."""
    name = name.replace(".default.weight", ".weight")
    adapted = ".self_attn." in name and name.endswith("_proj.weight")
    return name.replace("_proj.weight", "_proj.base_layer.weight") if adapted else name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"module": state},
        lambda state: {"state_dict": {f"module.{name}": t for name, t in state.items()}, "step": 3},
        lambda state: {"model": {"module": state}},
        lambda state: {newer_peft(name): tensor for name, tensor in state.items()},
    ],
    ids=["module", "state_dict of DDP", "model of module", "newer PEFT"],
)
def test_wrappers_and_newer_names_make_no_difference(
    convert: Convert, tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object]
) -> None:
    torch.save(wrap(load_file(INSTRUCT)), tmp_path / "wrapped.pt")
    convert("import", "emu-instruct", tmp_path / "wrapped.pt", tmp_path / "full")
    convert("export", "emu-instruct", tmp_path / "full", tmp_path / "back.safetensors")
    assert_equal(tensors_of(tmp_path / "back.safetensors"), load_file(INSTRUCT))


def test_adapters_are_merged_on_the_way_in_and_on_the_way_out(
    convert: Convert, tmp_path: Path
) -> None:
    golden = Golden(GOLDEN)
    alpha = golden.description["instruct"]["scale"] * 4  # rank 4
    convert("import", "emu-instruct", INSTRUCT, tmp_path / "in", "--merge-lora", "--alpha", alpha)
    convert("import", "emu-instruct", INSTRUCT, tmp_path / "kept", "--alpha", alpha)
    convert("export", "emu", tmp_path / "kept", tmp_path / "out.safetensors", "--merge-lora")
    convert("export", "emu", tmp_path / "in", tmp_path / "in.safetensors")
    merged = tensors_of(tmp_path / "out.safetensors")
    assert_equal(merged, tensors_of(tmp_path / "in.safetensors"))
    for name, tensor in golden.instruct.items():
        if name.startswith("merged."):
            ours = merged["decoder.lm." + name.removeprefix("merged.")]
            torch.testing.assert_close(ours, tensor, atol=1e-6, rtol=0)
    lora = json.loads((tmp_path / "kept/mmtrain.json").read_text())["lora"]
    assert lora == {"rank": 4, "alpha": alpha, "targets": ["q", "k", "v", "out"]}


def test_dead_tensors_that_were_not_kept_are_made_again_and_it_is_said(
    convert: Convert, tmp_path: Path
) -> None:
    convert("import", "emu", PRETRAIN, tmp_path / "full")
    (tmp_path / "full/dropped.safetensors").unlink()
    said = convert("export", "emu", tmp_path / "full", tmp_path / "back.bin")
    assert "made again" in said and "dropped.safetensors" in said
    found, wanted = tensors_of(tmp_path / "back.bin"), load_file(PRETRAIN)
    assert found.keys() == wanted.keys()
    dead = RELEASE.dropped(wanted)
    assert_equal(*({n: t for n, t in side.items() if n not in dead} for side in (found, wanted)))
    for name in dead:
        if name.endswith("inv_freq"):
            # the release stores it rounded to bfloat16
            assert torch.equal(found[name].bfloat16(), wanted[name].bfloat16()), name
        else:
            assert not found[name].any(), name
    assert found["visual.head.weight"].shape == (1024, 52)  # the release's, not this toy's
    assert found["cformer.cformer.embed_tokens.weight"].shape == (32128, 40)


def eva_file(path: Path, wrapper: str | None = None) -> dict[str, Tensor]:
    """An EVA-CLIP file in half precision: the golden tower, a text tower, a scale."""
    tower = {n: t.half() for n, t in load_file(PRETRAIN).items() if n.startswith("visual.")}
    others = {"logit_scale": torch.tensor(4.6), "text.token_embedding.weight": torch.ones(5, 3)}
    state = tower | others
    torch.save({wrapper: state} if wrapper else state, path)
    return tower


@pytest.mark.parametrize("wrapper", [None, "module", "state_dict", "model"])
def test_the_tower_of_eva_clip_is_read_and_the_text_tower_left(
    convert: Convert, tmp_path: Path, wrapper: str | None
) -> None:
    tower = eva_file(tmp_path / "eva.pt", wrapper)
    convert("import", "eva", tmp_path / "eva.pt", tmp_path / "full")
    named = RELEASE.to_canonical(tower)
    assert_equal(tensors_of(tmp_path / "full"), named)
    assert all(name.startswith("vision.") for name in named)
    convert("export", "eva", tmp_path / "full", tmp_path / "back.pt")
    assert_equal(tensors_of(tmp_path / "back.pt"), tower)


def test_the_number_type_is_kept_or_as_asked(convert: Convert, tmp_path: Path) -> None:
    convert("import", "emu", PRETRAIN, tmp_path / "full", "--dtype", "bf16")
    wanted = RELEASE.to_canonical(load_file(PRETRAIN))
    assert_equal(tensors_of(tmp_path / "full"), {n: t.bfloat16() for n, t in wanted.items()})


def test_a_dry_run_prints_the_plan_and_writes_nothing(convert: Convert, tmp_path: Path) -> None:
    said = convert("import", "emu", PRETRAIN, tmp_path / "full", "--dry-run", "--dtype", "bf16")
    row = next(r for r in said.splitlines() if "attention.k.weight" in r and "visual" in r)
    for part in (
        "2 x",
        "visual.blocks.N.attn.qkv.weight",
        "52x52 bf16",
        "part 2 of 3, to bfloat16",
    ):
        assert part in row
    assert "kept aside" in said and "never used: the T5 stack" in said
    assert "89 tensors of 233,648 numbers (0 created), 7 left out (7 kept aside)" in said
    assert "nothing was written" in said and not list(tmp_path.iterdir())


def test_pretrain_and_instruct_files_are_not_mixed_up(convert: Convert, tmp_path: Path) -> None:
    said = convert("import", "emu", INSTRUCT, tmp_path / "x", code=65)
    assert "kind emu-instruct" in said
    said = convert("import", "emu-instruct", PRETRAIN, tmp_path / "x", code=65)
    assert "no adapters" in said and "kind" in said
    convert("import", "emu-instruct", INSTRUCT, tmp_path / "full")
    said = convert("export", "emu", tmp_path / "full", tmp_path / "x.pt", code=65)
    assert "--merge-lora" in said and not (tmp_path / "x.pt").exists()


def test_a_tensor_that_is_there_under_two_names_is_refused(
    convert: Convert, tmp_path: Path
) -> None:
    state = load_file(INSTRUCT)
    name = next(n for n in state if n.endswith("q_proj.weight"))
    state[newer_peft(name)] = state[name].clone()
    save_file(state, tmp_path / "both.safetensors")
    said = convert("import", "emu-instruct", tmp_path / "both.safetensors", tmp_path / "x", code=65)
    assert newer_peft(name) in said and "keep one" in said
