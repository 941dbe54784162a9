"""Adapters as the paper states them, and a dropout that is a function of place and document."""

import math

import pytest
import torch
from torch import Tensor, nn

from mmtrain.nn.init import draw_by_name
from mmtrain.nn.lora import (
    Adapter,
    HashedDropout,
    LoraConfig,
    adapted,
    adapted_weights,
    adapters,
    initial_rules,
    is_adapter,
    merged,
    no_adapter,
)
from mmtrain.nn.noise import RowNoise, mix, row_numbers, seed_of

DOCUMENTS, LENGTH, CHANNELS, RATE = 40, 100, 256, 0.1


def rows(documents: int = DOCUMENTS, length: int = LENGTH) -> Tensor:
    return torch.cat([row_numbers(seed_of("sample", d), length) for d in range(documents)])


def dropped(salt: str = "q", rate: float = RATE, rows_T: Tensor | None = None) -> Tensor:
    noise = RowNoise(rows() if rows_T is None else rows_T)
    return noise.chosen(seed_of(salt), range(CHANNELS), rate)


def drawn_adapter(config: LoraConfig) -> Adapter:
    torch.manual_seed(0)
    made = Adapter(6, 10, config, "blocks.0.attention.q_lora")
    nn.init.normal_(made.b.weight)
    return made


# --- adapters ------------------------------------------------------------------------------


def test_an_adapter_adds_alpha_over_r_times_b_a_x() -> None:
    config = LoraConfig(rank=3, alpha=12.0, dropout=0.5)
    base, adapter, x = nn.Linear(6, 10, bias=False), drawn_adapter(config).eval(), torch.randn(4, 6)
    expected = x @ (base.weight + 4.0 * adapter.b.weight @ adapter.a.weight).T
    torch.testing.assert_close(adapted(base, adapter, x, None), expected)
    assert torch.equal(adapted(base, None, x, None), base(x))


def test_merged_weights_give_what_the_adapter_gives() -> None:
    config = LoraConfig(rank=3, alpha=12.0)
    base, adapter = nn.Linear(6, 10, bias=False), drawn_adapter(config).eval()
    found = {
        "blocks.0.attention.q.weight": base.weight.data,
        "blocks.0.attention.q_lora.a.weight": adapter.a.weight.data,
        "blocks.0.attention.q_lora.b.weight": adapter.b.weight.data,
        "blocks.0.attention.k.weight": torch.ones(2, 2),
    }
    whole, x = merged(found, config.scale), torch.randn(4, 6)
    assert list(whole) == ["blocks.0.attention.q.weight", "blocks.0.attention.k.weight"]
    torch.testing.assert_close(
        x @ whole["blocks.0.attention.q.weight"].T, adapted(base, adapter, x, None)
    )
    assert torch.equal(whole["blocks.0.attention.k.weight"], torch.ones(2, 2))


def test_names_tell_adapters_from_base_weights() -> None:
    base, a, b = (f"blocks.1.mlp.down{end}.weight" for end in ("", "_lora.a", "_lora.b"))
    assert [is_adapter(name) for name in (base, a, b)] == [False, True, True]
    assert adapted_weights([base, a, b, "head.norm.weight"]) == {base: (a, b)}


def test_only_targets_get_adapters_and_none_when_the_rank_is_zero() -> None:
    linear = nn.Linear(6, 10)
    some, none = (adapters(LoraConfig(rank=rank, targets=("q",)), "x") for rank in (2, 0))
    made = some("q", linear)
    assert made is not None and (made.a.weight.shape, made.b.weight.shape) == ((2, 6), (10, 2))
    assert some("k", linear) is none("q", linear) is no_adapter("q", linear) is None


def test_a_is_drawn_as_kaiming_uniform_and_b_is_zero() -> None:
    rules = initial_rules("blocks.*.attention.q", 64)
    a = draw_by_name("blocks.0.attention.q_lora.a.weight", (16, 64), rules, seed=0)
    reference = torch.empty(16, 64)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    assert a.abs().max() <= 64**-0.5 and float(a.std()) == pytest.approx(
        float(reference.std()), rel=0.05
    )
    assert not draw_by_name("blocks.0.attention.q_lora.b.weight", (64, 16), rules, seed=0).any()


# --- dropout -------------------------------------------------------------------------------


def test_a_share_is_zeroed_and_the_rest_scaled_in_training_alone() -> None:
    drop = HashedDropout(range(CHANNELS), RATE, seed_of("q"))
    x_TD = torch.ones(DOCUMENTS * LENGTH, CHANNELS)
    out = drop(x_TD, RowNoise(rows()))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - RATE)])
    assert float(out.mean()) == pytest.approx(1.0, abs=0.002)
    assert torch.equal(out == 0, dropped())
    assert drop.eval()(x_TD, None) is x_TD
    with pytest.raises(AssertionError, match="field `noise`"):
        drop.train()(x_TD, None)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_rate_holds_over_all_over_rows_and_over_channels(rate: float) -> None:
    mask = dropped(rate=rate).double() - rate
    variance = rate * (1 - rate)
    count = mask.numel()
    assert abs(float(mask.sum())) < 4 * math.sqrt(count * variance)
    for dim in (0, 1):  # sums over one dim scatter as independent entries would
        sums = mask.sum(dim)
        spread = float(sums.var()) / (mask.shape[dim] * variance)
        assert spread == pytest.approx(1.0, abs=4 * math.sqrt(2 / len(sums)))


def test_rows_channels_layers_and_documents_are_independent() -> None:
    mask = dropped().double() - RATE
    variance, count = RATE * (1 - RATE), mask.numel()

    def score(left: Tensor, right: Tensor) -> float:
        return float((left * right).sum()) / (variance * math.sqrt(count))

    pairs = {
        "layers": (mask, dropped("k").double() - RATE),
        "seeds": (mask, dropped(rows_T=rows() + 1).double() - RATE),
        "rows": (mask[1:], mask[:-1]),
        "documents": (mask[LENGTH:], mask[:-LENGTH]),
        "channels": (mask[:, 1:], mask[:, :-1]),
        "far channels": (mask[:, 64:], mask[:, :-64]),
    }
    for name, (left, right) in pairs.items():
        assert abs(score(left, right)) < 4, name
    # all pairs of channels: as many extremes as independent ones have
    scores = (mask.T @ mask) / (variance * math.sqrt(len(mask)))
    upper = scores[tuple(torch.triu_indices(CHANNELS, CHANNELS, 1))]
    assert float(upper.var()) == pytest.approx(1.0, abs=0.05)


def test_a_row_keeps_its_mask_wherever_it_lies() -> None:
    whole = dropped()
    moved = dropped(rows_T=torch.cat([torch.zeros(7).long(), rows()[LENGTH : 2 * LENGTH]]))
    assert torch.equal(moved[7:], whole[LENGTH : 2 * LENGTH])


def test_parts_of_the_channels_drop_what_the_whole_drops() -> None:
    whole = HashedDropout(range(CHANNELS), RATE, 5)
    noise, x = RowNoise(rows(2)), torch.ones(2 * LENGTH, CHANNELS)
    parts = [whole.part(rank, 4)(x[:, : CHANNELS // 4], noise) for rank in range(4)]
    assert torch.equal(torch.cat(parts, 1), whole(x, noise))


def test_mixing_loses_nothing_and_every_bit_counts() -> None:
    numbers = torch.arange(-5000, 5000)
    assert len(mix(numbers).unique()) == len(numbers)
    for bit in range(64):  # about half of all bits change with any one
        flipped = mix(numbers) ^ mix(numbers ^ (1 << bit if bit < 63 else -(1 << 63)))
        ones = sum(((flipped >> k) & 1).double().mean() for k in range(64))
        assert float(ones) == pytest.approx(32, abs=0.5), bit


def test_numbers_of_rows_are_those_of_splitmix64() -> None:
    """Steele et al. 2014, in whole numbers: the same on every platform and device."""
    mask, seed = (1 << 64) - 1, seed_of(1, "a")
    assert seed == 5929356027447281426
    for position, found in enumerate(row_numbers(seed, 5).tolist()):
        z = (seed + position * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        assert (z ^ (z >> 31)) == found & mask
