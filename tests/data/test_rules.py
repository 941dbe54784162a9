"""Every rule keeps its limits, cuts no image and is a pure function; each does what it says."""

import itertools
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.data.document import DocumentLengths, Modality, PartLength
from mmtrain.data.rules import (
    WRAPPER_POSITIONS,
    Draw,
    FrameSampling,
    ImagePiece,
    Rule,
    RuleOptions,
    Selection,
    TextPiece,
    select,
    spaced,
)

GROUP = 10


def text(tokens: int, time: float | None = None) -> PartLength:
    return PartLength(Modality.text, tokens, None, time)


def image(match: int | None = None, time: float | None = None) -> PartLength:
    return PartLength(Modality.image, 1, match, time)


def video(frames: int) -> PartLength:
    return PartLength(Modality.video, frames)


def chosen(parts: list[PartLength], seed: int = 0, **options: object) -> Selection:
    lengths = DocumentLengths("x", "kind", tuple(parts))
    return select(lengths, RuleOptions(**options), GROUP, Draw(seed))  # type: ignore[arg-type]


def shorthand(selection: Selection) -> list[str]:
    """`t0[0:5]` and `i1`, for reading."""
    return [
        f"t{p.part}[{p.start}:{p.stop}]" if isinstance(p, TextPiece) else f"i{p.part}.{p.item}"
        for p in selection.pieces
    ]


@st.composite
def documents(draw: st.DrawFn) -> list[PartLength]:
    kinds = draw(st.lists(st.sampled_from("tiv"), max_size=8))
    parts: list[PartLength] = []
    texts = [index for index, kind in enumerate(kinds) if kind == "t"]
    timed = draw(st.booleans())
    for kind in kinds:
        time = draw(st.floats(0, 9)) if timed else None
        if kind == "t":
            parts.append(text(draw(st.integers(0, 40)), time))
        elif kind == "i":
            match = draw(st.sampled_from([None, *texts]))
            parts.append(image(match, time))
        else:
            parts.append(PartLength(Modality.video, draw(st.integers(1, 12)), None, time))
    return parts


@settings(max_examples=300, deadline=None)
@given(
    documents(),
    st.sampled_from(Rule),
    st.integers(0, 8),
    st.integers(2, 150),
    st.sampled_from(FrameSampling),
    st.integers(0, 99),
)
def test_a_selection_keeps_its_limits_and_takes_every_piece_at_most_once(
    parts: list[PartLength],
    rule: Rule,
    max_images: int,
    max_positions: int,
    frames: FrameSampling,
    seed: int,
) -> None:
    options = {
        "rule": rule,
        "max_images": max_images,
        "max_positions": max_positions,
        "frames": frames,
    }
    selection = chosen(parts, seed, **options)
    taken = Counter(p for p in selection.pieces if isinstance(p, ImagePiece))
    spans = [p for p in selection.pieces if isinstance(p, TextPiece)]
    assert selection.images == len(taken) == taken.total() <= max_images
    length = sum(p.stop - p.start for p in spans) + GROUP * selection.images
    assert selection.positions == length + WRAPPER_POSITIONS <= max(max_positions, 2)
    assert len({p.part for p in spans}) == len(spans)
    for span in spans:
        assert 0 <= span.start < span.stop <= parts[span.part].size
    for piece in taken:
        assert 0 <= piece.item < parts[piece.part].size
        assert parts[piece.part].modality is not Modality.text
    assert selection == chosen(parts, seed, **options)


def test_a_pair_puts_its_image_before_or_after_the_text_at_random() -> None:
    sides = Counter(
        shorthand(chosen([image(), text(5)], seed, rule=Rule.pair))[0] for seed in range(1000)
    )
    assert set(sides) == {"i0.0", "t1[0:5]"}
    assert 430 < sides["i0.0"] < 570
    always = {
        shorthand(chosen([image(), text(5)], seed, rule=Rule.pair, image_first=1.0))[0]
        for seed in range(50)
    }
    assert always == {"i0.0"}


def test_the_text_of_a_pair_gives_way_to_its_image() -> None:
    pair = chosen([text(30), image()], rule=Rule.pair, max_positions=20, image_first=1.0)
    assert shorthand(pair) == ["i1.0", "t0[0:8]"]


def test_a_clip_is_one_block_of_frames_in_order_of_time() -> None:
    for sampling in FrameSampling:
        starts = set()
        for seed in range(40):
            options = {"rule": Rule.video, "max_images": 8, "frames": sampling}
            clip = chosen([video(30), text(4)], seed, **options)
            items = [p.item for p in clip.pieces if isinstance(p, ImagePiece)]
            assert len(items) == 8 and items == sorted(set(items))
            assert isinstance(clip.pieces[0], TextPiece) != isinstance(clip.pieces[-1], TextPiece)
            starts.add(tuple(items))
        assert len(starts) == 1 if sampling is FrameSampling.uniform else len(starts) > 30


def test_spaced_frames_hold_both_ends_and_even_gaps() -> None:
    assert spaced(5, 8) == [0, 1, 2, 3, 4]
    assert spaced(9, 1) == [4]
    for count in range(2, 60):
        for keep in range(2, count + 1):
            frames = spaced(count, keep)
            gaps = {after - before for before, after in itertools.pairwise(frames)}
            assert frames[0] == 0 and frames[-1] == count - 1 and len(frames) == keep
            assert max(gaps) - min(gaps) <= 1


def test_a_document_keeps_its_order_and_ends_before_an_image_that_does_not_fit() -> None:
    parts = [text(3), image(), text(4), image(), text(5)]
    whole = ["t0[0:3]", "i1.0", "t2[0:4]", "i3.0", "t4[0:5]"]
    assert shorthand(chosen(parts, rule=Rule.document)) == whole
    assert shorthand(chosen(parts, rule=Rule.document, max_positions=28)) == whole[:3]
    assert shorthand(chosen(parts, rule=Rule.document, max_images=1)) == [*whole[:3], whole[4]]


def test_a_subsequence_is_a_run_of_the_page_that_fills_its_limit() -> None:
    parts = [part for index in range(20) for part in (text(7), image(match=2 * index))]
    starts = set()
    for seed in range(60):
        window = chosen(parts, seed, rule=Rule.subsequence, max_positions=100, max_images=5)
        order = [p.part // 2 for p in window.pieces]
        assert order == sorted(order)
        assert 100 - 2 * GROUP < window.positions <= 100 or order[-1] == 19
        starts.add(order[0])
    assert len(starts) > 8


def test_a_subsequence_puts_each_image_beside_its_own_sentence() -> None:
    parts = [text(2), text(2), text(2), image(match=0), image(match=2)]
    seen = set()
    for seed in range(40):
        order = [p.part for p in chosen(parts, seed, rule=Rule.subsequence).pieces]
        assert abs(order.index(3) - order.index(0)) == 1
        assert abs(order.index(4) - order.index(2)) == 1
        seen.add(tuple(order))
    assert len(seen) == 4  # both sides of both


def test_sampled_images_come_with_their_sentences_only() -> None:
    parts = [part for index in range(10) for part in (text(3), image(match=2 * index))]
    subsets = set()
    for seed in range(60):
        sample = chosen(parts, seed, rule=Rule.sampled_images, max_images=3)
        images = [p.part for p in sample.pieces if isinstance(p, ImagePiece)]
        texts = [p.part for p in sample.pieces if isinstance(p, TextPiece)]
        assert len(images) == 3 and [part - 1 for part in images] == texts == sorted(texts)
        subsets.add(tuple(images))
    assert len(subsets) > 30


def test_two_images_of_one_sentence_do_not_repeat_it() -> None:
    sample = chosen([text(3), image(0), image(0)], rule=Rule.sampled_images)
    assert sorted(shorthand(sample)) == ["i1.0", "i2.0", "t0[0:3]"]


def test_a_storyboard_is_sorted_by_time_with_a_frame_before_its_subtitle() -> None:
    parts = [text(2, time=10.0), image(time=10.0), image(time=0.0), text(3, time=4.0)]
    board = chosen(parts, rule=Rule.storyboard)
    assert shorthand(board) == ["i2.0", "t3[0:3]", "i1.0", "t0[0:2]"]


def test_a_long_storyboard_gives_a_run_of_consecutive_frames_with_their_text() -> None:
    parts = [p for i in range(12) for p in (image(time=2.0 * i), text(2, time=2.0 * i + 1))]
    firsts = set()
    for seed in range(60):
        board = chosen(parts, seed, rule=Rule.storyboard, max_images=4)
        frames = [p.part // 2 for p in board.pieces if isinstance(p, ImagePiece)]
        assert frames == list(range(frames[0], frames[0] + 4))
        firsts.add(frames[0])
    assert firsts == set(range(9))


def test_text_only_drops_images_and_moves_its_window_over_long_documents() -> None:
    assert shorthand(chosen([text(4), image(), text(5)], rule=Rule.text)) == ["t0[0:4]", "t2[0:5]"]
    starts = {
        p.start
        for seed in range(300)
        for p in chosen([text(30)], seed, rule=Rule.text, max_positions=22).pieces
        if isinstance(p, TextPiece)
    }
    assert starts == set(range(11))


@pytest.mark.parametrize("rule", Rule)
def test_nothing_to_learn_gives_an_empty_selection(rule: Rule) -> None:
    assert chosen([], rule=rule) == Selection((), WRAPPER_POSITIONS, 0)
    assert chosen([text(0)], rule=rule).pieces == ()


def test_rules_load_no_engine() -> None:
    """A recipe names rules; checking one must not take seconds of imports."""
    script = (
        "import sys, mmtrain.data.rules; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'streaming')))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_draws_are_the_same_on_every_machine() -> None:
    draw = Draw(3, 1, "captions", "sample-17")
    assert [draw.below(1000) for _ in range(5)] == [829, 596, 338, 819, 29]
    assert draw.subset(10, 3) == [0, 4, 5]
