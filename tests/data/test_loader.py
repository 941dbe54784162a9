"""A step is a pure function of its number, whatever ranks, accumulation and workers."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from made import document, kept_source, png
from torch import Tensor

from mmtrain.data import images
from mmtrain.data.assemble import Assembler
from mmtrain.data.batch import Batch
from mmtrain.data.document import Document
from mmtrain.data.loader import Loader, Workers, _take, heldout_batches
from mmtrain.data.mixture import Mixture, OnePass, Source
from mmtrain.data.pack import Plan
from mmtrain.data.rules import Rule, RuleOptions
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import ContentError, RecipeError, StorageError

TOKENS = 96
Make = Callable[..., Loader]


def plan_of(draws: Mixture | OnePass, layout: SequenceFormat) -> Plan:
    return Plan(
        draws,
        group_length=layout.group_length,
        pack_tokens=TOKENS,
        pack_images=6,
        window_documents=64,
        seed=0,
    )


@pytest.fixture
def make(sources: list[Source], vocabulary: Vocabulary, layout: SequenceFormat) -> Make:
    def build(workers: int = 0, **options: int) -> Loader:
        assembler = Assembler(
            sources=sources,
            vocabulary=vocabulary,
            layout=layout,
            pack_tokens=TOKENS,
            image_slots=6 * options.get("micro_batch_packs", 1),
        )
        options.setdefault("micro_batch_packs", 1)
        plan = plan_of(Mixture(sources, seed=1), layout)
        return Loader(
            plan, assembler, global_batch_packs=8, workers=Workers(count=workers), **options
        )

    return build


def same(one: Batch, other: Batch) -> bool:
    tensors: list[tuple[Tensor, Tensor]] = [(one.inputs.hidden, other.inputs.hidden)]
    for name, field in one.inputs.fields.items():
        tensors.append((field, other.inputs.fields[name]))
    for name, weights in one.targets.weights.items():
        tensors.append((weights, other.targets.weights[name]))
        tensors.append((one.targets.origins[name], other.targets.origins[name]))
    return one.info == other.info and all(a.equal(b) for a, b in tensors)


@pytest.mark.parametrize("ranks, micro", [(1, 1), (1, 8), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_a_step_holds_the_same_packs_on_any_number_of_ranks(
    make: Make, ranks: int, micro: int
) -> None:
    for step in (0, 3):
        batches = [
            batch
            for rank in range(ranks)
            for batch in make(data_rank=rank, data_ranks=ranks, micro_batch_packs=micro).step(step)
        ]
        numbers = [number for batch in batches for number in batch.info.pack_numbers]
        assert numbers == list(range(8 * step, 8 * step + 8))
        whole = make(micro_batch_packs=8).step(step)[0]
        samples = tuple(name for batch in batches for name in batch.info.sample_ids)
        assert samples == whole.info.sample_ids
        for loss in ("text", "image"):
            counted = sum(float(batch.targets.weights[loss].sum()) for batch in batches)
            assert counted == float(whole.targets.weights[loss].sum()) > 0


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_and_resuming_change_nothing(make: Make, workers: int) -> None:
    straight = make(micro_batch_packs=2)
    expected = [straight.step(step) for step in range(6)]
    resumed = make(micro_batch_packs=2, workers=workers, start_step=3)
    steps = resumed.steps()
    for step in range(3, 6):
        assert all(same(a, b) for a, b in zip(expected[step], next(steps), strict=True))
    resumed.close()


def test_steps_can_be_asked_for_in_any_order(make: Make) -> None:
    loader = make()
    expected = [loader.step(step) for step in range(4)]
    for step in (2, 0, 3, 1):
        assert all(same(a, b) for a, b in zip(expected[step], loader.step(step), strict=True))


def test_loading_leaves_the_random_numbers_of_the_model_alone(make: Make) -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    for workers in (0, 1):
        torch.manual_seed(0)
        loader = make(workers=workers)
        loader.step(0)
        loader.close()
        assert torch.rand(4).equal(expected)


def test_a_mark_lets_a_later_run_start_at_its_step(make: Make) -> None:
    first = make()
    mark = first.mark(12)
    later = make(start_step=12)
    later.plan.seek(mark)
    expected = make().step(12)
    assert all(same(a, b) for a, b in zip(expected, later.step(12), strict=True))


def test_a_batch_that_ranks_cannot_share_is_a_fault_of_the_recipe(make: Make) -> None:
    with pytest.raises(RecipeError, match=r"global_batch_packs: 8 is no multiple of 3 data ranks"):
        make(data_rank=0, data_ranks=3)


def broken_loader(
    vocabulary: Vocabulary,
    layout: SequenceFormat,
    share: float,
    broken: int = 3,
    spoilt: bytes | None = None,
) -> Loader:
    whole = png((9, 99, 200))
    documents = [
        document(f"d{index}", "a red circle", (spoilt or whole[:-30]) if index < broken else whole)
        for index in range(40)
    ]
    options = RuleOptions(rule=Rule.document, max_positions=TOKENS)
    source = kept_source("pages", documents, vocabulary, options)
    assembler = Assembler(
        sources=[source], vocabulary=vocabulary, layout=layout, pack_tokens=TOKENS
    )
    plan = plan_of(Mixture([source], seed=0), layout)
    return Loader(plan, assembler, global_batch_packs=4, micro_batch_packs=4, decode_failures=share)


def test_broken_pictures_are_counted_and_logged_once(
    vocabulary: Vocabulary, layout: SequenceFormat, caplog: pytest.LogCaptureFixture
) -> None:
    loader = broken_loader(vocabulary, layout, share=0.01)
    for step in range(3):
        loader.step(step)
    assert loader.failures == {("pages", "truncated"): loader.failures.total()}
    assert loader.failures.total() >= 3 and len(caplog.records) == 1
    assert "source pages sample d" in caplog.text


def test_a_picture_with_too_many_pixels_is_counted_like_a_broken_one(
    vocabulary: Vocabulary,
    layout: SequenceFormat,
    caplog: pytest.LogCaptureFixture,
    huge_png: bytes,
) -> None:
    loader = broken_loader(vocabulary, layout, share=0.01, spoilt=huge_png)
    for step in range(3):
        loader.step(step)
    assert loader.failures == {("pages", images.TOO_LARGE): loader.failures.total()}
    assert loader.failures.total() >= 3 and len(caplog.records) == 1
    assert "source pages sample d" in caplog.text


def test_too_many_broken_pictures_end_the_run(
    vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    loader = broken_loader(vocabulary, layout, share=0.002)
    with pytest.raises(
        ContentError,
        match=r"source pages: \d+ of \d+ documents cannot be used \(truncated \d+; the last "
        r"one: d\d+\).*"
        r"raise data\.sources\.pages\.decode_failures",
    ):
        for step in range(20):
            loader.step(step)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_reaches_the_rank_as_it_is(
    sources: list[Source], vocabulary: Vocabulary, layout: SequenceFormat, workers: int
) -> None:
    class Damaged:
        def document(self, number: int) -> Document:
            raise ContentError(f"shard of document {number} is damaged")

    broken = [replace(source, documents=Damaged()) for source in sources]
    assembler = Assembler(sources=broken, vocabulary=vocabulary, layout=layout, pack_tokens=TOKENS)
    plan = plan_of(Mixture(broken, seed=0), layout)
    loader = Loader(
        plan, assembler, global_batch_packs=1, micro_batch_packs=1, workers=Workers(count=workers)
    )
    with pytest.raises(ContentError, match=r"^shard of document \d+ is damaged$"):
        loader.step(0)


def test_a_hanging_worker_is_a_fault_worth_a_retry(
    sources: list[Source], vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    class Hanging:
        def document(self, number: int) -> Document:
            time.sleep(2)
            raise AssertionError("never")

    hanging = [replace(source, documents=Hanging()) for source in sources]
    plan = plan_of(Mixture(hanging, seed=0), layout)
    assembler = Assembler(sources=hanging, vocabulary=vocabulary, layout=layout, pack_tokens=TOKENS)
    loader = Loader(
        plan,
        assembler,
        global_batch_packs=1,
        micro_batch_packs=1,
        workers=Workers(count=1, timeout_seconds=0.5),
    )
    with pytest.raises(StorageError, match="gone or hangs: DataLoader timed out"):
        loader.step(0)
    loader.close()


def test_torch_s_word_for_a_killed_worker_is_understood() -> None:
    """Not by killing one: torch raises from a signal handler, wherever the process is."""

    def results() -> Iterator[Any]:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        yield

    with pytest.raises(StorageError, match="a data worker is gone or hangs: DataLoader worker"):
        _take(results())


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "refused"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_is_one_too(error: Exception) -> None:
    def results() -> Iterator[Any]:
        raise error
        yield

    with pytest.raises(StorageError, match=f"a data worker is gone, .*: {type(error).__name__}"):
        _take(results())


@pytest.mark.parametrize("ranks, micro", [(1, 1), (2, 1), (3, 2), (4, 1)])
def test_held_out_packs_come_once_and_every_rank_gets_as_many(
    sources: list[Source], vocabulary: Vocabulary, layout: SequenceFormat, ranks: int, micro: int
) -> None:
    source = sources[0]
    assembler = Assembler(
        sources=[source],
        vocabulary=vocabulary,
        layout=layout,
        pack_tokens=TOKENS,
        image_slots=6 * micro,
    )
    plan = plan_of(OnePass(source), layout)
    shares = [
        list(
            heldout_batches(
                plan,
                assembler,
                packs=9999,
                micro_batch_packs=micro,
                data_rank=rank,
                data_ranks=ranks,
            )
        )
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    samples = [name for share in shares for batch in share for name in batch.info.sample_ids]
    assert len(samples) == len(set(samples)) == len(source.lengths)
    some = heldout_batches(plan, assembler, packs=2, micro_batch_packs=micro)
    assert sum(bool(batch.info.sample_ids) for batch in some) == -(-2 // micro)


def test_what_torch_pins_is_the_same_batch_and_the_same_counts(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU nothing can be pinned, so a copy stands for it."""
    loader = make()
    made = loader.assembler.batch([loader.plan.pack(0)])
    pinned: list[Tensor] = []

    def copy(tensor: Tensor, *_: object) -> Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", copy)
    found = torch.utils.data._utils.pin_memory.pin_memory(made)
    assert same(found.batch, made.batch) and found.planned == made.planned
    assert any(tensor is made.batch.inputs.hidden for tensor in pinned)
