"""Every recorded quantity of the reference implementation, and that the check can fail."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtrain.errors import ContentError, MissingError
from mmtrain.models.emu.golden import Golden, compare
from mmtrain.models.emu.golden_checks import every_check, forward, generation, instruct
from mmtrain.models.emu.golden_storyboards import storyboards


@pytest.fixture(scope="module")
def golden(repository: Path) -> Golden:
    return Golden(repository / "tests" / "golden" / "emu_a")


@pytest.mark.parametrize("part", [forward, generation, instruct])
def test_every_recorded_quantity_is_met(golden: Golden, part: object) -> None:
    found = list(part(golden))  # type: ignore[operator]
    assert len(found) >= 15
    assert [c for c in found if not c.passed] == []


def test_no_recorded_tensor_is_skipped(golden: Golden) -> None:
    """Whatever a file records as output is the name of a comparison."""
    checked = {found.quantity.removeprefix("instruct ") for found in every_check(golden)}
    recorded = {
        name
        for tensors in (golden.batch, golden.generation, golden.instruct)
        for name in tensors
        if name.startswith(("out.", "grad.", "merged."))
        or name.endswith(("greedy_ids", "greedy_margin", "first_logits", "latents"))
        or name.startswith(("textgen.beam.beam", "rank.loss", "rank.order"))
    }
    assert recorded - checked == set()


def damaged(golden: Golden, tmp_path: Path, name: str, scale: float) -> Golden:
    """A copy of the folder with one weight scaled."""
    folder = tmp_path / "golden"
    shutil.copytree(golden.folder, folder)
    weights = load_file(folder / "weights.safetensors")
    weights[name] = weights[name] * scale
    save_file(weights, folder / "weights.safetensors")
    return Golden(folder)


@pytest.mark.parametrize(
    "name",
    [
        "visual.blocks.0.attn.q_bias",
        "cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.lm.model.layers.1.self_attn.k_proj.weight",
        "decoder.lm.stu_regress_head.weight",
    ],
)
def test_a_weight_off_by_a_thousandth_is_found(golden: Golden, tmp_path: Path, name: str) -> None:
    found = list(forward(damaged(golden, tmp_path, name, 1.001)))
    assert any(not c.passed for c in found)


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("vision", "layer_norm_eps", 1e-5),
        ("cformer", "layer_norm_epsilon", 1e-5),
        ("cformer", "relative_attention_max_distance", 20),
        ("llm", "rms_norm_eps", 1e-5),
        ("llm", "rope_theta", 9000.0),
        ("vision", "image_mean", [0.5, 0.5, 0.5]),
    ],
)
def test_a_setting_that_is_not_the_releases_is_found(
    golden: Golden, tmp_path: Path, section: str, key: str, value: object
) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(golden.folder, folder)
    description = json.loads((folder / "config.json").read_text())
    description[section][key] = value
    (folder / "config.json").write_text(json.dumps(description))
    assert any(not c.passed for c in forward(Golden(folder)))


@pytest.mark.parametrize("name", ["visual.norm.weight", "cformer.cformer.embed_tokens.weight"])
def test_dead_tensors_do_not_matter(golden: Golden, tmp_path: Path, name: str) -> None:
    assert all(c.passed for c in forward(damaged(golden, tmp_path, name, 100.0)))


def test_nan_and_a_wrong_shape_never_pass() -> None:
    assert not compare("x", torch.tensor([float("nan")]), torch.zeros(1), 1.0).passed
    assert not compare("x", torch.zeros(2), torch.zeros(1), 1.0).passed


def test_missing_files_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"config\.json, weights\.safetensors"):
        Golden(tmp_path)


def test_a_missing_weight_is_named(golden: Golden, tmp_path: Path) -> None:
    copy = damaged(golden, tmp_path, "ln_visual.weight", 1.0)
    weights = load_file(copy.folder / "weights.safetensors")
    del weights["ln_visual.weight"]
    save_file(weights, copy.folder / "weights.safetensors")
    with pytest.raises(ContentError, match=r"ln_visual\.weight: missing"):
        copy.pretrained()


@pytest.mark.parametrize("key, value", [("frame_num", 4), ("frame_times", [0, 9, 20, 30, 40])])
def test_a_storyboard_told_otherwise_is_found(
    golden: Golden, tmp_path: Path, key: str, value: object
) -> None:
    told = json.loads((golden.folder / "storyboard.json").read_text())
    told["cases"][0]["expected"][key] = value
    told["cases"][1]["expected"]["pairs"][1]["text"] += "!"
    (tmp_path / "storyboard.json").write_text(json.dumps(told))
    found = [comparison.passed for comparison in storyboards(tmp_path)]
    assert found == [False, False, True, True, True, True, True]
    assert list(storyboards(tmp_path / "nowhere")) == []
