"""Sources, tokenizer and sequence format of the demo world."""

from pathlib import Path

import pytest
from made import form_of

from mmtrain.data.mixture import Source
from mmtrain.data.rules import Rule, RuleOptions
from mmtrain.data.sources import open_source
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary

RULES = {
    "captions": Rule.pair,
    "pages": Rule.subsequence,
    "clips": Rule.video,
    "boards": Rule.storyboard,
    "text": Rule.text,
}


@pytest.fixture(scope="session")
def world(shapes: Path) -> Path:
    return shapes


@pytest.fixture(scope="session")
def vocabulary(world: Path) -> Vocabulary:
    return load_vocabulary(world / "tokenizer")


@pytest.fixture(scope="session")
def layout(vocabulary: Vocabulary) -> SequenceFormat:
    return form_of(vocabulary)


@pytest.fixture(scope="session")
def sources(world: Path, vocabulary: Vocabulary) -> list[Source]:
    return [
        open_source(
            name,
            world / name,
            vocabulary,
            RuleOptions(rule=rule, max_images=4, max_positions=64),
            weight=2.0 if name == "captions" else 1.0,
        )
        for name, rule in RULES.items()
    ]
