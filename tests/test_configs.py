"""Every recipe that comes with the project is sound, and its size is known exactly."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.facts import collect, plan
from mmtrain.models.census import count_by_part
from mmtrain.recipe import examine
from mmtrain.settings import Decay, Precision, Recipe, TaskKind

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(ROOT.joinpath("configs").rglob("*.yaml"))

# exact parameter counts; a new recipe adds its own
COUNTS = {
    "emu/tiny": 119_808,
    "emu/tiny_instruct": 122_880,
    "emu/shapes_encoder": 1_890_688,
    "emu/shapes_pretrain": 1_890_688,
    "emu/shapes_instruct": 2_046_848,
    "emu/demo": 1_628_160,
    "emu/long_encoder": 12_006_144,
    "emu/long_pretrain": 12_006_144,
    "emu/long_instruct": 12_630_784,
    "emu/long_decoder": 25_032_076,
    "emu/25m": 25_211_136,
    "emu/100m_pretrain": 107_569_920,
    "emu/7b_pretrain": 7_894_617_600,
    "emu/14b_pretrain": 14_182_299_136,
    "emu/14b_instruct": 14_208_534_016,
    "emu/tiny_decoder": 72_579,
    "emu/shapes_decoder": 2_455_020,
    "emu/14b_decoder": 968_146_884,
    "transfusion/tiny": 68_976,
    "transfusion/shapes": 2_885_100,
    "transfusion/shapes_vae": 732_140,
    "transfusion/vae": 88_579_244,
    "transfusion/shapes_edit": 2_885_100,
    "transfusion/ablation": 528_972,
    "transfusion/0.16b": 163_267_616,
    "transfusion/0.37b": 375_255_072,
    "transfusion/0.76b": 780_724_256,
    "transfusion/1.4b": 1_369_169_952,
    "transfusion/7b": 6_756_548_640,
}


def read(name: str) -> Recipe:
    recipe = examine(ROOT / "configs" / f"{name}.yaml").recipe
    assert recipe is not None
    return recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_lacks_nothing_but_its_data(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # where no data lie, whatever lies beside this file
    seen = examine(path)
    assert seen.faults == ()
    inputs = ("data.", "train.initialize_from", "decoder.", "evaluate.tasks.", "model.image.vae")
    assert all(problem.place.startswith(inputs) for problem in seen.missing)
    assert seen.recipe is not None
    numbers = collect(seen.recipe).numbers
    name = str(path.relative_to(ROOT / "configs").with_suffix(""))
    with capsys.disabled():
        print(f"\n{name}: {numbers:,} parameters", end=" ")
    assert numbers == COUNTS[name]


def test_14b_has_the_sizes_of_the_release_less_what_nothing_uses() -> None:
    facts = collect(read("emu/14b_pretrain"))
    # stored numbers and tensors of the released pretrain model, by part
    visual, ln_visual = 1_012_588_928, 2_816
    cformer, decoder, rotary = 153_707_648, 13_042_119_680, 40 * 64
    assert visual + ln_visual + cformer + decoder + rotary == 14_208_421_632
    # what is stored but never used: the tower's final norm and its head, a T5 embedding table
    norm, head, table = 2 * 1408, 1024 * 1408 + 1024, 32128 * 768
    parts = count_by_part(facts.census)
    assert parts["vision"] == visual - norm - head
    assert parts["vision_norm"] == ln_visual
    assert parts["causal"] == cformer - table
    assert parts["embed"] + parts["blocks"] + parts["head"] == decoder
    assert facts.numbers == 14_208_421_632 - rotary - norm - head - table
    # 1,096 tensors less 40 rotary buffers are 1,056; less norm, head (2 each) and the table;
    # the fused qkv of 40 blocks is three tensors here
    tensors = sum(len(layer.shapes) for layer in facts.census)
    assert tensors == 1_096 - 40 - 5 + 40 * 2


def test_14b_has_the_published_hyper_parameters() -> None:
    recipe = read("emu/14b_pretrain")
    optimizer = recipe.optimizer
    assert optimizer.learning_rate == 3e-5
    assert optimizer.learning_rates["vision"] == 4e-5
    assert optimizer.learning_rates["causal"] == 1e-4
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.98, 1e-6)
    assert optimizer.weight_decay == 0.05
    assert (recipe.train.steps, recipe.schedule.warmup_steps) == (10_000, 2_000)
    assert recipe.schedule.decay is Decay.cosine
    assert recipe.train.precision is Precision.bf16
    assert recipe.model.vision.image_size == 224


def test_instruction_tuning_trains_the_adapters_of_the_release_and_nothing_else() -> None:
    recipe, base = read("emu/14b_instruct"), read("emu/14b_pretrain")
    facts = collect(recipe)
    assert facts.trained_numbers == 26_214_400  # the release's LoRA values
    assert facts.numbers - facts.trained_numbers - collect(base).numbers == 2 * 2 * 5120
    assert len(facts.trained_shapes) == 40 * 4 * 2
    assert (recipe.train.steps, recipe.schedule.warmup_steps) == (10_000, 500)
    assert recipe.optimizer.learning_rate == 1e-5 and not recipe.optimizer.learning_rates
    assert recipe.train.loss_weights == {"text": 1.0, "image": 0.0}
    # encoders are one pass, blocks a forward and a gradient of their input
    names = [layer.name for layer in facts.census]
    passes = dict(zip(names, facts.passes, strict=True))
    assert passes["vision.blocks.3"] == passes["embed"] == 1
    assert passes["blocks.0"] == passes["blocks.39"] == pytest.approx(2, abs=0.01)
    assert passes["head"] == 2
    assert "1.81 passes" in plan(recipe, 16)
    # stages are balanced over the work of a step, in which frozen encoders count once
    staged = replace(recipe, parallel=base.parallel)
    assert names[collect(staged).bounds()[0]] == "blocks.18"
    assert names[collect(base).bounds()[0]] == "blocks.15"


def test_a_small_rate_means_the_same_part_in_every_size() -> None:
    large, small = (read(f"emu/{size}_pretrain").optimizer for size in ("14b", "100m"))
    for part, rate in large.learning_rates.items():
        ratio = rate / large.learning_rate
        assert small.learning_rates[part] / small.learning_rate == pytest.approx(ratio)


@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])
def test_tiny_runs_on_every_layout_of_the_test_suite(tensor: int, pipeline: int) -> None:
    overrides = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    path = ROOT / "configs/emu/tiny.yaml"
    assert examine(path, overrides, tensor * pipeline * 2).faults == ()


@pytest.mark.parametrize("name", ["encoder", "pretrain", "decoder", "instruct"])
@pytest.mark.parametrize("size, ranks", [("shapes", 2), ("long", 1), ("long", 2)])
def test_the_chain_of_make_emu_runs_on_its_ranks(size: str, name: str, ranks: int) -> None:
    assert examine(ROOT / f"configs/emu/{size}_{name}.yaml", (), ranks).faults == ()


def test_make_transfusion_runs_on_its_ranks_and_draws_what_its_judge_can_tell() -> None:
    path = ROOT / "configs/transfusion/shapes.yaml"
    makefile = (ROOT / "Makefile").read_text()
    assert "configs/transfusion/shapes.yaml $(TRANSFUSION_OVERRIDES)" in makefile
    for ranks in (1, 2):
        assert examine(path, (), ranks).faults == ()
    recipe = read("transfusion/shapes")
    assert makefile.count(f"runs/{recipe.name}") >= 3
    assert recipe.log.images_every_steps and recipe.train.ema
    assert {task.kind for task in recipe.evaluate.tasks.values()} == {
        TaskKind.shapes_captions,
        TaskKind.draw,
    }


def test_the_plan_of_14b_fits_its_machines() -> None:
    recipe = read("emu/14b_pretrain")
    assert examine(ROOT / "configs/emu/14b_pretrain.yaml", (), 128).faults == ()
    facts = collect(recipe)
    text = plan(recipe, 128)
    assert "tensor 4 x pipeline 2 x data 16" in text
    assert "16 data ranks x 32 micro-batches x 1 packs of 2048 positions" in text
    # all encoders in stage 0 and the trunk in stage 1 would be 1 : 4.1
    (cut,) = facts.bounds()
    names = [layer.name for layer in facts.census]
    assert names[cut].startswith("blocks.")
    first, second = sum(facts.flops[:cut]), sum(facts.flops[cut:])
    assert max(first, second) / min(first, second) < 1.06


def test_the_recipe_in_the_readme_is_sound(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = tmp_path / "my.yaml"
    path.write_text(block.replace("base: ", f"base: {ROOT}/"))
    seen = examine(path, (), 8)
    assert seen.faults == ()
    assert seen.recipe is not None
    assert list(seen.recipe.data.sources) == ["mmc4_window", "mmc4_images", "webvid"]
    assert {p.place for p in seen.missing} == {
        "data.tokenizer",
        "data.sources.mmc4_window.path",
        "data.sources.mmc4_images.path",
    }


@pytest.mark.parametrize("recipe, own, foreign", [
    ("transfusion/shapes", "ddpm", "pndm"),
    ("emu/shapes_pretrain", "pndm", "ddpm"),
])  # fmt: skip
def test_pictures_of_an_evaluation_are_drawn_by_a_way_that_the_family_knows(
    recipe: str, own: str, foreign: str
) -> None:
    path = ROOT / f"configs/{recipe}.yaml"

    def faults(scheduler: str) -> list[str]:
        seen = examine(path, [f"evaluate.tasks.x={{kind: draw, path: p, scheduler: {scheduler}}}"])
        return [fault.text for fault in seen.faults if fault.place == "evaluate.tasks.x.scheduler"]

    assert faults(own) == []
    (told,) = faults(foreign)
    assert f"found '{foreign}'" in told and own in told
