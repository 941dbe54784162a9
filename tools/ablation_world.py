"""The world of tools/ablate_transfusion.py: single shapes with captions, learnt in minutes.

The same pen, grammar and judge as the demo's world (`mmtrain data shapes`), one of its six
categories: "a red circle", large, near one of nine places, on a light ground.
"""

from pathlib import Path

from mmtrain.data.document import Document, Modality, Part
from mmtrain.data.folders import temporary_folder
from mmtrain.data.images import encode_png
from mmtrain.data.rules import Draw
from mmtrain.data.shapes_text import Category, caption, scene
from mmtrain.data.shapes_tokenizer import write_tokenizer
from mmtrain.data.shapes_world import kinds, picture
from mmtrain.data.shards import build_index, write_shards
from mmtrain.data.vocabulary import load_vocabulary

CATEGORIES = (Category.single,)


def write_world(out: Path, documents: int, heldout: int) -> None:
    """Write `out`/captions, `out`/heldout/captions and `out`/tokenizer, always the same.

    Args:
        out: folder to make; nothing is done when it is there.
        documents: of training.
        heldout: documents that training does not see.
    """
    if out.exists():
        return
    with temporary_folder(out) as partial:
        write_tokenizer(partial / "tokenizer")
        vocabulary = load_vocabulary(partial / "tokenizer")
        for source, count in (("captions", documents), ("heldout/captions", heldout)):
            with write_shards(partial / source) as writer:
                for number in range(count):
                    writer.write(_document(Draw(source, number), f"{number:06d}", number))
            build_index(partial / source, vocabulary)


def _document(draw: Draw, name: str, number: int) -> Document:
    category = CATEGORIES[number % len(CATEGORIES)]
    objects = scene(draw, category, kinds())
    words, prompt = caption(category, objects)
    image = Part(modality=Modality.image, media=(encode_png(picture(draw, objects)),))
    facts = {"category": category.value, "objects": objects, "caption": words, "prompt": prompt}
    text = Part(modality=Modality.text, text=words)
    return Document(sample_id=name, kind="caption", parts=(image, text), meta=facts)
