"""The model by itself: sizes of the paper, packing, dummies, gradients, every rule of its spec."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_transfusion import IMAGE, document, drawn, form, packed, random_pieces, small
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.data.batch import Batch
from mmtrain.errors import Problem
from mmtrain.layout.plan import compile_pattern
from mmtrain.models.census import count_by_part, take_census
from mmtrain.models.spec import BatchShape, Use
from mmtrain.models.transfusion.config import (
    Context,
    Edge,
    ImageConfig,
    Positions,
    TransfusionConfig,
)
from mmtrain.models.transfusion.edges import edge_in, edge_out
from mmtrain.models.transfusion.generate import TransfusionSampler
from mmtrain.models.transfusion.model import ImageIn, TransfusionHead, build_plain, losses
from mmtrain.models.transfusion.noising import Noising
from mmtrain.models.transfusion.spec import PLAN, TRANSFUSION, problems
from mmtrain.models.writing import Prompt
from mmtrain.nn.diffusion import Answer, cosine_kept
from mmtrain.nn.diffusion import Path as NoisePath
from mmtrain.nn.init import draw_by_name
from mmtrain.nn.trunk import QkNorm, TrunkConfig
from mmtrain.recipe import examine

CONFIGS = Path(__file__).resolve().parents[3] / "configs/transfusion"

# table 2 and 7 of the paper: numbers without edges in billions, share of linear edges in percent,
# share of U-Net edges in percent
PAPER = {
    "0.16b": (0.162, 0.5, 106.1),
    "0.37b": (0.374, 0.4, 71.3),
    "0.76b": (0.778, 0.4, 35.5),
    "1.4b": (1.364, 0.4, 19.3),
    "7b": (6.738, 0.3, 3.8),
}


def config_of(size: str) -> TransfusionConfig:
    recipe = examine(CONFIGS / f"{size}.yaml").recipe
    assert recipe is not None
    model: TransfusionConfig = recipe.model
    return model


def edges_of(image: ImageConfig, width: int) -> int:
    with torch.device("meta"):
        halves = edge_in(image, width), edge_out(image, width)
    return sum(p.numel() for half in halves for p in half.parameters())


@pytest.mark.parametrize("size", PAPER)
def test_the_sizes_of_the_paper(size: str) -> None:
    config = config_of(size)
    total, share, _ = PAPER[size]
    parts = count_by_part(take_census(TRANSFUSION, config))
    edges = edges_of(config.image, config.language.width)
    trunk = sum(parts.values()) - edges
    assert trunk == pytest.approx(total * 1e9, rel=0.01)
    assert round(100 * edges / trunk, 1) == share


def test_the_unet_edge_has_its_published_size() -> None:
    image = replace(ImageConfig(), edge=Edge.unet)
    assert edges_of(image, 768) == pytest.approx(272e6, rel=0.01)
    assert edges_of(image, 4096) == pytest.approx(280e6, rel=0.01)


@pytest.mark.parametrize("edge", Edge)
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_edges_lead_from_latents_to_rows_and_back_for_every_patch(edge: Edge, patch: int) -> None:
    levels = {1: (8,), 2: (8, 16), 4: (8, 8, 16), 8: (8, 8, 8, 16)}[patch]
    image = ImageConfig(
        channels=5,
        size=16,
        patch=patch,
        edge=edge,
        unet_channels=levels,
        unet_blocks=1,
        unet_head_width=4,
        norm_groups=4,
    )
    enter, leave = edge_in(image, 24), edge_out(image, 24)
    rows, beside = enter(torch.randn(3, 5, 16, 16), torch.tensor([0, 500, 1000]))
    assert rows.shape == (3, (16 // patch) ** 2, 24)
    assert leave(rows, beside).shape == (3, 5, 16, 16)


def prepared(documents: list[list[int]], config: TransfusionConfig, **options: object) -> Batch:
    layout = form(config)
    count = sum(tokens.count(layout.image_begin) for tokens in documents)
    dummies = int(options.pop("dummies", 0))  # type: ignore[call-overload]
    picture = torch.Generator().manual_seed(5)
    pixels = torch.rand(count, 3, 8, 8, generator=picture) * 2 - 1
    if "only" in options:
        pixels = pixels[options.pop("only")]  # type: ignore[index]
    pixels = torch.cat([pixels, torch.zeros(dummies, 3, 8, 8)])
    batch = packed(documents, pixels, layout, **options)  # type: ignore[arg-type]
    return Noising(config, layout, torch.device("cpu"), Use.training)(batch)


def summed(model: dict[str, torch.nn.Module], batch: Batch) -> dict[str, Tensor]:
    values = losses(model, batch.inputs)
    return {name: (value * batch.targets.weights[name]).sum() for name, value in values.items()}


def shared(config: TransfusionConfig) -> TransfusionConfig:
    return replace(config, image=replace(config.image, positions=Positions.shared))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(small(Edge.linear), id="linear"),
        pytest.param(small(Edge.unet), id="unet"),
        pytest.param(shared(small()), id="shared"),
        pytest.param(small(context=Context.prefix_clean), id="prefix-clean"),
        pytest.param(small(context=Context.copies), id="copies"),
        pytest.param(shared(small(Edge.unet, context=Context.copies)), id="unet-shared-copies"),
    ],
)
def test_a_pack_is_worth_the_sum_of_its_documents(config: TransfusionConfig) -> None:
    draw = random.Random(3)
    layout, model = form(config), drawn(config)
    documents = [document([*random_pieces(draw), 3, IMAGE], layout) for _ in range(4)]
    counts = [tokens.count(layout.image_begin) for tokens in documents]
    total = summed(model, prepared(documents, config, dummies=2))
    assert sum(counts) >= 5
    picture = torch.rand(sum(counts), 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    parts = []
    for number, tokens in enumerate(documents):
        first = sum(counts[:number])
        own = picture[first : first + counts[number]]
        batch = packed([tokens], own, layout, seeds=[number])
        noised = Noising(config, layout, torch.device("cpu"), Use.training)(batch)
        parts.append(summed(model, noised))
    for name in ("text", "image"):
        expected = torch.stack([part[name] for part in parts]).sum()
        torch.testing.assert_close(total[name], expected, rtol=1e-5, atol=1e-5)


def gradients(model: dict[str, torch.nn.Module], loss: Tensor) -> dict[str, Tensor]:
    named = {f"{la}.{n}": p for la, m in model.items() for n, p in m.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


@pytest.mark.parametrize("edge", Edge)
def test_an_image_that_stands_in_for_none_leaves_text_gradients_bit_equal(edge: Edge) -> None:
    config = small(edge)
    model, layout = drawn(config), form(config)
    documents = [document([1, 2, 3, 4], layout), document([5, 6], layout)]
    one, three = (prepared(documents, config, dummies=count) for count in (1, 3))
    parts = [summed(model, batch) for batch in (one, three)]
    assert not any(bool(part["image"].detach()) for part in parts)
    first, second = (gradients(model, part["text"] + 5 * part["image"]) for part in parts)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
        if name.startswith(("image.", "head.edge.")):
            assert not bool(gradient.any()), name
    assert bool(first["blocks.0.attention.q.weight"].any())


@pytest.mark.parametrize("edge", Edge)
def test_every_part_learns_from_a_pack_with_text_and_images(edge: Edge) -> None:
    config = small(edge)
    model, layout = drawn(config), form(config)
    batch = prepared([document([1, IMAGE, 2, IMAGE], layout)], config)
    part = summed(model, batch)
    for name, gradient in gradients(model, part["text"] + part["image"]).items():
        assert bool(gradient.any()), name


def test_a_pictures_noise_depends_on_its_sample_alone() -> None:
    config = small()
    layout = form(config)
    a, b = document([1, IMAGE], layout), document([IMAGE, 2, IMAGE], layout)
    both = prepared([a, b], config, seeds=[11, 22])
    swapped = prepared([b, a], config, seeds=[22, 11], only=[1, 2, 0], total=60)
    assert torch.equal(both.inputs.fields["times"], swapped.inputs.fields["times"][[2, 0, 1]])
    assert torch.equal(both.inputs.hidden, swapped.inputs.hidden[[2, 0, 1]])
    assert len(set(both.inputs.fields["times"].tolist())) == 3
    other = prepared([a, b], config, seeds=[12, 22])
    assert not torch.equal(both.inputs.hidden[0], other.inputs.hidden[0])
    assert torch.equal(both.inputs.hidden[1:], other.inputs.hidden[1:])


def test_the_wanted_answer_reaches_the_loss() -> None:
    """With a head that answers 0 the loss of an image is the mean square of what was wanted."""
    config = small()
    model = drawn(config)
    for parameter in model["head"].edge.parameters():  # type: ignore[union-attr]
        parameter.data.zero_()
    batch = prepared([document([1, IMAGE, IMAGE], form(config))], config)
    wanted = batch.inputs.hidden.chunk(2, 1)[1]
    found = losses(model, batch.inputs)["image"]
    torch.testing.assert_close(found, wanted.square().mean((1, 2, 3)))


def test_what_is_written_behind_a_picture_was_trained_behind_its_clean_copy() -> None:
    """Training on copies and writing agree: words behind an image have the same logits."""
    config = shared(small(context=Context.copies, drop=0.0))
    model, layout = drawn(config, std=1.0), form(config)
    batch = prepared([document([1, IMAGE, 2, IMAGE, 3], layout)], config)
    flow = batch.inputs
    *body, head = model.values()
    for layer in body:
        flow = layer(flow)
    assert isinstance(head, TransfusionHead)
    logits = head.logits(flow.hidden)
    sampler = TransfusionSampler(config, model, layout)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    told = document([1, IMAGE, 2, IMAGE, 3], sampler.form)
    written = sampler.pack([Prompt(tuple(told), pixels)])
    expected = head.logits(sampler.hidden(written))
    words = [at for at, token in enumerate(told) if token != layout.image_slot]
    same = [at for at, t in enumerate(batch.inputs.fields["tokens"]) if t != layout.image_slot]
    torch.testing.assert_close(logits[same], expected[words], rtol=1e-4, atol=1e-4)


def test_images_weigh_what_their_time_and_the_limit_say() -> None:
    layout = form(small())
    documents = [document([1, IMAGE], layout), document([IMAGE, 2, IMAGE], layout)]
    plain = prepared(documents, small(answer=Answer.clean), dummies=1)
    limited = prepared(documents, small(answer=Answer.clean, snr_limit=20.0), dummies=1)
    assert plain.targets.weights["image"].tolist() == [1, 1, 1, 0]
    times = limited.inputs.fields["times"]
    kept = cosine_kept(1000)[times]
    wanted = (1 / (1 - kept)).clamp(max=20).float() * plain.targets.weights["image"]
    torch.testing.assert_close(limited.targets.weights["image"], wanted)
    assert torch.equal(limited.inputs.hidden, plain.inputs.hidden)


def test_tables_of_lines_and_columns_tell_equal_squares_apart() -> None:
    placed = replace(small(), image=replace(small().image, position_std=0.5))
    same, times = torch.ones(1, 3, 8, 8), torch.tensor([500])
    without, told = ImageIn(small()), ImageIn(placed)
    torch.nn.init.normal_(told.get_parameter("grid.lines"))
    torch.nn.init.normal_(told.get_parameter("grid.columns"))
    told.load_state_dict(without.state_dict(), strict=False)
    rows = without.rows(same, times)[0][0]
    torch.testing.assert_close(rows, rows[:1].expand_as(rows))
    places = (told.rows(same, times)[0][0] - rows).unflatten(0, (placed.image.side,) * 2)
    assert places.flatten(0, 1).unique(dim=0).shape[0] == placed.image.rows
    torch.testing.assert_close(places[0, 0] + places[1, 1], places[0, 1] + places[1, 0])


def switched(edge: Edge) -> TransfusionConfig:
    config = shared(small(edge))
    placed = config.image if edge is Edge.unet else replace(config.image, position_std=0.5)
    language = replace(config.language, qk_norm=QkNorm.layer)
    return replace(config, language=language, image=placed)


@pytest.mark.parametrize("edge", Edge)
def test_every_parameter_has_a_rule_and_every_pattern_a_name(edge: Edge) -> None:
    config = switched(edge)
    model = build_plain(config, "meta")
    shapes = {
        f"{la}.{n}": tuple(p.shape) for la, m in model.items() for n, p in m.named_parameters()
    }
    rules = TRANSFUSION.initial(config)
    for name, shape in shapes.items():
        assert draw_by_name(name, shape, rules, seed=0).shape == shape
    names = shapes.keys() | {f"{la}.{n}" for la, m in model.items() for n, _ in m.named_modules()}
    idle = [p for p in PLAN.rules if not any(compile_pattern(p).fullmatch(n) for n in names)]
    assert idle == ["blocks.*.attention.similarity.log_scale"]  # of cosine attention


@pytest.mark.parametrize("edge", Edge)
@pytest.mark.parametrize("context", [Context.noised, Context.copies])
def test_costs_are_the_operations_that_run(edge: Edge, context: Context) -> None:
    config = small(edge, context=context)
    model, layout = drawn(config), form(config)
    tokens = document([*[1] * 20, IMAGE, IMAGE], layout)
    batch = prepared([tokens], config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses(model, batch.inputs)
    length, language = len(tokens), config.language
    dense, triangle = length**2, length * (length + 1) // 2  # the counter takes masks for dense
    extra = 4.0 * (dense - triangle) * language.width * language.layers
    stated = sum(TRANSFUSION.flops(config, BatchShape(tokens=length, images=2)))
    assert stated + extra == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize(
    "place, changed",
    [
        ("model.image.size", {"image": {"size": 9}}),
        ("model.image.factor", {"image": {"factor": 8}}),
        ("model.image.channels", {"image": {"channels": 8}}),
        ("model.image.unet_channels", {"image": {"edge": Edge.unet, "unet_channels": (8,)}}),
        ("model.image.unet_channels", {"image": {"edge": Edge.unet, "unet_channels": ()}}),
        ("model.image.unet_channels", {"image": {"edge": Edge.unet, "unet_channels": (4, -4, 4)}}),
        ("model.image.latents", {"image": {"latents": "somewhere"}}),
        ("model.image.norm_groups", {"image": {"edge": Edge.unet, "norm_groups": 5}}),
        ("model.image.position_std", {"image": {"position_std": 0.0}}),
        ("model.noise.answer", {"noise": {"path": NoisePath.linear, "answer": Answer.epsilon}}),
        ("model.noise.snr_limit", {"noise": {"answer": Answer.epsilon, "snr_limit": 20.0}}),
        ("model.noise.snr_limit", {"noise": {"answer": Answer.clean, "snr_limit": 0.5}}),
        ("model.noise.limit", {"noise": {"limit": 2000}}),
        ("model.noise.drop", {"noise": {"drop": 1.0}}),
        ("model.noise.all_noised", {"noise": {"all_noised": 0.0}}),
        (
            "model.language.context",
            {"noise": {"context": Context.copies}, "language": {"context": 10}},
        ),
        ("model.noise.clean_limit", {"noise": {"clean_limit": 0.0}}),
        ("model.language.context", {"language": {"context": 8}}),
        ("model.language.width", {"language": {"heads": 3}}),
    ],
)
def test_faults_name_their_key(place: str, changed: dict[str, dict[str, object]]) -> None:
    config = small()
    assert not list(problems(config, 2))
    for section, values in changed.items():
        part = replace(getattr(config, section), **values)
        config = replace(config, **{section: part})
    found: list[Problem] = list(problems(config, 1))
    assert place in {problem.place for problem in found}


def test_tensor_ranks_must_divide_what_they_share() -> None:
    config = replace(small(), language=TrunkConfig(width=32, heads=4, layers=1, mlp_width=64))
    assert {p.place for p in problems(config, 5)} >= {"model.image.patch", "model.language.heads"}
