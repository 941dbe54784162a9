"""An untrained Emu that writes in the demo world: what is asked matters here, not the answers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtrain.data.vocabulary import load_vocabulary
from mmtrain.evaluate.asking import Subject
from mmtrain.generation.artist import Artist
from mmtrain.models.emu.generate import EmuSampler
from mmtrain.models.emu.model import build_plain, parameters
from mmtrain.models.families import spec_of
from mmtrain.nn.init import draw_by_name
from mmtrain.recipe import examine
from mmtrain.settings import Phase, SourceConfig
from mmtrain.trained import Style, Trained


@pytest.fixture(scope="session")
def trained(repository: Path, shapes: Path) -> Trained:
    """The tiny recipe with its initial weights."""
    tokenizer = f"data.tokenizer={shapes / 'tokenizer'}"
    recipe = examine(repository / "configs/emu/tiny.yaml", [tokenizer]).recipe
    assert recipe is not None
    spec = spec_of(recipe.family, recipe.phase)
    model, rules = build_plain(recipe.model), spec.initial(recipe.model)
    with torch.no_grad():
        for name, parameter in parameters(model).items():
            parameter.copy_(draw_by_name(name, tuple(parameter.shape), rules, seed=0))
    vocabulary = load_vocabulary(shapes / "tokenizer")
    layout = spec.sequence(recipe.model, vocabulary.ids)
    return Trained(shapes, recipe, vocabulary, layout, EmuSampler(model, layout))


@pytest.fixture(scope="session")
def tuned(trained: Trained) -> Trained:
    """The same, said to be tuned on conversations."""
    return replace(trained, recipe=replace(trained.recipe, phase=Phase.instruct))


@pytest.fixture(scope="session")
def subject_of(shapes: Path) -> Callable[[Trained], Subject]:
    """What tasks take: held-out captions and conversations of the demo world."""
    heldout = {
        name: SourceConfig(path=str(shapes / "heldout" / name)) for name in ("captions", "chat")
    }
    return lambda trained: Subject(Artist(trained, None, Style()), heldout)
