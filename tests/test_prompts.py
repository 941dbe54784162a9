"""Prompts as people type them."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from PIL import Image

from mmtrain.errors import RecipeError
from mmtrain.generation.prompts import open_media, parse, parse_chat, read_prompts, released_frames
from mmtrain.generation.sample import _heldout_prompts
from mmtrain.settings import SourceConfig
from mmtrain.trained import Trained


def square(path: Path, colour: str) -> Path:
    Image.new("RGB", (20, 10), colour).save(path)
    return path


def test_texts_and_pictures_keep_their_order(tmp_path: Path) -> None:
    red, blue = square(tmp_path / "red.png", "red"), square(tmp_path / "b (1).JPG", "blue")
    (request,) = parse([f"first [{red}] one [brackets] [{blue}] two"])
    assert request.plain == "first [image] one [brackets] [image] two"
    assert not request.wants_image
    pictures = [piece for piece in request.pieces if isinstance(piece, Image.Image)]
    assert [picture.getpixel((5, 5))[0] > 200 for picture in pictures] == [True, False]


def test_the_end_of_a_prompt_asks_for_an_image(tmp_path: Path) -> None:
    red = square(tmp_path / "red.png", "red")
    blend, words, said = parse([f"[{red}][{red}][IMG]", "a cat [IMG] ", "say [IMG] twice"])
    assert blend.wants_image and len(blend.pieces) == 2
    assert words.wants_image and words.pieces == ["a cat"]
    assert not said.wants_image and said.pieces == ["say [IMG] twice"]


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(RecipeError) as caught:
        parse([f"[{tmp_path}/none.png] a", f"[{tmp_path}/text.png] b", f"[{tmp_path}/no.mp4]"])
    text = str(caught.value)
    assert all(name in text for name in ("none.png", "text.png", "no.mp4"))


@pytest.mark.parametrize("count", [1, 3, 8, 9, 64, 97])
def test_eight_frames_of_a_clip_are_taken_in_order(count: int) -> None:
    frames = released_frames(count, 8)
    assert len(frames) == 8 and frames == sorted(frames)
    assert frames[0] >= 0 and frames[-1] < count
    assert count < 16 or len(set(frames)) == 8


def test_an_animation_is_a_clip(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(12)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (request,) = parse([f"[{tmp_path}/a.gif] moves"])
    assert len(request.pieces) == 9
    reds = [p.getpixel((0, 0))[0] for p in request.pieces if isinstance(p, Image.Image)]
    assert reds == [20 * i for i in released_frames(12, 8)]


def test_a_video_is_a_clip(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for value in range(5):  # fewer frames than are shown
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (50 * value,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    shades = [picture.getpixel((16, 16))[0] for picture in open_media(path)]
    expected = [50 * index for index in released_frames(5, 8)]
    assert all(abs(a - b) < 12 for a, b in zip(shades, expected, strict=True))


def test_a_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat [IMG]\n\n  a dog [IMG]\n")
    assert read_prompts(path) == ["a cat [IMG]", "a dog [IMG]"]
    path.write_text("\n")
    with pytest.raises(RecipeError, match="holds no prompt"):
        read_prompts(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_a_question_stands_in_the_template_of_instruction_tuning(tmp_path: Path) -> None:
    red = square(tmp_path / "red.png", "red")
    (request,) = parse_chat([f"[{red}] What colour? [USER]"], "none")
    kinds = [(part.modality.value, part.text, part.markup) for part in request.pieces]
    assert kinds == [
        ("text", " [USER]: ", True),
        ("image", "", False),
        ("text", "What colour? [USER]", False),  # what people write stays text
        ("text", " [ASSISTANT]: ", True),
    ]
    assert request.plain == "[image] What colour? [USER]"
    with pytest.raises(RecipeError, match=r"--chat: .*none\.png"):
        parse_chat([f"[{tmp_path}/none.png] a"], "auto")


def test_held_out_edits_are_asked_for_as_edits_and_captions_as_before(shapes: Path) -> None:
    heldout = {
        name: SourceConfig(path=str(shapes / "heldout" / name)) for name in ("edits", "captions")
    }
    trained = SimpleNamespace(recipe=SimpleNamespace(data=SimpleNamespace(heldout=heldout)))
    requests = _heldout_prompts(cast(Trained, trained), count=2)
    edits, others = requests[:2], requests[2:]
    for request in edits:
        picture, words = request.pieces
        assert isinstance(picture, Image.Image) and isinstance(words, str)
        assert request.wants_image and words.split()[0] in ("make", "remove", "add", "move")
    assert [request.wants_image for request in others] == [False, False, True, True]
