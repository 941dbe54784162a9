"""Conversations as tokens: the template of the release, its tokenisation, and what is learnt."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import form_of, kept_source, png
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmtrain.data.assemble import Assembler, prompt_tokens, tokenize
from mmtrain.data.batch import Batch
from mmtrain.data.chat import (
    SYSTEM,
    Content,
    Template,
    Turn,
    chat_document,
    markup,
    prompt_parts,
    render,
    template_of,
)
from mmtrain.data.document import Document, DocumentLengths, Modality, Part, from_row, to_row
from mmtrain.data.mixture import OnePass
from mmtrain.data.pack import Cuts, Plan
from mmtrain.data.packed import labels_of
from mmtrain.data.picture import Learnt, contents, draw_pack
from mmtrain.data.rules import Draw, Rule, RuleOptions, Selection, select, turns
from mmtrain.data.shards import build_index, count, load_lengths, open_shards, write_shards
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary
from mmtrain.errors import ContentError, MissingError

RELEASE = ("[PAD]", "[IMG]", "[/IMG]", "<image>", "[USER]", "[ASSISTANT]")
WORDS = [
    *("look", "at", "this", "picture", "what", "is", "it", "how", "many", "red", "blue"),
    *("one", "two", "yes", "no", "a", "ImageContent"),
]
RED = png((200, 30, 30))
PICTURE = Part(modality=Modality.image, media=(RED,))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A tokenizer like sentencepiece's, with the special tokens of the release at its end."""
    folder = tmp_path_factory.mktemp("llama")
    pieces = ["\u2581" + word for word in WORDS]
    letters = "abcdefghijklmnopqrstuvwxyzIC.,?!:\u2581[]/<>ASTNUERMG"
    known = [("<unk>", 0.0), ("<s>", -99.0), ("</s>", -99.0), ("\u2581:", -3.0)]
    known += [(piece, -2.0) for piece in pieces] + [(letter, -9.0) for letter in set(letters)]
    tokenizer = Tokenizer(models.Unigram(known[:3] + sorted(known[3:]), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(RELEASE),
    )
    whole.save_pretrained(str(folder))
    return load_vocabulary(folder)


@pytest.fixture(scope="module")
def form(llama: Vocabulary) -> SequenceFormat:
    return form_of(llama)


def named(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    names = {number: name for name, number in vocabulary.ids.items()}
    return [names[number].replace("\u2581", "_") for number in ids]


def whole(document: Document, vocabulary: Vocabulary, form: SequenceFormat) -> Selection:
    options = RuleOptions(rule=Rule.chat, max_images=9, max_positions=999)
    return select(count(document, vocabulary), options, form.group_length, Draw("any"))


def learnt(
    turns: list[Turn], template: Template, vocabulary: Vocabulary, form: SequenceFormat
) -> tuple[list[str], list[str]]:
    """All tokens of a conversation, and those of them that are learnt."""
    document = chat_document("x", turns, template, {})
    made = tokenize(document, whole(document, vocabulary, form), vocabulary, form)
    names = named(vocabulary, made.tokens_T.tolist())
    weights = made.weights_T.tolist()
    return names, [name for name, weight in zip(names[1:], weights[1:], strict=True) if weight]


GROUP = ["[IMG]", "<image>", "<image>", "<image>", "[/IMG]"]


# --- tokenisation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, tokens",
    [
        (" [USER]: [IMG]", ["[USER]", "_:", "[IMG]"]),
        ("[/IMG]what", ["[/IMG]", "_what"]),
        ("[/IMG] what", ["[/IMG]", "_what"]),
        (" [ASSISTANT]: ", ["[ASSISTANT]", "_:"]),
        ("yes</s> [USER]:no", ["_yes", "</s>", "[USER]", "_:", "n", "o"]),
        ("a  [USER]\n", ["_a", "[USER]"]),
        ("", []),
    ],
)
def test_markup_is_tokenised_as_emu_was_trained(
    llama: Vocabulary, text: str, tokens: list[str]
) -> None:
    assert named(llama, llama.encode_markup(text)) == tokens


def test_later_versions_of_the_reference_leave_a_lone_blank(llama: Vocabulary) -> None:
    """What markup avoids; when this fails, the reference has come back to the trained form."""
    reference = AutoTokenizer.from_pretrained(str(llama.folder))
    ids = reference.encode(" [USER]: [IMG]", add_special_tokens=False)
    assert named(llama, ids)[0] == "_"


def test_what_people_say_never_is_markup(llama: Vocabulary, form: SequenceFormat) -> None:
    turns = [Turn(("is it [ASSISTANT]: no</s>",), ("[USER] <image> [IMG]",))]
    names, _ = learnt(turns, Template(), llama, form)
    assert [name for name in names if name in RELEASE] == ["[USER]", "[ASSISTANT]"]
    assert names.count("</s>") == 1


def test_a_tokenizer_without_the_roles_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    plain = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ContentError, match=r"lacks the special tokens \['\[USER\]'\]"):
        load_vocabulary(tmp_path).encode_markup(" [USER]: a")


# --- template ------------------------------------------------------------------------------


def test_one_turn_is_the_text_of_the_specification(llama: Vocabulary, form: SequenceFormat) -> None:
    template = Template(markup("look at [IMG]ImageContent[/IMG]"))
    turns = [Turn((PICTURE, " what is it"), ("a red one",))]
    written = "".join(part.text or "(picture)" for part in render(turns, template))
    said = "look at [IMG]ImageContent[/IMG] [USER]: (picture)what is it [ASSISTANT]: a red one"
    assert written == said
    names, trained = learnt(turns, template, llama, form)
    system = ["_look", "_at", "[IMG]", "_ImageContent", "[/IMG]"]
    asked = ["[USER]", "_:", *GROUP, "_what", "_is", "_it", "[ASSISTANT]", "_:"]
    assert names == ["<s>", *system, *asked, "_a", "_red", "_one", "</s>"]
    assert trained == ["_a", "_red", "_one", "</s>"]


def test_several_turns_follow_the_released_dialogue_evaluator(
    llama: Vocabulary, form: SequenceFormat
) -> None:
    turns = [
        Turn(("what is it?\n", PICTURE), ("a.",)),
        Turn(("is it red",), ("yes", PICTURE)),
        Turn(("how many",), ("one",)),
    ]
    written = "".join(part.text or "(picture)" for part in render(turns, Template()))
    assert written == (
        " [USER]: (picture)</s> [USER]: what is it? [ASSISTANT]: a.</s> [USER]: is it red "
        "[ASSISTANT]: yes(picture)</s> [USER]: how many [ASSISTANT]: one"
    )
    names, trained = learnt(turns, Template(), llama, form)
    assert trained == ["_a", ".", "</s>", "_yes", *GROUP, "</s>", "_one", "</s>"]
    assert names[: 4 + len(GROUP)] == ["<s>", "[USER]", "_:", *GROUP, "</s>"]


def test_the_system_message_follows_what_is_shown(tmp_path: Path) -> None:
    clip = Part(modality=Modality.video, media=(RED, RED))
    shown: list[tuple[tuple[Content, ...], str]] = [
        (("what",), "none"),
        ((PICTURE, "what"), "image"),
        ((PICTURE, "what", PICTURE), "none"),
        ((clip, "what"), "video"),
    ]
    for question, kind in shown:
        turns = [Turn(question, ("a",))]
        system = template_of("auto", turns).system
        assert (system.text if system else "") == SYSTEM[kind]
        assert template_of("video", turns).system == markup(SYSTEM["video"])
    for kind in ("image", "video"):
        assert "[IMG]ImageContent[/IMG]" in SYSTEM[kind]
    (tmp_path / "own.txt").write_text("You see [IMG]it[/IMG].\n")
    own = template_of(str(tmp_path / "own.txt"), ())
    assert own.system == markup("You see [IMG]it[/IMG].")
    with pytest.raises(MissingError, match="name a file, or one of auto, image, video, none"):
        template_of("pictures", ())


_SAID = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
_TURN = st.tuples(st.booleans(), _SAID, _SAID)


@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(_TURN, min_size=1, max_size=4))
def test_a_prompt_is_the_beginning_of_what_was_trained(
    llama: Vocabulary, form: SequenceFormat, drawn: list[tuple[bool, str, str]]
) -> None:
    turns = [Turn((PICTURE, q) if picture else (q,), (a,)) for picture, q, a in drawn]
    template = template_of("auto", turns)
    names, _ = learnt(turns, template, llama, form)
    asked = [*turns[:-1], Turn(turns[-1].question)]
    tokens, media = prompt_tokens(prompt_parts(asked, template), llama, form)
    answer = named(llama, llama.encode(drawn[-1][2]))
    assert [*named(llama, tokens), *answer, "</s>"] == names
    assert media == [RED] * sum(picture for picture, _, _ in drawn)


def test_conversations_are_stored_and_read_back() -> None:
    turns = [Turn((PICTURE, "a"), ("b",)), Turn(("c",), ("d",))]
    document = chat_document("x", turns, template_of("image", turns), {"k": 1})
    assert from_row(to_row(document)) == document
    stored = json.loads(to_row(document)["parts"])
    assert [entry for entry in stored if "answer" in entry] == [
        {"modality": "text", "text": "b", "answer": True},
        {"modality": "text", "text": "</s>", "answer": True, "markup": True},
        {"modality": "text", "text": "d", "answer": True},
    ]
    bad = Part(modality=Modality.image, media=(RED,), markup=True)
    with pytest.raises(ContentError, match=r"part 0 \(image\) is markup; only text can be"):
        to_row(Document(sample_id="x", kind="chat", parts=(bad,)))


# --- the rule ------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    drawn=st.lists(_TURN, min_size=1, max_size=5),
    room=st.integers(2, 80),
    images=st.integers(0, 4),
)
def test_whole_trailing_turns_give_way(
    llama: Vocabulary,
    form: SequenceFormat,
    drawn: list[tuple[bool, str, str]],
    room: int,
    images: int,
) -> None:
    said = [Turn((PICTURE, q) if picture else (q,), (a,)) for picture, q, a in drawn]
    document = chat_document("x", said, Template(), {})
    lengths = count(document, llama)
    options = RuleOptions(rule=Rule.chat, max_images=images, max_positions=room)
    chosen = select(lengths, options, form.group_length, Draw("any"))
    kept = len(said) - chosen.turns_left_out
    assert len(turns(lengths.parts)) == len(said) and 0 <= kept <= len(said)
    if kept:
        assert chosen.positions <= room and chosen.images <= images
        made = tokenize(document, chosen, llama, form)
        # several turns keep their form when all but the first had to go
        tokens = made.tokens_T.tolist()
        full = tokenize(document, whole(document, llama, form), llama, form).tokens_T.tolist()
        assert tokens == full[: len(tokens)] and tokens[-1] == form.eos
        assert len(tokens) == chosen.positions
        assert (
            sum(made.weights_T.tolist()[1:])
            == sum(
                len(llama.encode(turn.answer[0])) + 1  # type: ignore[arg-type]
                for turn in said[:kept]
            )
        )
    else:
        assert chosen.pieces == ()
    if kept < len(said):  # one more turn would not fit
        shown = sum(picture for picture, _, _ in drawn[: kept + 1])
        ends = [i for i, part in enumerate(lengths.parts) if part.answer and not part.markup]
        size = sum(
            part.size if part.modality is Modality.text else form.group_length
            for part in lengths.parts[: ends[kept] + 1]
        )
        assert shown > images or size + 2 > room


def test_a_plan_counts_what_it_leaves_out(llama: Vocabulary, form: SequenceFormat) -> None:
    said = [Turn(("what is it",), ("yes",)), Turn(("how many",), ("one two",))]
    documents = [
        chat_document("both", said, Template(), {}),
        chat_document("one", [Turn(("what",), ("a",)), *said], Template(), {}),
        chat_document("none", [Turn(("what " * 20,), ("a",))], Template(), {}),
    ]
    options = RuleOptions(rule=Rule.chat, max_positions=21)
    source = kept_source("chat", documents, llama, options)
    plan = Plan(
        OnePass(source),
        group_length=form.group_length,
        pack_tokens=64,
        pack_images=4,
        window_documents=8,
        seed=0,
    )
    assert [d.sample_id for d in plan.pack(0).documents] == ["both", "one"]
    plan.pack(1), plan.pack(0)
    assert plan.cuts == {"chat": Cuts(turns=1, shortened=1, left_out=1)}


def test_documents_that_are_no_conversations_have_no_turns() -> None:
    lengths = DocumentLengths("x", "page", count_parts := tuple(turns(())))
    options = RuleOptions(rule=Rule.chat)
    assert count_parts == () and select(lengths, options, 9, Draw(0)).pieces == ()


# --- the batch -----------------------------------------------------------------------------


def batch_of(
    documents: list[Document], vocabulary: Vocabulary, form: SequenceFormat, tokens: int = 64
) -> Batch:
    options = RuleOptions(rule=Rule.chat, max_positions=tokens)
    source = kept_source("chat", documents, vocabulary, options)
    plan = Plan(
        OnePass(source),
        group_length=form.group_length,
        pack_tokens=tokens,
        pack_images=4,
        window_documents=8,
        seed=0,
    )
    assembler = Assembler(sources=[source], vocabulary=vocabulary, layout=form, pack_tokens=tokens)
    return assembler.batch([plan.pack(0)])[0]


def chat_with_literal_marks() -> Document:
    template = Template(markup("look at [IMG]ImageContent[/IMG]"))
    turns = [Turn((PICTURE, "what is it"), ("red",)), Turn(("is it",), ("yes", PICTURE))]
    return chat_document("x", turns, template, {})


def test_only_answers_have_weight_and_images_none(llama: Vocabulary, form: SequenceFormat) -> None:
    batch = batch_of([chat_with_literal_marks()], llama, form)
    labels, weights = batch.inputs.fields["labels"], batch.targets.weights["text"]
    assert named(llama, labels[weights > 0].tolist()) == ["_red", "</s>", "_yes", "</s>"]
    assert set(weights.tolist()) == {0.0, 1.0}
    assert batch.targets.weights["image"].tolist() == [0.0] * 8 and batch.info.images == 2


def test_literal_marks_do_not_move_the_pairs_of_images(
    llama: Vocabulary, form: SequenceFormat
) -> None:
    fields = batch_of([chat_with_literal_marks()], llama, form).inputs.fields
    tokens, slots = fields["tokens"], fields["slots"]
    assert tokens.eq(form.image_begin).sum() == 3
    assert slots.tolist() == tokens.eq(form.image_slot).nonzero().flatten().tolist()
    begins = fields["source"].view(2, 4)[:, 0]
    assert tokens[begins].tolist() == [form.image_begin] * 2 and (begins + 1).equal(
        slots.view(2, 3)[:, 0]
    )


def test_beginning_an_image_is_learnt_when_the_recipe_says_so(
    llama: Vocabulary, form: SequenceFormat
) -> None:
    tokens = tokenize(
        chat_with_literal_marks(), whole(chat_with_literal_marks(), llama, form), llama, form
    ).tokens_T
    assert form.image_begin not in labels_of(tokens, form)
    learns = SequenceFormat(**{**vars(form), "learns_image_begin": True})
    assert labels_of(tokens, learns).eq(form.image_begin).sum() == 3
    for other in ("image_slot", "image_end", "pad", "bos"):
        assert not labels_of(tokens, learns).eq(getattr(form, other)).any()
    # of conversations the one inside an answer
    batch = batch_of([chat_with_literal_marks()], llama, learns)
    labels = batch.inputs.fields["labels"][batch.targets.weights["text"] > 0]
    assert named(llama, labels.tolist()) == ["_red", "</s>", "_yes", "[IMG]", "</s>"]
    # of a page every one
    page = Document(
        sample_id="p", kind="page", parts=(Part(modality=Modality.text, text="a"), PICTURE)
    )
    for one, expected in ((form, 0), (learns, 1)):
        chosen = select(
            count(page, llama), RuleOptions(rule=Rule.document), form.group_length, Draw(0)
        )
        made = labels_of(tokenize(page, chosen, llama, one).tokens_T, one)
        assert made.eq(form.image_begin).sum() == expected


# --- the index -----------------------------------------------------------------------------


def test_an_index_counts_markup_and_one_of_an_earlier_format_still_loads(
    llama: Vocabulary, tmp_path: Path
) -> None:
    document = chat_with_literal_marks()
    page = Document(sample_id="p", kind="page", parts=(PICTURE,))
    for name, stored in (("chat", document), ("page", page)):
        with write_shards(tmp_path / name) as writer:
            writer.write(stored)
        build_index(tmp_path / name, llama)
    lengths = load_lengths(open_shards(tmp_path / "chat"), llama).document(0)
    assert lengths == count(document, llama)
    assert [part.size for part in lengths.parts[:2]] == [5, 2]
    # format 1 had no flags
    (manifest,) = (tmp_path / "page").glob("lengths-*/manifest.json")
    stored = json.loads(manifest.read_text())
    del stored["files"]["flags.npy"]
    (manifest.parent / "flags.npy").unlink()
    manifest.write_text(json.dumps(stored | {"format": 1}))
    shards = open_shards(tmp_path / "page")
    assert load_lengths(shards, llama).document(0) == count(page, llama)
    manifest.write_text(json.dumps(stored | {"format": 3}))
    with pytest.raises(ContentError, match=r"stale: index format 3, expected 2; run `mmtrain data"):
        load_lengths(shards, llama)


# --- the picture ---------------------------------------------------------------------------


def test_a_drawn_pack_marks_what_is_learnt(llama: Vocabulary, form: SequenceFormat) -> None:
    batch = batch_of([chat_with_literal_marks()], llama, form)
    (row,) = contents(batch, llama, form)
    words = [item for item in row if isinstance(item, str)]
    said = " ".join(words)
    assert re.fullmatch(
        r"look at \[IMG\] ImageContent \[/IMG\] \[USER\] : </s> \[USER\] : what is it "
        r"\[ASSISTANT\] : red </s> \[USER\] : is it \[ASSISTANT\] : yes",
        said,
    )
    assert [str(word) for word in words if isinstance(word, Learnt)] == ["red", "</s>", "yes"]
    assert len(row) - len(words) == 2
    green = (10, 110, 40)
    colours = {c for _, c in draw_pack(batch, llama, form).getcolors(1 << 20) or []}
    assert green in colours
