"""`mmtrain data ingest chat`: the JSON people have; what is broken is named and counted."""

import base64
import copy
import io
import json
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from foreign import Json, counts, shown
from foreign import documents as written
from made import film, png
from PIL import Image

from mmtrain.data import video
from mmtrain.data.chat import SYSTEM
from mmtrain.data.document import Modality
from mmtrain.data.ingest import records as json_records
from mmtrain.data.ingest import run
from mmtrain.data.ingest.dropped import Reason
from mmtrain.data.ingest.records import read_records
from mmtrain.data.shards import load_lengths, open_shards
from mmtrain.data.vocabulary import load_vocabulary
from mmtrain.errors import ContentError, ExitCode

RED, BLUE = png((200, 30, 30)), png((20, 20, 220))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with pictures a.png and deep/b.png, and a clip of 12 frames as a folder."""
    (tmp_path / "a.png").write_bytes(RED)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b.png").write_bytes(BLUE)
    (tmp_path / "v_clip").mkdir()
    for number in range(12):
        (tmp_path / f"v_clip/{number}.png").write_bytes(png((20 * number, 0, 0)))
    return tmp_path


def talk(*said: str) -> list[Json]:
    who = ("human", "gpt")
    return [{"from": who[i % 2], "value": words} for i, words in enumerate(said)]


def llava(**own: Any) -> Json:
    said = talk("<image>\nWhat is it?", "A wall.")
    return {"id": "7", "image": "a.png", "conversations": said, **own}


def ingest(folder: Path, records: Any, *options: str, out: str = "out") -> int:
    """Write the records as JSON (texts and bytes as they are) and run the command."""
    text = records if isinstance(records, str | bytes) else json.dumps(records)
    (folder / "chat.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return foreign.ingest("chat", folder / "chat.json", folder / out, *options)


def dropped(folder: Path, out: str = "out") -> dict[Reason, int]:
    """Records left out by reason."""
    return {Reason[name]: count for name, count in counts(folder / out)["dropped"].items()}


# --- formats -------------------------------------------------------------------------------

MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": "deep/b.png"}},
            ],
        },
        {"role": "assistant", "content": "Blue."},
    ]
}
EXAMPLES: dict[str, tuple[Json, str]] = {
    "llava": (llava(), " [USER]: (1)What is it? [ASSISTANT]: A wall."),
    "llava, two pictures": (
        llava(
            image=["a.png", "deep/b.png"],
            conversations=talk("<image> or <image>?", "First.", "Why?", "Red."),
        ),
        " [USER]: (1)</s> [USER]: or(1)? [ASSISTANT]: First.</s> [USER]: Why? [ASSISTANT]: Red.",
    ),
    "llava, no mark": (
        llava(conversations=talk("What?", "A wall.")),
        " [USER]: (1)What? [ASSISTANT]: A wall.",
    ),
    "llava, a clip": (
        {"video": "v_clip", "conversations": talk("<video>\nWhat?", "A film.")},
        " [USER]: (8)What? [ASSISTANT]: A film.",
    ),
    "sharegpt": (
        {"id": "x", "conversations": talk("Hi <image>", "Hello", "Bye", "Bye [USER]")},
        " [USER]: Hi <image> [ASSISTANT]: Hello</s> [USER]: Bye [ASSISTANT]: Bye [USER]",
    ),
    "sharegpt, system": (
        {"conversations": [{"from": "system", "value": "Be kind."}, *talk("Hi", "Hello")]},
        "Be kind. [USER]: Hi [ASSISTANT]: Hello",
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        " [USER]: Add.\n1, 2 [ASSISTANT]: 3",
    ),
    "alpaca, no input": (
        {"instruction": "Say a word.", "input": "", "output": "Word", "history": [["Hi", "Ho"]]},
        " [USER]: Hi [ASSISTANT]: Ho</s> [USER]: Say a word. [ASSISTANT]: Word",
    ),
    "videochat": (
        {"video": "v_clip", "QA": [{"i": "Watch.", "q": "What?", "a": "A film."}]},
        " [USER]: (8)Watch.\nWhat? [ASSISTANT]: A film.",
    ),
    "videochat, several": (
        {"video": "v_clip", "QA": [{"q": "What?", "a": "Red."}, {"q": "More?", "a": "No."}]},
        " [USER]: (8)</s> [USER]: What? [ASSISTANT]: Red.</s> [USER]: More? [ASSISTANT]: No.",
    ),
    "video-chatgpt": (
        {"video_id": "v_clip", "q": "What?", "a": "A film."},
        " [USER]: (8)What? [ASSISTANT]: A film.",
    ),
    "messages": (MESSAGES, "Be short. [USER]: What is it?(1) [ASSISTANT]: Blue."),
    "messages, images apart": (
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Eh?"}]},
                {"role": "assistant", "content": "Red."},
            ],
        },
        " [USER]: (1)Eh? [ASSISTANT]: Red.",
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_format_is_found_out_and_read(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, text = EXAMPLES[name]
    assert ingest(folder, [record], "--system", "none") == ExitCode.DONE
    (document,) = written(folder / "out")
    assert shown(document) == text
    form = name.partition(",")[0]
    assert document.meta["format"] == form and document.sample_id == "chat-00000001"
    assert f"read as {form}:" in capsys.readouterr().out
    system = document.parts[0]
    assert not system.markup or system.text == " [USER]: "  # a record's own words are no markup


def test_lines_and_an_array_hold_the_same_records(folder: Path) -> None:
    records = [llava(), llava(image="deep/b.png")]
    assert ingest(folder, records) == 0
    array = written(folder / "out")
    lines = "\ufeff" + "\n".join(json.dumps(record) for record in records) + "\n\n"
    assert ingest(folder, lines, out="lines") == 0
    assert written(folder / "lines") == array and len(array) == 2


def test_pictures_are_kept_as_they_are_and_frames_in_order(folder: Path) -> None:
    clip = {"video": "v_clip", "conversations": talk("<video>", "A film.")}
    data = "data:image/png;base64," + base64.b64encode(BLUE).decode()
    assert ingest(folder, [llava(), clip, llava(image=data)]) == 0
    first, second, third = written(folder / "out")
    assert first.parts[2].media == (RED,) and third.parts[2].media == (BLUE,)
    frames = next(part for part in second.parts if part.modality is Modality.video).media
    chosen = (0, 2, 3, 5, 6, 8, 9, 11)  # evenly spaced, by number and not by letters
    assert frames == tuple(png((20 * number, 0, 0)) for number in chosen)


def test_clips_are_named_by_an_id_and_a_broken_film_by_its_record(
    folder: Path,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    film(folder / "v_film.mp4", 22)
    (folder / "v_cut.mkv").write_bytes((folder / "v_film.mp4").read_bytes()[:500])
    names = ["v_film", "v_cut", "v_film.mp4"]
    records = [{"video_id": name, "q": "What?", "a": "Grey."} for name in names]
    assert ingest(folder, records, "--max-failures", "0.5") == 0
    assert dropped(folder) == {Reason.undecodable: 1} and "record 2" in lines[0]
    first, second = (document.parts[2].media for document in written(folder / "out"))
    assert first == second and len(first) == 8
    greys = [np.asarray(Image.open(io.BytesIO(blob)), np.float64).mean() for blob in first]
    assert greys == pytest.approx([24 * number for number in range(8)], abs=6)
    monkeypatch.setattr(video, "av", None)
    assert ingest(folder, records, out="again") == ExitCode.MISSING
    assert "pip install 'mmtrain[video]'" in capsys.readouterr().err


def test_other_kinds_of_pictures_become_png(folder: Path) -> None:
    Image.new("RGB", (28, 28), (200, 30, 30)).save(folder / "c.gif")
    assert ingest(folder, [llava(image="c.gif")]) == 0
    assert written(folder / "out")[0].parts[2].media[0].startswith(b"\x89PNG")


def test_system_messages_follow_the_record_or_the_option(folder: Path) -> None:
    (folder / "own.txt").write_text("Look: [IMG]here[/IMG]\n")
    clip = {"video": "v_clip", "conversations": talk("<video>", "A film.")}
    records = [llava(), clip, {"conversations": talk("Hi", "Ho")}]
    beginnings = {
        "auto": [SYSTEM["image"], SYSTEM["video"], " [USER]: "],
        "image": [SYSTEM["image"]] * 3,
        "none": [" [USER]: "] * 3,
        str(folder / "own.txt"): ["Look: [IMG]here[/IMG]"] * 3,
    }
    for number, (system, expected) in enumerate(beginnings.items()):
        assert ingest(folder, records, "--system", system, out=f"o{number}") == 0
        found = [document.parts[0] for document in written(folder / f"o{number}")]
        assert [part.text for part in found] == expected and all(part.markup for part in found)
    assert ingest(folder, records, "--system", "imagge") == ExitCode.MISSING


def test_lengths_are_counted_with_a_tokenizer(
    folder: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = str(shapes / "tokenizer")
    assert ingest(folder, [llava()], "--tokenizer", tokenizer, "--system", "none") == 0
    vocabulary = load_vocabulary(shapes / "tokenizer")
    lengths = load_lengths(open_shards(folder / "out"), vocabulary).document(0)
    assert [part.size for part in lengths.parts[:2]] == [2, 1] and lengths.kind == "chat"


# --- broken records ------------------------------------------------------------------------

BROKEN: dict[str, tuple[Any, Reason, str]] = {
    "a number": (3, Reason.fields, "wanted: a table of image, conversations"),
    "no conversations": ({"image": "a.png"}, Reason.fields, "conversations is missing"),
    "a text of them": (llava(conversations="x"), Reason.fields, "is a text; wanted: a list"),
    "no turns": (llava(conversations=[]), Reason.unanswered, "nobody says anything"),
    "no answer": (
        llava(conversations=talk("<image> What?")),
        Reason.unanswered,
        "nobody answers",
    ),
    "an empty answer": (
        llava(conversations=talk("<image> What?", " \n")),
        Reason.unanswered,
        "turn 2, of assistant, is empty",
    ),
    "an empty question": (
        llava(conversations=talk("<image> What?", "A.", "", "B.")),
        Reason.empty,
        "turn 3, of user, is empty",
    ),
    "an answer first": (
        llava(conversations=talk("<image>", "A.", "B?", "C.")[1:]),
        Reason.order,
        "turn 1 is of assistant, wanted: user",
    ),
    "two questions": (
        llava(conversations=[*talk("<image>"), *talk("More?", "A.")]),
        Reason.order,
        "turn 2 is of user",
    ),
    "a tool": (
        llava(conversations=[{"from": "tool", "value": "x"}]),
        Reason.order,
        "unknown role 'tool'",
    ),
    "a value of null": (
        llava(conversations=[{"from": "human", "value": None}]),
        Reason.fields,
        "value is nothing; wanted: text",
    ),
    "a picture that is not there": (
        llava(image="c.png"),
        Reason.missing,
        "c.png is not there",
    ),
    "a folder as a picture": (llava(image="deep"), Reason.missing, "deep cannot be read"),
    "an address": (
        llava(image="https://x.org/a.png"),
        Reason.missing,
        "nothing is fetched: name a file",
    ),
    "a damaged picture": (llava(image="cut.png"), Reason.undecodable, "cut.png cannot be decoded"),
    "a text as a picture": (llava(image="no.png"), Reason.undecodable, "no.png cannot be decoded"),
    "a name of null bytes": (llava(image="a\0.png"), Reason.missing, "cannot be read"),
    "a picture too few": (
        llava(conversations=talk("<image><image>", "A.")),
        Reason.marks,
        "2 marks <image>, 1 named to stand there",
    ),
    "a picture that nobody names": (
        {"conversations": talk("<image>", "A.")},
        Reason.marks,
        "1 marks <image>, 0 named",
    ),
    "half a character": (
        llava(conversations=talk("<image> \ud83d", "A.")),
        Reason.text,
        "is half a character",
    ),
    "a clip that is not there": (
        {"video": "none", "conversations": talk("<video>", "A.")},
        Reason.missing,
        "none is not there",
    ),
}


@pytest.fixture
def spoilt(folder: Path) -> Path:
    (folder / "cut.png").write_bytes(RED[:-30])
    (folder / "no.png").write_text("no picture")
    return folder


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is logged, line by line."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mmtrain.data.ingest.run")
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "propagate", False)
    yield found
    logger.removeHandler(handler)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_left_out_named_and_counted(
    name: str, spoilt: Path, lines: list[str]
) -> None:
    record, reason, said = BROKEN[name]
    records = [llava(), record, llava()]
    assert ingest(spoilt, records, "--format", "llava", "--max-failures", "0.5") == 0
    found = counts(spoilt / "out")
    assert dropped(spoilt) == {reason: 1} and (found["records"], found["documents"]) == (3, 2)
    (line,) = lines
    assert said in line and "chat.json record 2" in line
    assert [d.sample_id[-1] for d in written(spoilt / "out")] == ["1", "3"]


def test_all_reasons_together_are_one_line_each_and_a_table(
    spoilt: Path, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record for record, _, _ in BROKEN.values()]
    options = ["--format", "llava", "--max-failures", "0.5"]
    assert ingest(spoilt, [*records, *[llava()] * len(records)], *options) == 0
    out = capsys.readouterr().out
    assert f"{len(records)} records left out" in out and "2 no answer" not in out
    for reason in {reason for _, reason, _ in BROKEN.values()}:
        assert reason.value in out
    assert len(lines) == 21 and "counted, not shown" in lines[-1]  # 20, then no more


def test_too_many_broken_records_write_nothing(
    spoilt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [llava(image="none.png")] * 2 + [llava()] * 18
    assert ingest(spoilt, records) == ExitCode.CONTENT
    error = capsys.readouterr().err
    assert "2 of 20 records are broken as llava (2 picture or clip not there)" in error
    assert "allowed is a share of 0.05; nothing was published" in error
    before = sorted(path.name for path in spoilt.iterdir())
    assert "out" not in before and not any("partial" in name for name in before)
    assert ingest(spoilt, records, "--max-failures", "0.1") == 0


def test_nothing_but_broken_records_is_content_invalid_whatever_is_allowed(spoilt: Path) -> None:
    records = [llava(image="none.png")] * 3
    assert ingest(spoilt, records, "--max-failures", "1") == ExitCode.CONTENT
    assert not (spoilt / "out").exists()


def test_a_hopeless_file_is_given_up_early(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_HOPELESS", 5)
    records = [llava(image="x.png")] * 9 + [llava()] * 900
    assert ingest(folder, records) == ExitCode.CONTENT
    error = capsys.readouterr().err
    assert re.search(r"all of the 5 records read are .*--images the folder", error)


def test_a_last_question_without_an_answer_is_cut_and_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingest(folder, [{"conversations": talk("Hi", "Ho", "And?")}]) == 0
    assert shown(written(folder / "out")[0]) == " [USER]: Hi [ASSISTANT]: Ho"
    assert "1 last questions without an answer cut" in capsys.readouterr().out


# --- broken files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "holds no record"),
        ("[]", "holds no record"),
        ("hello", "begins with 'h'; wanted: a JSON array of records, or one JSON"),
        ('{\n"a": 1}', "is one JSON object over several lines; wanted: an array"),
        (
            '[{"a": 1}, {"b": 2}]',
            r"no known format \(the first has keys a\); name it with --format",
        ),
        ("[1, 2]", "the first has no tables of keys"),
        (json.dumps([llava()])[:-1], r"no JSON array from record 2 on \(line 1\).*the end"),
        (json.dumps([llava()])[:-9], r"no JSON array from record 1 on .*Was it cut short"),
        (json.dumps([llava()]) + "x", "after the closing"),
        (json.dumps([llava(), llava()], indent=1).replace("},\n {", "}\n {"), "wanted: ',' or ']'"),
        ("[" * 20_000, "no JSON array from record 1"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused(
    text: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingest(folder, text) == ExitCode.CONTENT
    assert re.search(said, capsys.readouterr().err)
    assert not (folder / "out").exists()


def test_files_that_are_not_there_are_missing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none, out = folder / "none.json", folder / "out"
    cases: list[tuple[Path, list[object], ExitCode, str]] = [
        (none, [], ExitCode.MISSING, "none.json is not there"),
        (folder / "deep", [], ExitCode.MISSING, "holds no .jsonl or .json"),
        (none, ["--tokenizer", folder / "none"], ExitCode.MISSING, "tokenizer folder"),
    ]
    for source, options, code, said in cases:
        assert foreign.ingest("chat", source, out, *options) == code
        assert said in capsys.readouterr().err and not out.exists()
    out.mkdir()
    assert foreign.ingest("chat", none, out) == ExitCode.CONTENT
    assert "never overwritten" in capsys.readouterr().err


def test_a_broken_line_is_one_broken_record(folder: Path, lines: list[str]) -> None:
    text = "\n".join([json.dumps(llava()), '{"id": 3,', "[1", "\x80", json.dumps(llava())])
    assert ingest(folder, text.encode("latin-1"), "--max-failures", "0.6") == 0
    assert dropped(folder) == {Reason.syntax: 3} and counts(folder / "out")["documents"] == 2
    assert "record 2 left out: no JSON" in lines[0]


def test_an_array_is_read_as_a_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size of chunk gives the same records, and no more than needed is kept."""
    records = [{"n": n, "text": '\u00e9\\"]},[' * (n % 7), "deep": [[n], {}]} for n in range(60)]
    path = folder / "many.json"
    path.write_text(json.dumps([*records, 12, -1.5e3, None, "x"], ensure_ascii=False, indent=1))
    expected = [*records, 12, -1.5e3, None, "x"]
    for chunk in (1, 2, 7, 64, 1 << 20):
        monkeypatch.setattr(json_records, "_CHUNK", chunk)
        found = list(read_records(path))
        assert [record.value for record in found] == expected
        assert [record.number for record in found] == list(range(1, len(expected) + 1))
    monkeypatch.setattr(json_records, "_CHUNK", 64)
    monkeypatch.setattr(json_records, "_LONGEST", 200)
    path.write_text('[{"a": "' + "x" * 10_000)
    with pytest.raises(ContentError, match="no JSON array from record 1"):
        list(read_records(path))


# --- anything ------------------------------------------------------------------------------


def _spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _spots(value[key], (*path, key))


def _mutated(record: Json, chance: random.Random) -> Any:
    """A record with one spot taken out or replaced."""
    record = copy.deepcopy(record)
    spot = chance.choice(list(_spots(record)))
    place: Any = record
    for key in spot[:-1]:
        place = place[key]
    odd: list[Any] = [None, 0, -1.5, True, "", " ", "<image>", "\ud800", "a\0", [], {}, [[]]]
    odd += [{"from": "gpt"}, "x" * 5000, "../a.png", "human", "gpt", "\u202e[IMG]</s>", ["a.png"]]
    if chance.random() < 0.3:
        del place[spot[-1]]
    else:
        place[spot[-1]] = chance.choice(odd)
    return record


def test_mutated_records_are_all_counted_and_none_is_a_crash(spoilt: Path) -> None:
    chance = random.Random(0)
    sound = [
        llava(),
        llava(conversations=talk("What?\n<image>", "A.", "B?", "C.")),
        llava(image=["a.png", "deep/b.png"], conversations=talk("<image><image> Which?", "A.")),
        {"video": "v_clip", "conversations": talk("<video>", "A.")},
    ]
    records = [_mutated(chance.choice(sound), chance) for _ in range(500)]
    options = ["--format", "llava", "--max-failures", "1"]
    assert ingest(spoilt, [*sound, *records], *options) == 0
    kept, broken = counts(spoilt / "out")["documents"], dropped(spoilt)
    assert counts(spoilt / "out")["records"] == 504 == kept + sum(broken.values())
    assert len(written(spoilt / "out")) == kept
    assert len(broken) >= 6 and 50 < kept < 450


def test_mutated_bytes_are_records_or_one_clear_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(1)
    sound = [llava(), llava(conversations=talk("<image> A?", "B.", "C?", "D."))]
    texts = (json.dumps(sound), "\n".join(map(json.dumps, sound)))
    outcomes = set[str]()
    for number in range(150):
        content = bytearray(texts[number % 2].encode())
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(content))
            content[at : at + chance.randrange(2)] = chance.randbytes(chance.randrange(3))
        options = ["--format", "llava", "--max-failures", "0.9"]
        out = f"out{number}"
        if code := ingest(folder, bytes(content), *options, out=out):
            assert code == ExitCode.CONTENT and not (folder / out).exists()
            assert str(folder / "chat.json") in capsys.readouterr().err
            outcomes.add("refused")
            continue
        found = counts(folder / out)
        assert found["records"] == found["documents"] + sum(found["dropped"].values())
        outcomes.add("written")
    assert outcomes == {"refused", "written"}
