"""What crosses a stage boundary comes back, and derived tables are made once."""

import torch

from mmtrain.nn.flow import Flow


def test_a_packed_flow_unpacks_to_itself() -> None:
    fields = {"tokens": torch.arange(5), "carry": torch.tensor([1, 2])}
    flow = Flow(torch.randn(5, 3), fields, torch.randn(2, 3))
    packed = flow.pack()
    assert [x.is_floating_point() for x in packed] == [True, False, False]
    again = Flow.unpack(packed, tuple(fields))
    assert torch.equal(again.hidden, flow.hidden)
    assert flow.carried is not None and again.carried is not None
    assert torch.equal(again.carried, flow.carried)


def test_rows_inside_an_encoder_are_not_mistaken_for_carried_ones() -> None:
    flow = Flow(torch.randn(2, 3, 4), {"carry": torch.tensor([1, 2])})
    again = Flow.unpack(flow.pack(), ("carry",))
    assert again.carried is None and torch.equal(again.hidden, flow.hidden)


def test_derived_values_are_made_once_for_all_layers_of_a_stage() -> None:
    made: list[int] = []
    flow = Flow(torch.zeros(1), {})
    for _ in range(3):
        flow = flow.with_hidden(flow.hidden + 1)
        assert flow.derive("table", lambda: made.append(1) or 7) == 7
    assert made == [1]
    assert Flow.unpack(flow.pack(), ()).derived == {}
