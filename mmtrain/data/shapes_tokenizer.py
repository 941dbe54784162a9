"""The demo tokenizer: byte-pair encoding trained on the grammar of the world of shapes.

It has the form of LLaMA's (a word mark in front of every word, `<unk> <s> </s>`) and the special
tokens of the Emu release. The corpus is the grammar itself with a fixed seed, so the vocabulary
is the same for every data set and a recipe can state its size. Words and marks of conversations
come after all others, as whole words: ids of what was there before them stay what they were.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmtrain.data.rules import Draw
from mmtrain.data.shapes_text import RELATIONS, article, plural, remark
from mmtrain.data.shapes_world import COLOURS, DIRECTIONS, RADII, SHAPES, kinds
from mmtrain.data.vocabulary import ASSISTANT, USER

SPECIAL = ("<unk>", "<s>", "</s>", "[PAD]", "[IMG]", "[/IMG]", "<image>")
_LEARNT = 192  # tokens of byte-pair encoding, the special ones above included
_SPOKEN = ("describe", "picture", "shape", "size", "where", "are", "there", "yes", "do")
_WORD_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
_ADDED = (":", *(_WORD_MARK + word for word in (":", *_SPOKEN)))
SIZE = _LEARNT + len(_ADDED) + 2  # with [USER] and [ASSISTANT]
_SENTENCES = 4000
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,?"


def write_tokenizer(folder: Path) -> None:
    """Train the tokenizer and save it as a Hugging Face folder."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=_LEARNT,
        special_tokens=list(SPECIAL),
        initial_alphabet=list(_ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    assert tokenizer.get_vocab_size() == _LEARNT, tokenizer.get_vocab_size()
    whole = PreTrainedTokenizerFast(
        tokenizer_object=_with_words(tokenizer),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="[PAD]",
        additional_special_tokens=[*SPECIAL[4:], USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    assert len(whole) == SIZE, len(whole)
    whole.save_pretrained(str(folder))


def _with_words(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with whole words that no merges lead to."""
    stored = json.loads(tokenizer.to_str())
    model = stored["model"]
    model["vocab"] |= {word: _LEARNT + number for number, word in enumerate(_ADDED)}
    model["ignore_merges"] = True  # a word of the vocabulary is taken as it is
    return Tokenizer.from_str(json.dumps(stored))


def _corpus() -> Iterator[str]:
    draw = Draw("tokenizer of the world of shapes")
    known = kinds(novel=())
    for _ in range(_SENTENCES):
        yield remark(draw, known)
    for colour in COLOURS:
        for shape in SHAPES:
            name = f"{colour} {shape}"
            for size in RADII:
                yield f"{article(f'{size} {name}')} and {article(name)}"
            for relation in RELATIONS:
                yield f"the {name} is {relation} the {shape}"
            for word in DIRECTIONS:
                yield f"{article(name)} moves {word}"
            for number in ("two", "three", "four", "five"):
                yield f"{number} {colour} {plural(shape)}"
            for word in ("first", "then", "last", "here is", "what colour is the", "how many"):
                yield f"{word} {article(name)} ?"
