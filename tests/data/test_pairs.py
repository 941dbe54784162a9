"""Pairs for the visual decoder: what is drawn of a sample depends on its key alone."""

import pytest
import torch
from PIL import Image

from mmtrain.data.mixture import Mixture, OnePass, Source
from mmtrain.data.pack import PackPlan
from mmtrain.data.pairs import PairAssembler, PairPlan, centred, cropped, squashed
from mmtrain.data.rules import Rule, RuleOptions
from mmtrain.data.shapes import write_shapes
from mmtrain.data.sources import open_source
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary
from mmtrain.models.emu.decoder import UNetConfig, sequence


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Vocabulary, SequenceFormat]:
    """Captions of the world of shapes."""
    folder = tmp_path_factory.mktemp("pairs")
    write_shapes(folder / "data", 60, 0)
    vocabulary = load_vocabulary(folder / "data/tokenizer")
    options = RuleOptions(rule=Rule.pair, max_images=1, max_positions=48)
    source = open_source("captions", folder / "data/captions", vocabulary, options)
    return source, vocabulary, sequence(UNetConfig(conditions=4), vocabulary.ids)


def plan_of(source: Source, *, longest: int = 0, one_pass: bool = False) -> PairPlan:
    draws = OnePass(source) if one_pass else Mixture([source], seed=3)
    return PairPlan(
        draws, group_length=6, pack_tokens=48, longest_text=longest, window_documents=16, seed=3
    )


def assembler_of(
    source: Source, vocabulary: Vocabulary, layout: SequenceFormat, drop: float = 0.5
) -> PairAssembler:
    return PairAssembler(
        sources=[source],
        vocabulary=vocabulary,
        layout=layout,
        shape=(3, 8, 8),
        side=8,
        square=squashed,
        steps=1000,
        drop=drop,
        vision=None,
        known={},
    )


def test_every_pack_is_one_picture_with_its_text(
    world: tuple[Source, Vocabulary, SequenceFormat],
) -> None:
    source, vocabulary, layout = world
    plan = plan_of(source, one_pass=True)
    assert plan.packs() == len(source.lengths)
    pairs, failures, planned = assembler_of(*world).batch([plan.pack(n) for n in range(5)])
    assert not failures and planned == {"captions": 5}
    for number, prompt in enumerate(pairs.prompts):
        document = source.documents.document(number)
        text = next(part.text for part in document.parts if part.text)
        assert prompt == (layout.bos, *vocabulary.encode(text))
    assert pairs.pixels is not None and pairs.pixels.shape == (5, 3, 8, 8)
    assert -1 <= pairs.pixels.min() < pairs.pixels.max() <= 1
    assert pairs.info.tokens == pairs.info.slots == 5 * 4


def test_what_is_drawn_depends_on_the_sample_and_the_epoch_alone(
    world: tuple[Source, Vocabulary, SequenceFormat],
) -> None:
    source = world[0]
    assembler, plan = assembler_of(*world), plan_of(source)
    whole, _, _ = assembler.batch([plan.pack(n) for n in range(8)])
    apart = [assembler.batch([plan.pack(n)])[0] for n in range(8)]
    for number, alone in enumerate(apart):
        assert torch.equal(alone.noise[0], whole.noise[number])
        assert alone.timesteps_N[0] == whole.timesteps_N[number]
        assert alone.dropped_N[0] == whole.dropped_N[number]
    epoch = len(source.lengths)
    found: dict[str, list[int]] = {}
    for start in range(0, 2 * epoch, 8):
        batch, _, _ = assembler.batch([plan.pack(n) for n in range(start, start + 8)])
        for name, timestep in zip(batch.info.sample_ids, batch.timesteps_N.tolist(), strict=True):
            found.setdefault(name, []).append(timestep)
    assert len(found) == epoch
    assert sum(len(set(times)) == 2 for times in found.values() if len(times) == 2) > epoch / 2


def test_conditions_are_dropped_at_their_rate_and_timesteps_are_uniform(
    world: tuple[Source, Vocabulary, SequenceFormat],
) -> None:
    assembler, plan = assembler_of(*world, drop=0.1), plan_of(world[0])
    batch, _, _ = assembler.batch([plan.pack(n) for n in range(2000)])
    assert batch.dropped_N.float().mean() == pytest.approx(0.1, abs=0.025)
    assert batch.timesteps_N.float().mean() == pytest.approx(500, abs=25)
    assert batch.noise.std() == pytest.approx(1, abs=0.01)


def test_long_texts_are_left_out_and_padding_counts_nothing(
    world: tuple[Source, Vocabulary, SequenceFormat],
) -> None:
    source, vocabulary, _ = world
    short = plan_of(source, longest=5, one_pass=True)
    kept = [short.pack(n).documents[0].number for n in range(short.packs())]
    texts = [
        next(part.text for part in source.documents.document(n).parts if part.text)
        for n in range(len(source.lengths))
    ]
    assert kept == [n for n, text in enumerate(texts) if len(vocabulary.encode(text)) <= 5]
    assert 0 < len(kept) < len(texts)
    batch, _, planned = assembler_of(*world).batch([short.pack(0), PackPlan(9, ())])
    assert batch.weights_N.tolist() == [1, 0] and planned == {"captions": 1}
    assert batch.info.images == 1


def test_a_picture_is_cropped_to_its_middle_or_squashed() -> None:
    picture = Image.new("RGB", (90, 30), "red")
    picture.paste("blue", (30, 0, 60, 30))
    middle = centred(cropped(picture, 10))
    inner = middle[:, 1:-1, 1:-1]  # bicubic weights reach over the edge
    assert (inner[2] > 0.99).all() and (inner[0] < -0.99).all()
    assert centred(squashed(picture, 9))[0, 4, 0] > 0.9
