"""Recipes: what a YAML may say, and every fault it may have, all reported at once."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mmtrain.errors import RecipeError
from mmtrain.ops.select import Preference
from mmtrain.recipe import load, problems, read, to_yaml
from mmtrain.settings import Decay, Precision, Recompute, Rule, Spike


@pytest.fixture
def tiny(recipe: Path) -> Path:
    return recipe


def faults(path: Path, overrides: Sequence[str] = (), world: int | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides, world)
    return [str(problem) for problem in caught.value.problems]


def only(path: Path, *overrides: str, world: int | None = None) -> str:
    (fault,) = faults(path, overrides, world)
    return fault


# what a recipe may say


def test_a_recipe_becomes_typed_and_frozen(tiny: Path) -> None:
    recipe = load(tiny)
    assert recipe.train.precision is Precision.fp32
    assert recipe.data.sources["captions"].rule is Rule.pair
    assert recipe.model.vision.patch_size == 14  # defaults of the family
    with pytest.raises(AttributeError):
        recipe.train.steps = 3  # type: ignore[misc]


def test_overrides_come_last_and_in_order(tiny: Path) -> None:
    overrides = [
        "train.steps=20",
        "train.steps=30",
        "schedule.decay=linear",
        "parallel.pipeline=3",
        "parallel.bounds=[2,5]",
        "optimizer.learning_rate=1e-4",
        "optimizer.learning_rates[vision.stem]=2e-4",
        "train.loss_weights.image=0.5",
    ]
    recipe = load(tiny, overrides)
    assert recipe.train.steps == 30
    assert recipe.schedule.decay is Decay.linear
    assert recipe.parallel.bounds == (2, 5)
    assert recipe.optimizer.learning_rate == 1e-4
    assert recipe.optimizer.learning_rates == {"vision.stem": 2e-4}
    assert recipe.train.loss_weights == {"text": 1.0, "image": 0.5}


def test_a_base_chain_is_read_from_its_own_folders(tiny: Path) -> None:
    middle = tiny.parent / "deep" / "middle.yaml"
    middle.parent.mkdir()
    middle.write_text("base: ../recipe.yaml\ntrain: {steps: 11}\nseed: 5\n")
    last = tiny.parent / "last.yaml"
    last.write_text("base: deep/middle.yaml\nname: last\nseed: 6\n")
    recipe = load(last)
    assert (recipe.name, recipe.seed, recipe.train.steps) == ("last", 6, 11)
    assert recipe.train.global_batch_packs == 8


def test_null_takes_an_entry_of_a_base_out(tiny: Path, shapes: Path) -> None:
    child = tiny.parent / "child.yaml"
    child.write_text(
        "base: recipe.yaml\ndata: {sources: {captions: null, text: {path: "
        f"{shapes}/text, rule: text, max_images: 0, max_tokens: 64}}}}}}\n"
    )
    assert list(load(child).data.sources) == ["text"]


def test_a_key_may_copy_another_even_a_default(tiny: Path) -> None:
    recipe = load(tiny, ["data.pack_tokens=${model.language.context}", "data.pack_images=2",
                         "save.every_steps=${validate.every_steps}"])  # fmt: skip
    assert recipe.data.pack_tokens == 64
    assert recipe.save.every_steps == 500


def test_the_written_recipe_reads_back_as_the_same_object(tiny: Path) -> None:
    overrides = [
        "parallel.pipeline=2", "parallel.bounds=[3]", "optimizer.eps=1e-9", "output=a b/ä",
        "optimizer.no_decay=[vision.stem.cls]", "model.language.qk_norm=rms",
        'train.freeze=["vision.blocks.*.attention.{q,k}"]', "parallel.recompute=full",
        "optimizer.learning_rates[blocks.*.mlp]=3e-7", "seed=${train.steps}",
    ]  # fmt: skip
    recipe = load(tiny, overrides)
    assert recipe.parallel.recompute is Recompute.full and recipe.seed == 10
    copy = tiny.parent / "copy.yaml"
    copy.write_text(to_yaml(recipe))
    assert load(copy) == recipe
    assert to_yaml(load(copy)) == to_yaml(recipe)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels may be there")
def test_kernels_that_a_recipe_insists_on_must_be_there_to_train_not_to_plan(tiny: Path) -> None:
    overrides = ["ops.attention=cuda"]
    assert read(tiny, overrides).ops.attention is Preference.cuda
    fault = only(tiny, *overrides)
    assert fault.startswith("ops.attention: cuda, but there is no CUDA device; or use auto")


# spelling and types


def test_a_misspelt_key_gets_the_nearest_spelling_and_the_list(tiny: Path) -> None:
    fault = only(tiny, "train.stepz=5")
    assert fault.startswith("train.stepz: unknown key (value 5); did you mean train.steps? ")
    assert "keys of train: steps, global_batch_packs" in fault


def test_a_key_in_the_wrong_section_is_pointed_to_its_own(tiny: Path) -> None:
    assert "did you mean optimizer.clip_norm?" in only(tiny, "train.clip_norm=1")
    assert "did you mean save.keep?" in only(tiny, "keep=1")
    assert "did you mean model.language.heads?" in only(tiny, "model.language.head=4")
    fault = only(tiny, "data.sources.captions.rul=pair")
    assert "did you mean data.sources.captions.rule?" in fault


@pytest.mark.parametrize(
    "override, pieces",
    [
        ("train.steps=ten", ("train.steps: found 'ten'", "a whole number")),
        ("train.steps=1.5", ("found 1.5", "a whole number")),
        ("train.steps=true", ("found true", "a whole number")),
        ("train.steps=", ("found null", "a whole number")),
        ("optimizer.eps=tiny", ("optimizer.eps: found 'tiny'", "a number")),
        ("data.shuffle=maybe", ("data.shuffle: found 'maybe'", "true or false")),
        ("train.precision=fp16", ("found 'fp16'", "one of fp32, bf16", "did you mean bf16?")),
        ("data.sources.captions.rule=pairs", ("found 'pairs'", "(did you mean pair?)")),
        ("parallel.bounds=3", ("parallel.bounds: found 3", "a list")),
        ("log=5", ("log: found 5", "a section with every_steps")),
        ("data.sources=[a]", ("data.sources: found a list", "a table of names")),
        ("model.language.qk_norm=rmss", ("model.language.qk_norm", "none, rms, layer")),
    ],
)
def test_a_mistyped_value_is_quoted_with_what_is_wanted(
    tiny: Path, override: str, pieces: tuple[str, ...]
) -> None:
    fault = only(tiny, override)
    assert all(piece in fault for piece in pieces), fault


def test_every_missing_mandatory_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("data: {sources: {a: {rule: text, max_images: 0}}}\n")
    found = faults(path)
    assert [f.partition(":")[0] for f in found] == [
        "name", "data.tokenizer", "data.sources.a.path",
    ]  # fmt: skip
    assert "set it here or as data.tokenizer=...: a text" in found[1]


def test_an_unknown_family_lists_those_there_are(tiny: Path) -> None:
    assert "there is no family 'emo' (did you mean emu?); allowed: emu" in only(tiny, "family=emo")


def test_a_misspelt_phase_is_one_fault(tiny: Path) -> None:
    assert "did you mean instruct?" in only(tiny, "phase=instrukt")


def test_a_dangling_reference_is_a_fault_of_its_key(tiny: Path) -> None:
    fault = only(tiny, "train.steps=${train.stepz}")
    assert fault.startswith("train.steps: cannot resolve '${train.stepz}'")


def test_an_override_without_a_value_is_refused(tiny: Path) -> None:
    assert "override 'train.steps': wanted: key=value" in only(tiny, "train.steps")
    assert "override '=3'" in only(tiny, "=3")


# files


def test_a_missing_recipe_and_a_missing_base_are_named(tiny: Path) -> None:
    assert "no such recipe" in only(tiny.parent / "none.yaml")
    child = tiny.parent / "child.yaml"
    child.write_text("base: none.yaml\n")
    fault = next(f for f in faults(child) if "none.yaml" in f)
    assert "no such recipe" in fault and "child.yaml" in fault


def test_a_base_chain_that_comes_back_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    fault = next(f for f in faults(tmp_path / "a.yaml") if "base chain" in f)
    assert "a.yaml" in fault and "b.yaml" in fault


def test_broken_yaml_is_a_fault_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: x\ntrain: {steps: 1\n")
    assert "cannot be read as YAML" in only(path) and "line" in only(path)
    path.write_text("- a\n- b\n")
    assert "wanted: a table of keys" in only(path)


def test_every_missing_file_is_named(tiny: Path, shapes: Path) -> None:
    found = faults(
        tiny,
        [
            "data.tokenizer=nowhere", "data.sources.captions.path=gone",
            f"data.heldout.a={{path: {shapes}, rule: text, max_images: 0, max_tokens: 64}}",
            "train.initialize_from=lost",
        ],
    )  # fmt: skip
    assert found[0] == "data.tokenizer: there is no folder nowhere"
    assert found[1].startswith("data.sources.captions.path: there is no folder gone")
    assert "data.heldout.a.path" in found[2] and "holds no index.json" in found[2]
    assert found[3] == "train.initialize_from: there is no folder lost"
    assert "holds none of tokenizer.json" in only(tiny, f"data.tokenizer={shapes}")


def test_a_tokenizer_must_fit_the_model(tiny: Path) -> None:
    fault = only(tiny, "model.language.vocabulary=100")
    assert fault.startswith("data.tokenizer: ") and "but the model's vocabulary is 100" in fault


def test_a_tokenizer_must_have_the_special_tokens(tiny: Path) -> None:
    plain = tiny.parent / "plain"
    tokenizer = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "red": 2}, unk_token="red"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(plain)
    fault = only(tiny, f"data.tokenizer={plain}")
    assert "lacks the special tokens ['[PAD]', '[IMG]', '[/IMG]', '<image>']" in fault


def test_conversations_need_a_tokenizer_with_their_roles(tiny: Path, shapes: Path) -> None:
    chat = f"data.sources.chat={{path: {shapes}/chat, rule: chat, max_images: 1, max_tokens: 64}}"
    assert load(tiny, [chat]).data.sources["chat"].rule is Rule.chat
    plain = tiny.parent / "without_roles"
    shutil.copytree(shapes / "tokenizer", plain)
    for path in plain.iterdir():
        path.write_text(path.read_text().replace("[USER]", "[X]").replace("[ASSISTANT]", "[Y]"))
    faulty = faults(tiny, [chat, f"data.tokenizer={plain}"])
    assert "lacks the special tokens ['[USER]', '[ASSISTANT]']" in faulty[0]
    assert "max_tokens: " in only(tiny, chat, "data.sources.chat.max_tokens=7")


def test_shards_without_lengths_for_the_tokenizer_are_told_how_to_get_them(
    tiny: Path, shapes: Path
) -> None:
    other = tiny.parent / "other"
    shutil.copytree(shapes / "tokenizer", other)
    (other / "special_tokens_map.json").write_text("{}")  # another fingerprint
    fault = only(tiny, f"data.tokenizer={other}")
    assert fault.startswith("data.sources.captions.path: ")
    assert f"run mmtrain data index {shapes}/captions --tokenizer {other}" in fault


def test_a_source_may_have_a_limit_of_bad_samples_of_its_own(tiny: Path) -> None:
    recipe = load(tiny, ["data.sources.captions.decode_failures=0.2", "data.decode_failures=0.05"])
    limits = recipe.data.failure_limits
    assert limits.pop("captions") == 0.2 and set(limits.values()) <= {0.05}
    assert set(load(tiny, ["data.decode_failures=0.05"]).data.failure_limits.values()) == {0.05}
    with pytest.raises(
        RecipeError, match=r"data\.sources\.captions\.decode_failures: found 2"
    ) as said:
        load(
            tiny,
            ["data.sources.captions.decode_failures=2", "data.prefetch=0", "data.cache_bytes=-1"],
        )
    assert {p.place for p in said.value.problems} >= {"data.prefetch", "data.cache_bytes"}


def test_shards_of_a_remote_need_not_be_here(tiny: Path) -> None:
    source = "data.sources.captions"
    recipe = load(tiny, [f"{source}.path=cache", f"{source}.remote=s3://bucket/captions"])
    assert recipe.data.sources["captions"].remote == "s3://bucket/captions"


# layouts and batches


@pytest.mark.parametrize(
    "overrides, world, pieces",
    [
        (
            ["parallel.pipeline=2", "parallel.zero_stage=3"],
            None,
            ("parallel.zero_stage: 3", "ZeRO 1"),
        ),
        (["parallel.sequence=true"], None, ("parallel.sequence: true", "parallel.tensor = 1")),
        (
            ["parallel.tensor=2", "parallel.pipeline=2"],
            6,
            ("does not divide the 6 rank(s)", "[1, 2, 3, 6]"),
        ),
        (
            ["train.global_batch_packs=6"],
            4,
            ("6 is no multiple", "4 data rank(s)", "multiple of 4"),
        ),
        (["train.micro_batch_packs=3"], None, ("8 is no multiple", "multiple of 3")),
        (
            ["parallel.tensor=2", "parallel.sequence=true", "data.pack_tokens=127"],
            None,
            ("127 rows", "parallel.tensor = 2"),
        ),
        (["parallel.pipeline=2", "parallel.bounds=[1,2]"], None, ("2 bound(s)", "give 1")),
        (["parallel.pipeline=3", "parallel.bounds=[4,2]"], None, ("[4, 2]", "ascending", "1 to 7")),
        (["parallel.pipeline=3", "parallel.bounds=[2,8]"], None, ("[2, 8]", "1 to 7")),
        (["parallel.pipeline=9"], None, ("9 stages for 8 layers",)),
        (["data.pack_images=30"], None, ("30 images of 6 positions", "21 or fewer")),
        (
            ["data.sources.captions.max_tokens=200", "model.language.context=256"],
            None,
            ("max_tokens: 200", "data.pack_tokens = 128"),
        ),
        (
            ["data.sources.captions.max_tokens=100"],
            None,
            ("100 positions are more than the model's context of 64",),
        ),
        (["data.sources.captions.max_tokens=8"], None, ("hold no pair", "take 9 or more")),
        (["data.sources.captions.max_images=5"], None, ("found 5", "data.pack_images = 4")),
        (["data.sources.captions.weight=0"], None, ("weight: found 0", "above 0")),
        (["data.sources.captions=null"], None, ("data.sources: empty",)),
        (["train.freeze=[vison]"], None, ("'vison' covers no parameter", "did you mean vision?")),
        (["optimizer.no_decay=[blocks.*.q]"], None, ("optimizer.no_decay", "covers no parameter")),
        (
            ["optimizer.learning_rates.visions=1e-4"],
            None,
            ("optimizer.learning_rates", "'visions'"),
        ),
        (["model.lora.rank=-1"], None, ("model.lora.rank: found -1", "0 for none")),
        (["model.lora.alpha=0"], None, ("model.lora.alpha: found 0.0", "above 0")),
        (["model.lora.dropout=1"], None, ("model.lora.dropout: found 1.0", "below 1")),
        (["model.lora.targets=[q,qkv]"], None, ("some of q, k, v, out, gate, up, down",)),
        (["model.lora.also_train=[embed]"], None, ("with model.lora.rank = 0",)),
        (
            ["model.lora={rank: 2, also_train: [embedd]}"],
            None,
            ("model.lora.also_train: the pattern 'embedd'", "did you mean embed?"),
        ),
        (["model.lora.rank=2", "train.freeze=[blocks]"], None, ("parameter that this phase",)),
        (["train.new_rows={'[USER]': user}"], None, ("without train.initialize_from",)),
        (
            ["train.freeze=[vision,vision_norm,causal,embed,blocks,head]"],
            None,
            ("every parameter",),
        ),
        (["train.loss_weights.images=1"], None, ("no such loss", "did you mean image?")),
        (["train.loss_weights.image=null"], None, ("train.loss_weights.image: missing",)),
        (["train.loss_weights={text: 0, image: 0}"], None, ("every weight is 0",)),
        (["optimizer.beta1=1"], None, ("optimizer.beta1: found 1.0", "below 1")),
        (["optimizer.eps=0"], None, ("optimizer.eps: found 0.0", "above 0")),
        (["schedule.warmup_steps=11"], None, ("11 is beyond train.steps = 10",)),
        (["train.steps=0", "schedule.warmup_steps=0"], None, ("train.steps: found 0", "1 or more")),
        (["name=a/b"], None, ("name: found 'a/b'", "without slashes")),
        (["model.language.layers=0"], None, ("model.language.layers: found 0",)),
    ],
)
def test_what_spans_several_keys_is_checked(
    tiny: Path, overrides: list[str], world: int | None, pieces: tuple[str, ...]
) -> None:
    fault = only(tiny, *overrides, world=world)
    assert all(piece in fault for piece in pieces), fault


def test_head_counts_that_tensor_ranks_do_not_divide_are_all_named(tiny: Path) -> None:
    found = faults(tiny, ["parallel.tensor=3"])
    named = {fault.partition(":")[0] for fault in found}
    assert {"model.vision.heads", "model.causal.heads", "model.language.heads"} <= named
    assert any("parallel.tensor = 3 does not divide 4; it may be 1, 2, 4" in f for f in found)


def test_faults_of_every_kind_come_together(tiny: Path) -> None:
    found = faults(
        tiny,
        [
            "train.stepz=5", "train.precision=fp16", "parallel.tensor=3", "data.tokenizer=nowhere",
            "parallel.pipeline=2", "parallel.zero_stage=2", "train.freeze=[vison]", "foo",
        ],
        world=8,
    )  # fmt: skip
    text = "\n".join(found)
    for piece in (
        "train.stepz", "fp16", "model.vision.heads", "nowhere", "parallel.zero_stage", "vison",
        "override 'foo'", "does not divide the 8 rank(s)",
    ):  # fmt: skip
        assert piece in text, piece


def test_a_fault_does_not_breed_others(tiny: Path) -> None:
    # the default of 64 packs would be no multiple of 3, but 64 is not what was asked for
    fault = only(tiny, "train.global_batch_packs=ten", "train.micro_batch_packs=3")
    assert fault.startswith("train.global_batch_packs: found 'ten'")


def test_a_recipe_made_in_code_is_checked_too(tiny: Path) -> None:
    recipe = load(tiny)
    assert problems(recipe) == []
    broken = replace(recipe, parallel=replace(recipe.parallel, pipeline=2, zero_stage=0))
    (problem,) = problems(broken)
    assert problem.place == "parallel.zero_stage"


def test_what_is_watched_has_ranges_and_a_bare_off_is_a_word(tiny: Path) -> None:
    assert load(tiny, ["watch.spike=off"]).watch.spike is Spike.off  # YAML reads false
    assert load(tiny, ["watch.slow_rank=0"]).watch.slow_rank == 0
    found = "\n".join(
        faults(
            tiny,
            ["watch.spike=ski", "watch.slow_rank=0.5", "watch.nonfinite_steps=0",
             "watch.spike_score=0", "watch.spike_window=1", "watch.rollbacks=-1"],
        )
    )  # fmt: skip
    for piece in (
        "did you mean skip?", "watch.slow_rank: found 0.5", "watch.nonfinite_steps: found 0",
        "watch.spike_score: found 0", "watch.spike_window: found 1", "watch.rollbacks: found -1",
    ):  # fmt: skip
        assert piece in found, piece
