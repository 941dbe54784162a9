"""Adapters on every layout, from the weights of a base run that stays as it is."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from world import TINY, World

from mmtrain.checkpoint.portable import FullTensors, open_tensors
from mmtrain.data.assemble import Assembler
from mmtrain.data.loader import heldout_batches
from mmtrain.data.mixture import OnePass
from mmtrain.feed import Setting, make_plan, open_sources, read_setting
from mmtrain.models.emu.model import losses
from mmtrain.nn.lora import is_adapter, merged
from mmtrain.recipe import examine
from mmtrain.trained import load_layers

KEYS = ("loss", "loss_text", "loss_image", "grad_norm", "learning_rate", "tokens", "images")
CLOCK = ("tokens_per_second", "images_per_second", "step_seconds", "data_seconds", "mfu")

# rates are high, so that few steps learn something and B is far from zero
FAST = ("optimizer.learning_rate=2e-2", "schedule.warmup_steps=1", "train.global_batch_packs=2")
LORA = (
    *FAST,
    "phase=instruct",
    "model.lora={rank: 4, alpha: 16, dropout: 0.2, targets: [q, k, v, out, gate, up, down]}",
    "train.steps=6",
    "save.every_steps=3",
)
LAYOUTS = {
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "pp3-first-stage-frozen": (3, "parallel.pipeline=3", "parallel.bounds=[4,8]"),
    "tp2-pp2": (4, "parallel.tensor=2", "parallel.pipeline=2"),
    "dp2-zero1": (2, "parallel.zero_stage=1"),
    "dp2-zero2": (2, "parallel.zero_stage=2"),
    "dp2-zero3": (2, "parallel.zero_stage=3"),
    "tp2-zero3": (2, "parallel.tensor=2", "parallel.zero_stage=3"),
    "tp2-sequence": (2, "parallel.tensor=2", "parallel.sequence=true"),
    "recompute": (1, "parallel.recompute=full"),
    "two-packs-at-a-time": (1, "train.micro_batch_packs=2"),
}


@pytest.fixture(scope="module")
def base(world: World) -> str:
    """The override that starts from a short pretraining run."""
    world.train("lora-base", 1, *FAST, "train.steps=12")
    return "train.initialize_from=runs/lora-base"


@pytest.fixture(scope="module")
def reference(world: World, base: str) -> list[dict[str, Any]]:
    """The metrics of one rank."""
    return world.train("lora-one", 1, *LORA, base)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Full tensors of a run's newest checkpoint."""
    found = open_tensors(folder)
    return {name: found.get(name) for name in found.names()}


def test_only_adapters_move(world: World, reference: list[dict[str, Any]]) -> None:
    before, after = (tensors(world.folder / "runs" / name) for name in ("lora-base", "lora-one"))
    added = after.keys() - before.keys()
    assert added == set(filter(is_adapter, after)) and len(added) == 3 * 7 * 2
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(after[name].abs().max() > 0.01 for name in added)
    log = (world.folder / "runs/lora-one/log.txt").read_text()
    trained = sum(after[name].numel() for name in added)
    assert "42 tensors of adapters drawn" in log
    assert f"{trained} of {sum(t.numel() for t in after.values())} numbers are trained" in log


class Given:
    """Tensors in memory, as a source of weights."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.get = tensors.__getitem__


def loss_of(setting: Setting, weights: FullTensors | Given) -> float:
    """Text loss of a plain model on captions, in evaluation."""
    (source,) = open_sources(setting, {"captions": setting.recipe.data.sources["captions"]})
    assembler = Assembler(
        sources=[source],
        vocabulary=setting.vocabulary,
        layout=setting.layout,
        pack_tokens=setting.recipe.data.pack_tokens,
    )
    layers = load_layers(setting.spec, setting.recipe.model, weights, torch.device("cpu"))
    total = count = 0.0
    plan = make_plan(setting, OnePass(source))
    for batch in heldout_batches(plan, assembler, packs=8, micro_batch_packs=4):
        weight = batch.targets.weights["text"]
        total += float((losses(layers, batch.inputs)["text"] * weight).sum())
        count += float(weight.sum())
    return total / count


def test_adapters_lower_the_loss_and_merge_into_the_weights_they_stand_beside(
    world: World, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.train("lora-long", 1, *LORA, base, "train.steps=24")
    monkeypatch.chdir(world.folder)  # a recipe's paths are relative to where it runs
    settings = {}
    for name in ("lora-base", "lora-long"):
        recipe = examine(Path("runs", name, "recipe.yaml")).recipe
        assert recipe is not None
        settings[name] = read_setting(recipe)
    found = {name: loss_of(settings[name], open_tensors(Path("runs", name))) for name in settings}
    assert found["lora-long"] < 0.98 * found["lora-base"]
    whole = merged(tensors(Path("runs/lora-long")), settings["lora-long"].recipe.model.lora.scale)
    assert loss_of(settings["lora-base"], Given(whole)) == pytest.approx(
        found["lora-long"], rel=1e-5
    )


def test_adapters_go_on_where_another_run_left_them_but_not_under_another_alpha(
    world: World, reference: list[dict[str, Any]]
) -> None:
    again = (*LORA, "train.steps=1", "train.initialize_from=runs/lora-one")
    first = world.train("lora-again", 1, *again)[0]
    assert first["loss_text"] < reference[0]["loss_text"]  # of the same packs
    codes = world.run(1, "train", str(TINY), "name=no", *again, "model.lora.alpha=8")
    assert codes == [65] and "trained with alpha 16" in world.last_log


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_do_not_depend_on_the_layout(
    world: World, base: str, reference: list[dict[str, Any]], layout: str
) -> None:
    ranks, *overrides = LAYOUTS[layout]
    found = world.train(f"lora-{layout}", ranks, *LORA, base, *overrides)
    assert len(found) == len(reference)
    for line, wanted in zip(found, reference, strict=True):
        for key in KEYS:
            assert line[key] == pytest.approx(wanted[key], rel=1e-5), (line["step"], key)


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "dp2-zero3"])
def test_a_resumed_run_continues_bit_for_bit_with_dropout(
    world: World, base: str, reference: list[dict[str, Any]], layout: str
) -> None:
    """The runs above, as if they had died after step 3."""
    ranks, *overrides = LAYOUTS.get(layout, (1,))
    whole, cut = (world.folder / "runs" / f"lora-{layout}{end}" for end in ("", "-cut"))
    if not whole.exists():
        world.train(whole.name, ranks, *LORA, base, *overrides)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    world.train(cut.name, ranks, *LORA, base, *overrides)
    assert "step-00000003" in (cut / "log.txt").read_text()
    left, right = (
        [{k: v for k, v in line.items() if k not in CLOCK} for line in world.metrics(run.name)]
        for run in (whole, cut)
    )
    assert [{**line, "peak_tflops": 0} for line in left] == [
        {**line, "peak_tflops": 0} for line in right
    ]
    a, b = tensors(whole), tensors(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_new_tokens_begin_like_the_words_that_the_recipe_names(world: World, base: str) -> None:
    """The way to [USER] and [ASSISTANT]: a longer tokenizer, lengths counted again, more rows."""
    shutil.copytree(world.folder / "demo_data" / "tokenizer", world.folder / "longer")
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "longer")
    rows = 258 - len(tokenizer)
    tokenizer.add_tokens([f"[new-{n}]" for n in range(rows)], special_tokens=True)
    tokenizer.save_pretrained(world.folder / "longer")
    assert world.run(1, "data", "index", "demo_data/text", "--tokenizer", "longer") == [0]
    longer = (
        base,
        *LORA,
        "train.steps=1",
        "data.tokenizer=longer",
        *(f"data.sources.{name}=null" for name in ("captions", "pages", "clips", "boards")),
        "model.language.vocabulary=258",
    )
    last = f"'[new-{rows - 1}]'"
    world.train("lora-rows", 2, *longer, "parallel.tensor=2", f"train.new_rows={{{last}: red}}")
    (red,) = tokenizer.encode("red", add_special_tokens=False)
    before, after = (tensors(world.folder / "runs" / name) for name in ("lora-base", "lora-rows"))
    for table in ("embed.tokens.weight", "head.unembed.weight"):
        old, new = before[table], after[table]
        assert torch.equal(new[:256], old) and torch.equal(new[257], old[red])
        torch.testing.assert_close(new[256], old.mean(0))
    log = (world.folder / "runs/lora-rows/log.txt").read_text()
    assert f"rows 256 to 257 are means of rows; [new-{rows - 1}] like 'red'" in log
    codes = world.run(1, "train", str(TINY), "name=no", *longer, "train.new_rows={'[neu-0]': red}")
    assert codes == [2] and "did you mean [new-0]?" in world.last_log
