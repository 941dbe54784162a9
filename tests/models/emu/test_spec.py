"""What Emu declares: every parameter drawn and planned, costs exact, faults together."""

import math
from dataclasses import replace

import pytest
import torch
from small_emu import QUERIES, SIZE, document, drawn, packed, small
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.data.tokens import SequenceFormat
from mmtrain.layout.plan import Cut, compile_pattern
from mmtrain.models.emu.config import EmuConfig
from mmtrain.models.emu.model import build_plain, losses, parameters
from mmtrain.models.emu.spec import EMU, PLAN, TRUNK_LINEARS
from mmtrain.models.families import FAMILIES
from mmtrain.models.spec import BatchShape
from mmtrain.nn.init import draw_by_name
from mmtrain.nn.lora import LoraConfig
from mmtrain.nn.trunk import AttentionKind, QkNorm
from mmtrain.settings import Phase


def full_switches() -> EmuConfig:
    config = small(qk_norm=QkNorm.layer, attention=AttentionKind.cosine)
    return replace(config, lora=LoraConfig(rank=2, targets=TRUNK_LINEARS))


def test_every_parameter_has_an_initial_rule_and_every_rule_a_parameter() -> None:
    config = full_switches()
    shapes = {n: tuple(p.shape) for n, p in parameters(build_plain(config, "meta")).items()}
    rules = EMU.initial(config)
    for name, shape in shapes.items():
        assert draw_by_name(name, shape, rules, seed=0).shape == shape
    for pattern, _ in rules:
        assert any(compile_pattern(pattern).fullmatch(name) for name in shapes), pattern


def test_initial_weights_have_the_spreads_of_the_reference() -> None:
    config = EmuConfig()
    rules = EMU.initial(config)
    expected = {
        "vision.blocks.7.attention.q.weight": 0.02 * 0.8796,  # truncated at two deviations
        "vision.blocks.7.mlp.down.weight": 0.02 * 0.8796 / math.sqrt(16),
        "vision.stem.patch.weight": 588**-0.5 / math.sqrt(3),
        "causal.blocks.0.cross_attention.q.weight": (768 * 64) ** -0.5,
        "causal.blocks.0.self_attention.out.weight": 768**-0.5,
        "causal.blocks.0.mlp.down.weight": 3072**-0.5,
        "causal.queries": 0.02,
        "causal.projection.weight": 768**-0.5 / math.sqrt(3),
        "blocks.3.attention.out.weight": 0.02,
        "head.regress.weight": 5120**-0.5 / math.sqrt(3),
    }
    for name, std in expected.items():
        found = float(draw_by_name(name, (300, 300), rules, seed=1).std())
        assert found == pytest.approx(std, rel=0.02), name


def test_positions_and_queries_begin_as_large_as_the_recipe_says() -> None:
    config = small()
    config = replace(
        config,
        vision=replace(config.vision, position_std=0.5),
        causal=replace(config.causal, query_std=0.3),
    )
    for name, std in {"vision.stem.position": 0.5 * 0.8796, "causal.queries": 0.3}.items():
        found = float(draw_by_name(name, (300, 300), EMU.initial(config), seed=1).std())
        assert found == pytest.approx(std, rel=0.02), name


def test_every_pattern_of_the_plan_names_something() -> None:
    model = build_plain(full_switches(), "meta")
    modules = {f"{layer}.{name}" for layer, m in model.items() for name, _ in m.named_modules()}
    names = modules | parameters(model).keys()
    for pattern in PLAN.rules:
        assert any(compile_pattern(pattern).fullmatch(name) for name in names), pattern


def test_every_entrance_and_projection_is_planned() -> None:
    model = build_plain(full_switches(), "meta")
    for layer, module in model.items():
        for name, part in module.named_modules():
            fqn = f"{layer}.{name}"
            if name.endswith(("enter", "enter_memory")) or (
                isinstance(part, torch.nn.Linear | torch.nn.Embedding) and "causal.proj" not in fqn
            ):
                assert PLAN.cut(fqn) is not None, fqn


def test_slices_of_the_plan_divide_the_release_over_two_ranks_and_four() -> None:
    shapes = {n: p.shape for n, p in parameters(build_plain(EmuConfig(), "meta")).items()}
    split = {name: cut for name in shapes if (cut := PLAN.slice_of(name))}
    for name, cut in split.items():
        assert cut.padded or shapes[name][cut.dim] % 4 == 0, name
    whole = sum(shapes[n].numel() for n in shapes.keys() - split.keys())
    # norms, the tower's patches and positions, the projection (3.9 million) and row biases
    assert whole < 7e6
    assert PLAN.cut("blocks.0.norm1.weight") is Cut.ROWWISE


@pytest.mark.parametrize("targets", [(), ("q", "k", "v", "out"), TRUNK_LINEARS])
def test_costs_are_the_operations_that_run(form: SequenceFormat, targets: tuple[str, ...]) -> None:
    """Against torch's own counter; the text is one document that fills the pack."""
    rank = 3 if targets else 0
    config = replace(small(kv_heads=2), lora=LoraConfig(rank=rank, dropout=0, targets=targets))
    model, words = drawn(config), 40
    tokens = document(0, words, 2)
    flow = packed([tokens], torch.randn(2, 3, SIZE, SIZE), form)
    # not every torch counts its fused attention on a CPU (2.15 does, 2.14 does not)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses(model, flow)
    length = len(tokens)
    dense, triangle = length**2, length * (length + 1) // 2
    language = config.language
    # the counter takes causal attention for dense
    extra = 4.0 * (dense - triangle) * language.width * language.layers
    stated = sum(EMU.flops(config, BatchShape(tokens=length, images=2)))
    assert stated + extra == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_a_cost_is_given_for_each_layer_of_the_release() -> None:
    config = EmuConfig()
    costs = EMU.flops(config, BatchShape(tokens=2048, images=8))
    assert len(costs) == len(EMU.layers(config)) == 1 + 40 + 1 + 1 + 1 + 40 + 1
    trunk = sum(costs[-41:-1])
    assert trunk == pytest.approx(
        2 * 2048 * 12.6878e9, rel=0.04
    )  # 2 x tokens x weights + attention


def test_all_faults_of_a_model_section_are_reported_together() -> None:
    config = EmuConfig()
    bad = replace(
        config,
        vision=replace(config.vision, image_size=225, heads=15),
        language=replace(config.language, width=5121, context=30, layers=0),
    )
    places = [problem.place for problem in EMU.problems(bad, 2)]
    assert {
        "model.vision.image_size",
        "model.vision.width",
        "model.vision.heads",
        "model.language.width",
        "model.language.context",
        "model.language.layers",
    } <= set(places)


def test_a_tensor_size_that_does_not_divide_the_heads_is_told_what_does() -> None:
    assert list(EMU.problems(EmuConfig(), 4)) == []
    (fault,) = EMU.problems(EmuConfig(), 8)
    assert fault.place == "model.causal.heads"
    assert "does not divide 12; it may be 1, 2, 3, 4, 6, 12" in fault.text


def test_the_sequence_format_follows_the_model(form: SequenceFormat) -> None:
    assert FAMILIES["emu"][Phase.pretrain] is FAMILIES["emu"][Phase.instruct] is EMU
    assert form.group_length == QUERIES + 2 and form.image_size == SIZE
    assert (form.image_begin, form.image_slot, form.image_end) == (41, 43, 42)
