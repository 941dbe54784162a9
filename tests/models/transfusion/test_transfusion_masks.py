"""Who sees whom, and what is learnt: against dense references on random packings."""

import random
from dataclasses import replace

import pytest
import torch
from small_transfusion import IMAGE, document, form, packed, random_pieces, small
from torch import Tensor

from mmtrain.data.document import Modality
from mmtrain.data.packed import Placed, labels_of, lay_out
from mmtrain.data.sequence import InterleavedSequence, Span
from mmtrain.data.tokens import SequenceFormat
from mmtrain.models.spec import Use
from mmtrain.models.transfusion.config import Context, Positions
from mmtrain.models.transfusion.noising import Noising
from mmtrain.models.transfusion.rows import ImageRows
from mmtrain.nn.diffusion import Answer
from mmtrain.nn.masks import Intervals
from mmtrain.ops.intervals import KeyIntervals


def dense(documents: list[list[int]], total: int, layout: SequenceFormat, causal: bool) -> Tensor:
    """The mask by its definition: in one document, and before, or in the same image."""
    owner = torch.full((total,), -1)
    image = torch.full((total,), -1)
    start = number = 0
    for index, tokens in enumerate(documents):
        for at, token in enumerate(tokens):
            owner[start + at] = index
            if token == layout.image_begin:
                number += 1
            if token == layout.image_slot:
                image[start + at] = number
        start += len(tokens)
    row = torch.arange(total)
    same_image = (image[:, None] == image) & (image[:, None] >= 0)
    seen = row[:, None] >= row
    if not causal:
        seen = seen | same_image
    mine = (owner[:, None] == owner) & (owner[:, None] >= 0)
    return (seen & mine) | torch.eye(total, dtype=torch.bool)  # padding rows see themselves


def assembled(tokens: list[int], layout: SequenceFormat) -> InterleavedSequence:
    group = layout.group_length
    starts = [at for at, token in enumerate(tokens) if token == layout.image_begin]
    return InterleavedSequence(
        tokens_T=torch.tensor(tokens),
        spans=tuple(Span(at, group, Modality.image, k) for k, at in enumerate(starts)),
        media=(b"",) * len(starts),
        weights_T=torch.ones(len(tokens)),
        sample_id="",
    )


@pytest.mark.parametrize("causal", [False, True])
def test_intervals_are_the_mask_of_the_paper_on_random_packings(causal: bool) -> None:
    draw = random.Random(0)
    config = small()
    layout = form(config)
    if causal:
        layout = SequenceFormat(**{**vars(layout), "sees_whole_image": False})
    for _ in range(500):
        documents = [document(random_pieces(draw), layout) for _ in range(draw.randrange(1, 5))]
        total = sum(map(len, documents)) + draw.randrange(4)
        placed, start = [], 0
        for tokens in documents:
            placed.append(Placed(start, assembled(tokens, layout), 0, 0))
            start += len(tokens)
        rows = lay_out(placed, total, layout).fields
        expected = dense(documents, total, layout, causal)
        mask = KeyIntervals.of_rows(rows["lo"], rows["hi"], total)
        assert torch.equal(mask.sees_BTS()[0], expected)
        # the kernels walk by columns: what they visit must include all that is seen
        key, row = torch.arange(total), torch.arange(total)[:, None]
        visited = (mask.first_BS <= row) & (row < mask.last_BS)
        assert not bool((expected & ~visited).any()), key


def dense_with_copies(tokens_T: Tensor, owner_T: Tensor, layout: SequenceFormat) -> Tensor:
    """BAGEL's mask: before or of the same copy, and never another's noised rows."""
    total, rows = len(tokens_T), layout.visual_tokens // 2
    copy_T, noised_T = torch.full((total,), -1), torch.zeros(total, dtype=torch.bool)
    for at in (tokens_T == layout.image_begin).nonzero().flatten().tolist():
        copy_T[at + 1 : at + 1 + rows] = 2 * at
        copy_T[at + 1 + rows : at + 1 + 2 * rows] = 2 * at + 1
        noised_T[at + 1 : at + 1 + rows] = True
    row = torch.arange(total)
    same = (copy_T[:, None] == copy_T) & (copy_T[:, None] >= 0)
    seen = (row[:, None] >= row) | (same if layout.sees_whole_image else False)
    seen &= ~noised_T | same
    seen &= (owner_T[:, None] == owner_T) & (owner_T[:, None] >= 0)
    return seen | torch.eye(total, dtype=torch.bool)


def owners(documents: list[list[int]], total: int) -> Tensor:
    counts = torch.tensor([len(tokens) for tokens in documents])
    owner_T = torch.full((total,), -1)
    owner_T[: int(counts.sum())] = torch.arange(len(counts)).repeat_interleave(counts)
    return owner_T


@pytest.mark.parametrize("causal", [False, True])
def test_copies_are_seen_as_in_the_dense_mask_on_random_packings(causal: bool) -> None:
    draw, config = random.Random(5), small(context=Context.copies, drop=0.0)
    layout = replace(form(config), sees_whole_image=not causal)
    noising = Noising(config, layout, torch.device("cpu"), Use.training)
    for _ in range(250):
        documents = [document(random_pieces(draw), layout) for _ in range(draw.randrange(1, 5))]
        count = sum(tokens.count(layout.image_begin) for tokens in documents)
        total = sum(map(len, documents)) + draw.randrange(4)
        batch = packed(documents, torch.zeros(max(count, 1), 3, 0, 0), layout, total=total)
        fields = noising(batch).inputs.fields
        lo, hi, until = fields["lo"], fields["hi"], fields["until"]
        row = torch.arange(total)
        found = (lo[:, None] <= row) & (row < hi[:, None]) & (row[:, None] < until)
        expected = dense_with_copies(fields["tokens"], owners(documents, total), layout)
        assert torch.equal(found, expected)


def test_attention_to_copies_is_attention_under_the_dense_mask() -> None:
    draw, config = random.Random(6), small(context=Context.copies, drop=0.0)
    for causal in (False, True) * 10:
        layout = replace(form(config), sees_whole_image=not causal)
        documents = [document(random_pieces(draw, 8), layout) for _ in range(4)]
        count = sum(tokens.count(layout.image_begin) for tokens in documents)
        total = sum(map(len, documents)) + 3
        batch = packed(documents, torch.zeros(max(count, 1), 3, 0, 0), layout, total=total)
        fields = Noising(config, layout, torch.device("cpu"), Use.training)(batch).inputs.fields
        q, k, v = torch.randn(3, total, 2, 8, generator=torch.Generator().manual_seed(total))
        keys = Intervals(fields["lo"], fields["hi"], until_T=fields["until"])
        found = keys.attend(torch.nn.Identity(), q, k, v, 0.3)
        seen = dense_with_copies(fields["tokens"], owners(documents, total), layout)
        logits = torch.einsum("thk,shk->hts", q, k) * 0.3
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        torch.testing.assert_close(found, torch.einsum("hts,shk->thk", weights, v))


@pytest.mark.parametrize("context", [Context.noised, Context.copies])
@pytest.mark.parametrize("positions", Positions)
def test_positions_count_the_rows_that_a_sampler_has(
    context: Context, positions: Positions
) -> None:
    config = small(context=context)
    config = replace(config, image=replace(config.image, positions=positions))
    layout, draw = form(config), random.Random(7)
    for _ in range(50):
        documents = [document(random_pieces(draw), layout) for _ in range(3)]
        total = sum(map(len, documents)) + 2
        count = sum(tokens.count(layout.image_begin) for tokens in documents)
        batch = packed(documents, torch.zeros(max(count, 1), 3, 0, 0), layout, total=total)
        noised = Noising(config, layout, torch.device("cpu"), Use.training)(batch)
        found = noised.inputs.fields["positions"].tolist()
        expected: list[int] = []
        for tokens in documents:
            expected += places(tokens, layout.image_slot, config.image.rows, positions)
        assert found == [*expected, 0, 0]


def places(tokens: list[int], slot: int, rows: int, kind: Positions) -> list[int]:
    """Row by row: rows of an image share a position or count on, copies begin again."""
    out, following, inside = [], 0, 0
    for token in tokens:
        if token != slot:
            inside, here = 0, following
        elif kind is Positions.shared:
            here = following if inside == 0 else out[-1]
            inside += 1
        else:
            here = out[-rows] if inside >= rows else following
            inside += 1
        out.append(here)
        following = here + 1
    return out


def test_a_prefix_of_images_is_clean_and_not_learnt() -> None:
    config = small(context=Context.prefix_clean, drop=0.5)
    layout = form(config)
    kinds: list[list[int | str]] = [[IMAGE, 1], [1, IMAGE], [IMAGE, 1, IMAGE], [IMAGE, IMAGE, 2]]
    documents = [document(pieces, layout) for pieces in kinds] * 200
    batch = packed(documents, torch.rand(200 * 6, 3, 8, 8), layout)
    noised = Noising(config, layout, torch.device("cpu"), Use.training)(batch)
    times = noised.inputs.fields["times"].view(200, 6)
    assert torch.equal(noised.targets.weights["image"], (times > 0).flatten().float())
    clean = times == 0
    for columns, most in (([0], 1), ([1], 0), ([2, 3], 1), ([4, 5], 2)):
        counts = clean[:, columns].sum(1)
        assert int(counts.max()) == most
        if most:  # 0.3 of the documents have none, the rest 1 .. most alike
            assert (counts == 0).float().mean() == pytest.approx(0.3, abs=0.1)
            assert (counts == most).float().mean() == pytest.approx(0.7 / most, abs=0.12)
        assert bool((clean[:, columns].int().diff(dim=1) <= 0).all()), "the first ones are clean"
    noisy = noised.inputs.hidden[:, :3]
    assert torch.equal(noisy[clean.flatten()], batch.inputs.hidden[clean.flatten()])
    begins = (noised.inputs.fields["tokens"] == layout.image_begin).nonzero().flatten()
    alone = noised.inputs.fields["lo"][begins] == begins
    assert bool(alone.any()) and not bool((alone & clean.flatten()).any())
    limited = times[:, 0][times[:, 0] > 0]
    assert int(limited.max()) <= 500 < int(times[:, 1].max())
    noise = replace(config.noise, answer=Answer.clean, snr_limit=20.0)
    weighed = Noising(replace(config, noise=noise), layout, torch.device("cpu"), Use.training)
    weights = weighed(batch).targets.weights["image"]
    assert torch.equal(weights > 0, ~clean.flatten()) and bool(weights.isfinite().all())


def test_copies_need_no_limit_and_are_learnt_once() -> None:
    config = small(context=Context.copies, drop=0.0)
    layout = form(config)
    documents = [document([IMAGE, 1], layout)] * 60
    batch = packed(documents, torch.rand(60, 3, 8, 8), layout)
    noised = Noising(config, layout, torch.device("cpu"), Use.training)(batch)
    assert int(noised.inputs.fields["times"].max()) > 800
    assert noised.targets.weights["image"].tolist() == [1.0] * 60
    assert torch.equal(noised.inputs.hidden[:, 6:], batch.inputs.hidden)


def test_attention_by_intervals_is_attention_under_the_dense_mask() -> None:
    draw, layout = random.Random(1), form(small())
    for _ in range(20):
        documents = [document(random_pieces(draw, 8), layout) for _ in range(3)]
        total = sum(map(len, documents)) + 3
        noised = dropping(documents, total, layout, 0.5)
        fields, dropped = noised.inputs.fields, dense(documents, total, layout, causal=False)
        row = torch.arange(total)
        dropped &= row >= fields["lo"][:, None]
        q, k, v = torch.randn(3, total, 2, 8, generator=torch.Generator().manual_seed(total))
        found = Intervals(fields["lo"], fields["hi"]).attend(torch.nn.Identity(), q, k, v, 0.3)
        logits = torch.einsum("thk,shk->hts", q, k) * 0.3
        weights = logits.masked_fill(~dropped, -torch.inf).softmax(-1)
        torch.testing.assert_close(found, torch.einsum("hts,shk->thk", weights, v))


def dropping(documents: list[list[int]], total: int, layout: SequenceFormat, share: float):  # type: ignore[no-untyped-def]
    count = sum(tokens.count(layout.image_begin) for tokens in documents)
    batch = packed(documents, torch.zeros(max(count, 1), 3, 8, 8), layout, total=total)
    return Noising(small(drop=share), layout, torch.device("cpu"), Use.training)(batch)


def test_an_image_without_its_condition_sees_itself_and_its_begin_token() -> None:
    layout = form(small())
    documents = [document([1, 2, IMAGE, 3, IMAGE], layout)] * 40
    fields = dropping(documents, 40 * len(documents[0]), layout, 0.5).inputs.fields
    tokens, lo, positions = fields["tokens"], fields["lo"], fields["positions"]
    begins = (tokens == layout.image_begin).nonzero().squeeze(-1)
    alone = lo[begins] == begins
    assert 20 < int(alone.sum()) < 60
    for begin, is_alone in zip(begins.tolist(), alone.tolist(), strict=True):
        start = begin - int(positions[begin])
        own = lo[begin : begin + layout.visual_tokens + 1]
        assert set(own.tolist()) == {begin if is_alone else start}
        assert int(lo[begin + layout.visual_tokens + 1]) == start  # text sees everything again
    whole = Noising(small(drop=0.5), layout, torch.device("cpu"), Use.heldout)
    batch = packed(documents, torch.zeros(80, 3, 8, 8), layout)
    assert torch.equal(whole(batch).inputs.fields["lo"], batch.inputs.fields["lo"])


def test_nothing_is_learnt_at_the_begin_token_nor_inside_images_and_the_end_is_no_target() -> None:
    layout, draw = form(small()), random.Random(2)
    for _ in range(200):
        tokens = document(random_pieces(draw, 10), layout)
        labels = labels_of(torch.tensor(tokens), layout).tolist()
        for at, token in enumerate(tokens):
            following = tokens[at + 1] if at + 1 < len(tokens) else None
            if token in (layout.image_begin, layout.image_slot) or following is None:
                assert labels[at] == -100
            else:  # words, the end token and <s> predict what follows, the begin token included
                assert labels[at] == following
        assert layout.image_end not in labels and layout.image_slot not in labels


def test_an_image_is_limited_exactly_when_words_follow_in_its_document() -> None:
    layout = form(small())
    kinds: list[tuple[list[int | str], list[bool]]] = [
        ([IMAGE], [False]),
        ([1, IMAGE], [False]),
        ([IMAGE, 1], [True]),
        ([IMAGE, IMAGE], [False, False]),
        ([1, IMAGE, IMAGE, 2, IMAGE], [True, True, False]),
        ([3], []),
    ]
    documents = [document(pieces, layout) for pieces, _ in kinds]
    expected = [flag for _, flags in kinds for flag in flags]
    pixels = torch.zeros(len(expected) + 2, 3, 8, 8)
    batch = packed(documents, pixels, layout, total=sum(map(len, documents)) + 5)
    images = ImageRows.of(batch.inputs.fields, small(), layout)
    assert images.followed_N.tolist() == [*expected, False, False]
    assert images.real_N.tolist() == [True] * len(expected) + [False] * 2
