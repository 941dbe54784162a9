"""Tokens, masks, labels and regression pairs of a pack are those of the Emu release."""

from dataclasses import replace

import pytest
import torch
from made import document, kept_source, png

from mmtrain.data.assemble import Assembler, Failure
from mmtrain.data.batch import Batch
from mmtrain.data.document import Document
from mmtrain.data.images import decode
from mmtrain.data.mixture import Mixture, OnePass, Source
from mmtrain.data.pack import PackPlan, Plan
from mmtrain.data.packed import FIELDS, NO_LABEL
from mmtrain.data.rules import Rule, RuleOptions
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import ContentError
from mmtrain.nn.flow import CARRY
from mmtrain.nn.noise import row_numbers

OPTIONS = RuleOptions(rule=Rule.document, max_images=4, max_positions=32)
RED, BLUE = png((255, 0, 0)), png((0, 0, 255))


def plan_of(draws: OnePass | Mixture, layout: SequenceFormat, tokens: int = 32) -> Plan:
    return Plan(
        draws,
        group_length=layout.group_length,
        pack_tokens=tokens,
        pack_images=6,
        window_documents=64,
        seed=0,
    )


def assembled(
    documents: list[Document],
    vocabulary: Vocabulary,
    layout: SequenceFormat,
    tokens: int = 32,
    **options: object,
) -> tuple[Batch, tuple[Failure, ...], int]:
    """The first pack of documents as a micro-batch."""
    source = kept_source("pages", documents, vocabulary, OPTIONS)
    plan = plan_of(OnePass(source), layout, tokens)
    assembler = Assembler(
        sources=[source],
        vocabulary=vocabulary,
        layout=layout,
        pack_tokens=tokens,
        **options,  # type: ignore[arg-type]
    )
    return assembler.batch([plan.pack(0)])


def test_one_image_and_its_text_by_hand(vocabulary: Vocabulary, layout: SequenceFormat) -> None:
    """`<s> a red circle [IMG] z z z [/IMG] and </s>` and four rows of padding."""
    batch, _, _ = assembled(
        [document("x", "a red circle", RED, "and")], vocabulary, layout, tokens=15
    )
    a, red, circle = vocabulary.encode("a red circle")
    (word,) = vocabulary.encode("and")
    pad, slot = layout.pad, layout.image_slot
    begin, end, no = layout.image_begin, layout.image_end, NO_LABEL
    fields = {name: field.tolist() for name, field in batch.inputs.fields.items()}
    sequence = [layout.bos, a, red, circle, begin, slot, slot, slot, end, word, layout.eos]
    assert tuple(fields) == FIELDS
    assert fields["tokens"] == [*sequence, pad, pad, pad, pad]
    assert fields["positions"] == [*range(11), 0, 0, 0, 0]
    assert fields["lo"] == [*[0] * 11, 11, 12, 13, 14]
    assert fields["hi"] == list(range(1, 16))
    # nothing learns to emit an image token; the row of [/IMG] learns the text after it; </s> is
    # learnt, and has nothing to learn
    learnt = [a, red, circle, no, no, no, no, no, word, layout.eos, no]
    assert fields["labels"] == [*learnt, no, no, no, no]
    assert fields["slots"] == [5, 6, 7]
    assert fields["source"] == [4, 5, 6, 7]  # [IMG] and every <image>
    assert fields[CARRY] == [5, 6, 7, 8]  # every <image> and [/IMG]
    weights = batch.targets.weights
    assert weights["text"].tolist() == [float(label != no) for label in fields["labels"]]
    assert weights["image"].tolist() == [1.0] * 4
    assert all(field.dtype == torch.int64 for field in batch.inputs.fields.values())
    assert batch.inputs.hidden.shape == (1, 3, 28, 28) and batch.info.images == 1
    assert batch.info.tokens == 11 and batch.info.sample_ids == ("x",)


def test_documents_of_a_pack_see_only_themselves(
    sources: list[Source], vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    plan = plan_of(Mixture(sources, seed=0), layout, tokens=128)
    assembler = Assembler(sources=sources, vocabulary=vocabulary, layout=layout, pack_tokens=128)
    for number in range(10):
        batch, _, _ = assembler.batch([plan.pack(number)])
        fields = batch.inputs.fields
        start = 0
        for planned in plan.pack(number).documents:
            stop = start + planned.selection.positions
            assert fields["lo"][start:stop].eq(start).all()
            assert fields["tokens"][start] == layout.bos
            assert fields["tokens"][stop - 1] == layout.eos
            assert fields["positions"][start:stop].tolist() == list(range(stop - start))
            assert batch.targets.origins["text"][start:stop].eq(planned.source).all()
            start = stop
        assert fields["tokens"][start:].eq(layout.pad).all()
        assert fields["hi"].tolist() == list(range(1, 129))
        forbidden = [
            layout.bos,
            layout.pad,
            layout.image_begin,
            layout.image_slot,
            layout.image_end,
        ]
        assert not torch.isin(fields["labels"], torch.tensor(forbidden)).any()


def test_slots_and_pairs_point_at_their_tokens_in_merged_packs(
    sources: list[Source], vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    plan = plan_of(Mixture(sources, seed=0), layout, tokens=128)
    assembler = Assembler(
        sources=sources, vocabulary=vocabulary, layout=layout, pack_tokens=128, image_slots=18
    )
    batch, _, _ = assembler.batch([plan.pack(number) for number in (3, 4, 5)])
    fields, images = batch.inputs.fields, batch.info.images
    tokens, visual = fields["tokens"], layout.visual_tokens
    pairs = visual + 1
    assert tokens.shape == (384,) and fields["slots"].shape == (18 * visual,)
    real = fields["slots"][: images * visual]
    assert real.tolist() == tokens.eq(layout.image_slot).nonzero().flatten().tolist()
    assert fields["slots"][images * visual :].eq(384).all()
    source, carry = (fields[name][: images * pairs] for name in ("source", CARRY))
    assert tokens[source.view(images, pairs)[:, 0]].eq(layout.image_begin).all()
    assert tokens[carry.view(images, pairs)[:, -1]].eq(layout.image_end).all()
    assert (carry == source + 1).all() and tokens[carry].ne(layout.image_begin).all()
    weights = batch.targets.weights["image"]
    assert weights[: images * pairs].eq(1).all() and weights[images * pairs :].eq(0).all()
    assert fields[CARRY][images * pairs :].eq(0).all()
    assert batch.inputs.hidden[images:].eq(0).all()
    assert (fields["lo"] <= torch.arange(384)).all() and fields["lo"][128:].ge(128).all()
    assert batch.targets.origins["image"].shape == weights.shape


def test_pixels_stand_in_the_order_of_their_groups(
    vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    pages = [document("x", RED, "a", BLUE), document("y", BLUE, "a", RED)]
    batch, _, _ = assembled(pages, vocabulary, layout, tokens=40)
    expected = [decode(blob, layout) for blob in (RED, BLUE, BLUE, RED)]
    assert batch.info.sample_ids == ("x", "y")
    torch.testing.assert_close(batch.inputs.hidden, torch.stack(expected), rtol=0, atol=0)


def test_a_pack_without_images_has_one_dummy_of_weight_zero(
    vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    batch, _, _ = assembled([document("x", "a red circle")], vocabulary, layout)
    assert batch.inputs.hidden.shape == (1, 3, 28, 28) and batch.inputs.hidden.eq(0).all()
    assert batch.targets.weights["image"].tolist() == [0.0] * 4
    assert batch.inputs.fields["slots"].eq(32).all() and batch.info.images == 0


def test_an_empty_pack_is_padding_alone(vocabulary: Vocabulary, layout: SequenceFormat) -> None:
    source = kept_source("pages", [document("x", "a")], vocabulary, OPTIONS)
    assembler = Assembler(sources=[source], vocabulary=vocabulary, layout=layout, pack_tokens=8)
    batch, failures, documents = assembler.batch([PackPlan(5, ())])
    assert batch.targets.weights["text"].sum() == 0 == batch.info.tokens
    assert documents == {}
    assert not failures and batch.inputs.fields["lo"].tolist() == list(range(8))


@pytest.mark.parametrize("with_pixels", [True, False])
def test_a_broken_picture_takes_its_document_out_and_leaves_the_others(
    vocabulary: Vocabulary, layout: SequenceFormat, with_pixels: bool
) -> None:
    pages = [document("good", RED, "a"), document("bad", RED[:-30], "red"), document("z", "circle")]
    batch, failures, documents = assembled(
        pages, vocabulary, layout, image_slots=3, with_pixels=with_pixels
    )
    assert [(f.source, f.sample_id) for f in failures] == [("pages", "bad")] and documents == {
        "pages": 3
    }
    assert batch.info.sample_ids == ("good", "z") and batch.info.images == 1
    (red,) = vocabulary.encode("red")
    assert red not in batch.inputs.fields["tokens"].tolist()
    whole, _, _ = assembled([pages[0], document("bad", RED, "red"), pages[2]], vocabulary, layout)
    gone = batch.inputs.fields["tokens"].eq(layout.pad)
    for name in ("tokens", "positions", "lo", "hi", "labels"):
        same = batch.inputs.fields[name] == whole.inputs.fields[name]
        assert same[~gone].all(), name
    assert batch.targets.weights["text"][gone].eq(0).all()


def test_targets_do_not_need_pixels(
    sources: list[Source], vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    plan = plan_of(Mixture(sources, seed=0), layout, tokens=64)
    batches = [
        Assembler(
            sources=sources,
            vocabulary=vocabulary,
            layout=layout,
            pack_tokens=64,
            image_slots=6,
            with_pixels=with_pixels,
        ).batch([plan.pack(2)])[0]
        for with_pixels in (True, False)
    ]
    assert batches[1].inputs.hidden.numel() == 0
    for name in FIELDS:
        assert batches[0].inputs.fields[name].equal(batches[1].inputs.fields[name])
    for name, weights in batches[0].targets.weights.items():
        assert weights.equal(batches[1].targets.weights[name])


def test_text_that_looks_like_an_image_token_stays_text(
    vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    batch, _, _ = assembled([document("x", "a [IMG] <image> </s>")], vocabulary, layout)
    tokens = batch.inputs.fields["tokens"].tolist()
    assert layout.image_begin not in tokens and layout.image_slot not in tokens
    assert tokens.count(layout.eos) == 1


def test_a_stale_length_index_is_an_error_that_says_what_to_run(
    vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    source = kept_source("pages", [document("x", "a red circle")], vocabulary, OPTIONS)
    plan = plan_of(OnePass(source), layout).pack(0)
    source.documents.documents[0] = document("x", "a")  # type: ignore[attr-defined]
    assembler = Assembler(sources=[source], vocabulary=vocabulary, layout=layout, pack_tokens=32)
    with pytest.raises(ContentError, match=r"sample x: 3 positions, planned 5.*mmtrain data index"):
        assembler.batch([plan])


def test_more_images_than_slots_is_an_error(vocabulary: Vocabulary, layout: SequenceFormat) -> None:
    with pytest.raises(ContentError, match="holds 2 images, image_slots is 1"):
        assembled([document("x", RED, BLUE)], vocabulary, layout, image_slots=1)


def test_rows_are_numbered_by_their_document_and_their_place_in_it(
    vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    documents = [document(f"d{i}", "a red circle") for i in range(3)]
    source = kept_source("text", documents, vocabulary, OPTIONS)
    plan = plan_of(OnePass(source), layout, 64)
    (pack,) = (plan.pack(0),)
    assembler = Assembler(sources=[source], vocabulary=vocabulary, layout=layout, pack_tokens=64)
    noise = assembler.batch([pack])[0].inputs.fields["noise"]
    start = 0
    for planned in pack.documents:
        stop = start + planned.selection.positions
        assert noise[start:stop].equal(row_numbers(planned.noise, stop - start))
        start = stop
    assert len(noise[:start].unique()) == start and not noise[start:].any()
    # one document alone, at the top of its own pack
    alone = replace(pack, documents=pack.documents[2:])
    moved = assembler.batch([alone])[0].inputs.fields["noise"]
    length = pack.documents[2].selection.positions
    assert moved[:length].equal(noise[start - length : start])
