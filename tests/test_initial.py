"""A run's first weights: another run's, with adapters and rows of new tokens made where missing."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtrain.errors import ContentError
from mmtrain.initial import NewRow, Start

TABLE, OTHER = "embed.tokens.weight", "blocks.0.attention.q.weight"
A, B = (f"blocks.0.attention.q_lora.{part}.weight" for part in "ab")


class Given:
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


def start(
    found: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    likened: dict[int, NewRow] | None = None,
) -> Start:
    return Start(
        Path("base"),
        Given(found),
        (TABLE,),
        likened or {},
        shapes,
        lambda name, shape: torch.full(shape, 7.0),
    )


def test_everything_that_fits_is_taken_as_it_is() -> None:
    found = {TABLE: torch.randn(5, 3), OTHER: torch.randn(3, 3).bfloat16()}
    same = start(found, {TABLE: (5, 3), OTHER: (3, 3)})
    same.check()
    assert all(same.tensor(name, tuple(t.shape)) is t for name, t in found.items())


def test_adapters_are_drawn_when_the_start_has_none() -> None:
    base = start({OTHER: torch.zeros(3, 3)}, {OTHER: (3, 3), A: (2, 3), B: (3, 2)})
    base.check()
    assert torch.equal(base.tensor(A, (2, 3)), torch.full((2, 3), 7.0))


def test_adapters_of_the_start_are_used_and_must_be_all() -> None:
    found = {OTHER: torch.zeros(3, 3), A: torch.ones(2, 3)}
    with pytest.raises(ContentError, match=r"q_lora\.b\.weight: None instead of \(3, 2\)"):
        start(found, {OTHER: (3, 3), A: (2, 3), B: (3, 2)}).check()
    found[B] = torch.ones(3, 2)
    base = start(found, {OTHER: (3, 3), A: (2, 3), B: (3, 2)})
    base.check()
    assert base.tensor(A, (2, 3)) is found[A]
    with pytest.raises(ContentError, match=r"a\.weight and 1 more: adapters that the model does"):
        start(found, {OTHER: (3, 3)}).check()


def test_new_rows_are_means_of_a_word_or_of_all_rows(caplog: pytest.LogCaptureFixture) -> None:
    table = torch.arange(12.0).view(4, 3)
    likened = {5: NewRow("[USER]", "user", (1, 3)), 0: NewRow("<s>", "user", (1,))}
    base = start({TABLE: table.bfloat16()}, {TABLE: (6, 3)}, likened)
    base.check()
    rows = base.tensor(TABLE, (6, 3))
    assert rows.dtype == torch.bfloat16 and torch.equal(rows[:4], table.bfloat16())
    assert torch.equal(rows[4].float(), table.mean(0))
    assert torch.equal(rows[5].float(), (table[1] + table[3]) / 2)
    with caplog.at_level(logging.INFO, "mmtrain"):
        logging.getLogger("mmtrain").propagate = True
        base.describe()
    assert "rows 4 to 5 are means of rows; [USER] like 'user'" in caplog.text
    assert "base has rows for <s> already" in caplog.text


def test_a_word_that_has_no_row_itself_cannot_be_likened_to() -> None:
    base = start({TABLE: torch.zeros(4, 3)}, {TABLE: (6, 3)}, {5: NewRow("[U]", "u", (4,))})
    with pytest.raises(ContentError, match=r"no row for 'u', which train\.new_rows names for"):
        base.check()


def test_all_that_does_not_fit_is_said_at_once() -> None:
    found = {TABLE: torch.zeros(6, 3), "vision.stem.cls": torch.zeros(2)}
    with pytest.raises(ContentError) as fault:
        start(found, {TABLE: (5, 3), OTHER: (3, 3)}).check()
    text = str(fault.value)
    assert "embed.tokens.weight: (6, 3) instead of (5, 3)" in text  # rows are never dropped
    assert "blocks.0.attention.q.weight: None instead of (3, 3)" in text
    assert "vision.stem.cls: not a parameter of the model" in text
