"""Promises of the whole fold: packing, dummies, detached targets, switches."""

from dataclasses import replace

import pytest
import torch
from small_emu import QUERIES, SIZE, document, drawn, packed, small
from torch import Tensor

from mmtrain.data.tokens import SequenceFormat
from mmtrain.models.emu.model import losses, parameters
from mmtrain.nn.flow import Flow
from mmtrain.nn.trunk import AttentionKind, QkNorm


def images(count: int) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def gradients(model: dict[str, torch.nn.Module], loss: Tensor) -> dict[str, Tensor]:
    named = parameters(model)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def test_packing_does_not_change_a_documents_losses(form: SequenceFormat) -> None:
    model, pixels = drawn(small()), images(3)
    documents = [document(0, 9, 1), document(1, 30, 0), document(2, 12, 2)]
    together = losses(model, packed(documents, pixels, form))
    alone = [
        losses(model, packed([d], pixels[cut], form))
        for d, cut in zip(documents, (slice(0, 1), slice(0, 0), slice(1, 3)), strict=True)
    ]
    for name in ("text", "image"):
        apart = torch.cat([values[name] for values in alone])
        torch.testing.assert_close(together[name], apart, atol=1e-5, rtol=1e-5)


def with_dummies(flow: Flow, count: int) -> Flow:
    """Append dummy images: their slots are the trash row, their pairs have row 0."""
    pad = torch.zeros(count * (QUERIES + 1), dtype=torch.int64)
    trash = torch.full((count * QUERIES,), len(flow.fields["tokens"]))
    extra = {"slots": trash, "carry": pad, "source": pad}
    fields = {n: torch.cat([f, extra[n]]) if n in extra else f for n, f in flow.fields.items()}
    return Flow(torch.cat([flow.hidden, torch.zeros(count, 3, SIZE, SIZE)]), fields)


def test_dummy_images_leave_text_gradients_bit_equal(form: SequenceFormat) -> None:
    """A text-only rank still runs the tower on one dummy: exact zeros there, text untouched."""
    model = drawn(small())
    flow = packed([document(0, 20, 0), document(1, 15, 0)], images(0), form)

    def run(inputs: Flow) -> dict[str, Tensor]:
        values = losses(model, inputs)
        return gradients(model, values["text"].sum() + 0.0 * values["image"].sum())

    dummy, none = run(with_dummies(flow, 2)), run(flow)
    trunk = [name for name in none if name.startswith(("embed", "blocks", "head"))]
    assert trunk and all(torch.equal(dummy[name], none[name]) for name in trunk)
    tower = [name for name in dummy if name.startswith(("vision", "causal"))]
    assert tower and not any(dummy[name].any() for name in tower)


def test_targets_are_detached_and_inputs_are_not(form: SequenceFormat) -> None:
    """The visual path learns from both losses, but only through what it feeds the trunk."""
    model = drawn(small())
    flow = packed([document(0, 6, 1)], images(1), form)
    for name in ("text", "image"):
        found = gradients(model, losses(model, flow)[name].sum())
        assert found["vision.stem.patch.weight"].any() and found["causal.queries"].any()
    # with the trunk's output cut off, nothing but the head is left to learn the regression
    body = dict(model)
    *layers, head = body.values()
    for layer in layers:
        flow = layer(flow)
    cut = head(replace(flow, hidden=flow.hidden.detach()))["image"].sum()
    assert gradients(model, cut).keys() == {"head.norm.weight", "head.regress.weight"}


def test_an_image_has_one_pair_more_than_visual_rows_and_no_text_loss(
    form: SequenceFormat,
) -> None:
    model = drawn(small())
    flow = packed([document(0, 6, 2)], images(2), form)
    values = losses(model, flow)
    assert values["image"].shape == (2 * (QUERIES + 1),) and bool((values["image"] > 0).all())
    is_image = torch.isin(flow.fields["tokens"], torch.tensor([41, 43]))
    assert not values["text"][is_image].any()
    begins = (flow.fields["tokens"] == 42).nonzero()[-1]
    assert values["text"][begins] > 0  # [/IMG] predicts the first word after the image


@pytest.mark.parametrize("attention", AttentionKind)
@pytest.mark.parametrize("qk_norm", QkNorm)
def test_every_switch_of_the_trunk_trains(
    form: SequenceFormat, qk_norm: QkNorm, attention: AttentionKind
) -> None:
    model = drawn(small(qk_norm=qk_norm, attention=attention))
    flow = packed([document(0, 12, 1)], images(1), form)
    values = losses(model, flow)
    found = gradients(model, values["text"].sum() + values["image"].sum())
    assert found.keys() == parameters(model).keys()
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert found["blocks.0.attention.q.weight"].any()


def test_bfloat16_weights_keep_a_bfloat16_stream_and_float32_losses(form: SequenceFormat) -> None:
    config = small()
    model = {name: layer.bfloat16() for name, layer in drawn(config).items()}
    flow = packed([document(0, 12, 1)], images(1), form)
    exact, rounded = losses(drawn(config), flow), losses(model, replace(flow, derived={}))
    for name, value in rounded.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.mean(), exact[name].mean(), atol=0.1, rtol=0.05)
