"""A tokenizer as the platform uses it: ids of plain text, and the ids of special tokens.

Any Hugging Face tokenizer folder serves. Text is encoded without special tokens, and text that
looks like one (a web page that says "[IMG]") stays text: a stray image token would break the
pairing of images and slots. Special tokens are placed by the sequence rules, and by the markup of
conversations (`Part.markup`), which no text of a user ever is.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mmtrain.data.document import Part
from mmtrain.errors import ContentError, MissingError

# files that decide how a tokenizer splits text; anything else in the folder does not
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
USER, ASSISTANT = "[USER]", "[ASSISTANT]"
MARKUP = (USER, ASSISTANT, "</s>", "[IMG]", "[/IMG]")  # honoured in markup
_SPLIT_MARKUP = re.compile("(" + "|".join(map(re.escape, MARKUP)) + ")")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and where it came from; build it with `load_vocabulary`.

    Attributes:
        folder: the tokenizer folder.
        fingerprint: sha256 over its files; token counts are only valid for this content.
    """

    folder: Path
    fingerprint: str
    _tokenizer: Any

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Every token by its string, special tokens included."""
        return dict(self._tokenizer.get_vocab())

    @property
    def size(self) -> int:
        """Rows an embedding needs: one more than the largest id."""
        return max(self.ids.values()) + 1

    def require(self, tokens: Sequence[str]) -> dict[str, int]:
        """Ids of special tokens.

        Raises:
            ContentError: some are missing; names all of them and how to add them.
        """
        missing = [token for token in tokens if token not in self.ids]
        if missing:
            raise ContentError(
                f"tokenizer {self.folder} lacks the special tokens {missing}. Add them once: "
                "tokenizer.add_special_tokens({'additional_special_tokens': "
                f"{missing}}}); tokenizer.save_pretrained(folder)"
            )
        return {token: self.ids[token] for token in tokens}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no special token is added or recognised.

        Raises:
            ContentError: the tokenizer made a special token out of plain text all the same.
        """
        ids = self._encode(text)
        stray = self._special.intersection(ids)
        if stray:
            names = self._tokenizer.convert_ids_to_tokens(sorted(stray))
            raise ContentError(
                f"tokenizer {self.folder} turned plain text into the special tokens {names}: "
                f"{text[:80]!r}; use a tokenizer that honours split_special_tokens"
            )
        return ids

    def encode_markup(self, text: str) -> list[int]:
        """Ids of text in which the tokens of `MARKUP` are special.

        As Emu was trained (LLaMA's slow tokenizer in transformers 4.29 to 4.31; later versions
        leave a lone blank before a special token): blanks on both sides of a special token go,
        and each piece between them is encoded on its own, so that sentencepiece puts its word
        mark before it. " [USER]: [IMG]" is `[USER]`, `_:`, `[IMG]`.

        Raises:
            ContentError: the tokenizer lacks one of the special tokens in `text`.
        """
        ids: list[int] = []
        for index, piece in enumerate(_SPLIT_MARKUP.split(text)):
            if index % 2:
                ids.append(self.require([piece])[piece])
            elif piece.strip():
                ids += self.encode(piece.strip())
        return ids

    def encode_part(self, part: Part) -> list[int]:
        """Ids of a text part, as markup when it is that."""
        return self.encode_markup(part.text) if part.markup else self.encode(part.text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        if not self._tokenizer.is_fast:
            return partial(
                self._tokenizer.encode, add_special_tokens=False, split_special_tokens=True
            )
        # the Rust tokenizer itself: 15 us a caption, 90 us through transformers
        backend = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        return lambda text: list(backend.encode(text, add_special_tokens=False).ids)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "fingerprint": self.fingerprint,
            "_tokenizer": self._tokenizer,
        }

    @cached_property
    def _special(self) -> frozenset[int]:
        # the unknown token is the honest image of an unknown word, so it may appear
        return frozenset(self._tokenizer.all_special_ids) - {self._tokenizer.unk_token_id}


def load_vocabulary(folder: Path) -> Vocabulary:
    """Load a Hugging Face tokenizer folder, never from the network.

    Raises:
        MissingError: the folder or its tokenizer files are not there.
        ContentError: the files are no tokenizer, or want to run code.
    """
    if not folder.is_dir():
        raise MissingError(f"tokenizer folder {folder} is not there")
    fingerprint = fingerprint_of(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust library raises bare ones, damaged JSON any
        if "trust_remote_code" in str(error):
            raise ContentError(
                f"tokenizer {folder} brings code of its own, which is not run; name one that "
                "transformers reads by itself (a tokenizer.json)"
            ) from error
        raise ContentError(f"tokenizer {folder} cannot be loaded: {error}") from error
    return Vocabulary(folder, fingerprint, tokenizer)


def fingerprint_of(folder: Path) -> str:
    """Hex sha256 over the tokenizer files of a folder, names and contents.

    Raises:
        MissingError: none of the known files is there.
    """
    found = [folder / name for name in _FILES if (folder / name).is_file()]
    if not found:
        raise MissingError(f"tokenizer folder {folder} holds none of {', '.join(_FILES)}")
    digest = hashlib.sha256()
    for path in found:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
