"""A drawn pack shows the texts and pictures of its documents in order."""

from made import document, kept_source, png
from PIL import Image

from mmtrain.data.assemble import Assembler
from mmtrain.data.mixture import OnePass
from mmtrain.data.pack import Plan
from mmtrain.data.picture import contents, draw_pack
from mmtrain.data.rules import Rule, RuleOptions
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary


def test_a_drawn_pack_holds_texts_and_pictures_in_order(
    vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    red, blue = (200, 30, 30), (20, 20, 220)
    pages = [document("x", "a red ring", png(red), "and", png(blue)), document("y", png(blue))]
    options = RuleOptions(rule=Rule.document, max_positions=64)
    source = kept_source("pages", pages, vocabulary, options)
    plan = Plan(
        OnePass(source),
        group_length=layout.group_length,
        pack_tokens=64,
        pack_images=4,
        window_documents=8,
        seed=0,
    )
    assembler = Assembler(
        sources=[source], vocabulary=vocabulary, layout=layout, pack_tokens=64, image_slots=5
    )
    batch, _, _ = assembler.batch([plan.pack(0)])
    shown = [
        [item.getpixel((3, 3)) if isinstance(item, Image.Image) else item for item in content]
        for content in contents(batch, vocabulary, layout)
    ]
    assert shown == [["a red ring", red, "and", blue], [blue]]
    page = draw_pack(batch, vocabulary, layout, width=300, thumbnail=32)
    assert page.width == 300 and page.height > 64
    colours = {colour for _, colour in page.getcolors(1 << 16) or []}
    assert {red, blue, (255, 255, 255)} <= colours
    assert (
        draw_pack(batch, vocabulary, layout, width=60).width == 60
    )  # nothing fits, nothing breaks
