"""What pretraining starts from: a LLaMA, an EVA-CLIP tower, the rest drawn by name."""

from pathlib import Path

import pytest
import torch
import yaml
from converted import GOLDEN, ROOT, Convert, tensors_of
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmtrain.models.emu.names import LLAMA, RELEASE
from mmtrain.models.emu.spec import EMU
from mmtrain.nn.init import draw_by_name
from mmtrain.recipe import examine

WORDS = 40  # of the LLaMA
NEW = ("[PAD]", "[IMG]", "[/IMG]", "<image>", "[USER]", "[ASSISTANT]")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA, an EVA file, a tokenizer with all new tokens, and a recipe for the three."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    config = LlamaConfig(WORDS, 64, 104, 2, 4, rms_norm_eps=1e-6)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "llama")
    tower = load_file(GOLDEN / "weights.safetensors")
    torch.save(
        {"module": {n: t.half() for n, t in tower.items() if n.startswith("visual.")}},
        folder / "eva.pt",
    )
    known = ["<unk>", "<s>", "</s>", "user", "assist", "ant"]
    words = {word: row for row, word in enumerate(known + [f"w{i}" for i in range(WORDS - 6)])}
    plain = Tokenizer(models.WordPiece(words, unk_token="<unk>", continuing_subword_prefix=""))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>", *NEW]})
    tokenizer.save_pretrained(folder / "tokenizer")
    recipe = yaml.safe_load((ROOT / "configs/emu/tiny.yaml").read_text())
    recipe["model"] = {
        "vision": {"image_size": 56, "layers": 2, "width": 52, "heads": 4, "mlp_width": 226},
        "causal": {
            "queries": 4,
            "layers": 1,
            "width": 32,
            "heads": 4,
            "head_width": 8,
            "mlp_width": 64,
        },
        "language": {
            "vocabulary": WORDS + 6,
            "layers": 2,
            "width": 64,
            "heads": 4,
            "mlp_width": 104,
        },
    }
    recipe["seed"] = 5
    recipe["data"]["tokenizer"] = str(folder / "tokenizer")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def arguments(sources: Path) -> list[object]:
    return [
        "start",
        "--llama",
        sources / "llama",
        "--eva",
        sources / "eva.pt",
        "--recipe",
        sources / "recipe.yaml",
    ]


def test_every_parameter_comes_from_where_it_should(
    convert: Convert, tmp_path: Path, sources: Path
) -> None:
    convert(*arguments(sources), tmp_path / "start")
    found = tensors_of(tmp_path / "start")
    recipe = examine(sources / "recipe.yaml").recipe
    assert recipe is not None
    llama = LLAMA.to_canonical(tensors_of(sources / "llama"))
    eva = torch.load(sources / "eva.pt", weights_only=True)["module"]
    tower = RELEASE.to_canonical(eva)
    rules = EMU.initial(recipe.model)
    tables = ("embed.tokens.weight", "head.unembed.weight")
    for name, tensor in found.items():
        if name in tables:
            assert torch.equal(tensor[:WORDS], llama[name])
            mean = llama[name].double().mean(0).to(torch.bfloat16)
            assert torch.equal(tensor[WORDS:], mean.expand(6, -1)), name
        elif name in llama or name in tower:
            assert torch.equal(tensor, (llama | tower)[name]), name
        else:
            assert name.startswith(("causal.", "vision_norm.", "head.regress."))
            assert torch.equal(tensor, draw_by_name(name, tuple(tensor.shape), rules, 5)), name
    missing = (llama.keys() | tower.keys()) - found.keys()
    assert not missing and found["head.regress.weight"].dtype == torch.float32


def test_new_tokens_begin_as_words(convert: Convert, tmp_path: Path, sources: Path) -> None:
    convert(
        *arguments(sources),
        "--new-token",
        "[USER]=user",
        "--new-token",
        "[ASSISTANT]=assistant",
        tmp_path / "start",
    )
    convert(
        *arguments(sources),
        "--new-token",
        f"#{WORDS + 4}=#3",
        tmp_path / "by-id",
    )
    llama = LLAMA.to_canonical(tensors_of(sources / "llama"))
    found = tensors_of(tmp_path / "start")
    for name in ("embed.tokens.weight", "head.unembed.weight"):
        table = llama[name]
        assert torch.equal(found[name][WORDS + 4], table[3])
        pieces = table[4:6].float().mean(0).to(table.dtype)  # assist + ant
        assert torch.equal(found[name][WORDS + 5], pieces)
        assert torch.equal(tensors_of(tmp_path / "by-id")[name][WORDS + 4], table[3])


def test_the_plan_says_what_is_created_and_how(
    convert: Convert, tmp_path: Path, sources: Path
) -> None:
    said = convert(*arguments(sources), tmp_path / "x", "--new-token", "#44=#3", "--dry-run")
    assert "rows 40-45 added: mean of the 40, 44 as [3]" in said
    assert "drawn by name, seed 5" in said and not (tmp_path / "x").exists()


def test_a_start_is_what_a_recipe_starts_from(
    convert: Convert, tmp_path: Path, sources: Path
) -> None:
    """`train.initialize_from` takes the folder; what the model computes is finite."""
    from mmtrain.checkpoint.portable import open_tensors
    from mmtrain.models.census import take_census

    convert(*arguments(sources), tmp_path / "start", "--dtype", "fp32")
    recipe = examine(sources / "recipe.yaml").recipe
    assert recipe is not None
    census = take_census(EMU, recipe.model)
    shapes = {name: shape for layer in census for name, shape in layer.shapes.items()}
    tensors = open_tensors(tmp_path / "start")
    assert {name: tensors.shape(name) for name in tensors.names()} == shapes


@pytest.mark.parametrize(
    "words, code, text",
    [
        (["--new-token", "[USER]"], 2, "TOKEN=WORD"),
        (["--new-token", "[NOBODY]=user"], 2, "[NOBODY] is no token of"),
        (["--new-token", "#3=#5"], 65, "row 3 of embed.tokens.weight is not new"),
        (["--new-token", "#41=#999"], 65, "there are 40"),
    ],
)
def test_faults_of_new_tokens(
    convert: Convert, tmp_path: Path, sources: Path, words: list[str], code: int, text: str
) -> None:
    said = convert(*arguments(sources), *words, tmp_path / "x", code=code)
    assert text in said and not (tmp_path / "x").exists()


def test_what_does_not_fit_the_recipe_is_listed(
    convert: Convert, tmp_path: Path, sources: Path
) -> None:
    recipe = yaml.safe_load((sources / "recipe.yaml").read_text())
    recipe["model"]["language"] |= {"layers": 3, "rope_theta": 5e5}
    recipe["model"]["vision"] |= {"image_size": 28}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = arguments(sources)
    words[-1] = tmp_path / "recipe.yaml"
    said = convert(*words, tmp_path / "x", code=65)
    assert "model.language.rope_theta: the recipe has 500000.0, the LLaMA 10000.0" in said
    assert "blocks.2.attention.q.weight: the recipe's model has it, neither file gives it" in said
    assert "vision.stem.position" in said and not (tmp_path / "x").exists()
