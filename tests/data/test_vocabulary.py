"""Text stays text; special tokens are found or their absence is explained."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mmtrain.data.vocabulary import Vocabulary, load_vocabulary
from mmtrain.errors import ContentError, MissingError

SPECIAL = ["<unk>", "<s>", "</s>", "[PAD]", "[IMG]", "[/IMG]", "<image>"]


def test_special_tokens_have_the_names_of_the_release(vocabulary: Vocabulary) -> None:
    assert list(vocabulary.require(SPECIAL).values()) == list(range(7))


def test_missing_special_tokens_are_all_named_with_the_way_out(vocabulary: Vocabulary) -> None:
    with pytest.raises(ContentError, match=r"lacks .*'\[VIDEO\]', '\[gIMG\]'.*add_special"):
        vocabulary.require(["<s>", "[VIDEO]", "[gIMG]"])


def test_plain_text_never_becomes_a_special_token(vocabulary: Vocabulary) -> None:
    for text in ("[IMG]", "a [/IMG] b", "<image><image>", "</s>", "<s> [PAD]"):
        assert not set(vocabulary.encode(text)) & set(range(1, 7)), text
    plain = AutoTokenizer.from_pretrained(str(vocabulary.folder))
    assert plain.encode("[IMG]", add_special_tokens=False) == [4]  # what must not happen


def test_ids_are_those_of_transformers(vocabulary: Vocabulary) -> None:
    plain = AutoTokenizer.from_pretrained(str(vocabulary.folder))
    for text in ("a red circle", "", "  two  blanks ", "Zebra-crossing, 12!", "a\nb"):
        assert vocabulary.encode(text) == plain.encode(text, add_special_tokens=False)
    assert vocabulary.decode([1, *vocabulary.encode("a red ring"), 2]) == "a red ring"


def test_a_vocabulary_reaches_worker_processes(vocabulary: Vocabulary) -> None:
    vocabulary.encode("a red circle")
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert copy.encode("a red circle") == vocabulary.encode("a red circle")
    assert copy.fingerprint == vocabulary.fingerprint


def test_the_fingerprint_follows_the_content_alone(vocabulary: Vocabulary, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(vocabulary.folder, copy)
    (copy / "README.md").write_text("nothing that counts")
    assert load_vocabulary(copy).fingerprint == vocabulary.fingerprint
    config = json.loads((copy / "tokenizer.json").read_text())
    config["normalizer"] = None
    (copy / "tokenizer.json").write_text(json.dumps(config))
    assert load_vocabulary(copy).fingerprint != vocabulary.fingerprint


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="is not there"):
        load_vocabulary(tmp_path / "nowhere")
    with pytest.raises(MissingError, match=r"holds none of tokenizer\.json"):
        load_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ContentError, match="cannot be loaded"):
        load_vocabulary(tmp_path)
