"""How a document becomes one row of tokens: special ids and the size of an image group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mmtrain.data.choices import Resize

# begin and end of a sequence, padding; begin and end of an image, a row of one (released for Emu)
SPECIAL_TOKENS = ("<s>", "</s>", "[PAD]", "[IMG]", "[/IMG]", "<image>")


@dataclass(frozen=True, kw_only=True)
class SequenceFormat:
    """Special token ids and image groups of a family.

    An image (or video frame) is `image_begin`, `visual_tokens` x `image_slot`, `image_end`.
    """

    bos: int
    eos: int
    pad: int
    image_begin: int
    image_end: int
    image_slot: int
    visual_tokens: int  # rows an image takes between its begin and end tokens
    image_size: int  # pixels a side; images become squares
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    crops_images: bool = False  # to their middle square, where they are squashed otherwise
    resize: Resize = Resize.fast
    sees_whole_image: bool = False  # a visual row sees its whole image, not only what is before it
    learns_image_begin: bool = False  # image_begin is a label too: the model may choose an image

    @classmethod
    def of(cls, ids: Mapping[str, int], **others: Any) -> Self:
        """The format of a tokenizer with `SPECIAL_TOKENS`.

        Args:
            ids: id of each of them.
            others: the fields that are no ids.
        """
        bos, eos, pad, begin, end, slot = (ids[token] for token in SPECIAL_TOKENS)
        return cls(
            bos=bos,
            eos=eos,
            pad=pad,
            image_begin=begin,
            image_end=end,
            image_slot=slot,
            **others,
        )

    @property
    def group_length(self) -> int:
        """Positions one image takes in a sequence."""
        return self.visual_tokens + 2
