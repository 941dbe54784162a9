"""Questions about the world of shapes, and whether an answer is right.

what colour is the circle ?                    red
what shape is red ?                            a circle
how many red squares are there ?               three
where is the red circle ?                      left of the blue square
what is left of the blue square ?              the red circle
what size is the red circle ?                  small
is there a red circle ?                        yes
describe the picture                           a sentence of `data.shapes_text`
what do one and two make ?                     three        (without a picture, as are these)
what is the opposite of left ?                 right
how many corners has a square ?                four
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain.data.rules import Draw
from mmtrain.data.shapes_text import (
    CORNERS,
    NUMBERS,
    OPPOSITES,
    Category,
    article,
    caption,
    judge,
    plural,
    relation,
    scene,
)
from mmtrain.data.shapes_world import Facts, kinds

TEXT_ALONE = 6  # one conversation of so many has no picture
MOST_TURNS = 3


@dataclass(frozen=True)
class Said:
    """A question, its kind and its answer."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Dialogue:
    """Questions about one scene; no objects, no picture."""

    said: tuple[Said, ...]
    objects: list[dict[str, Any]]
    category: str

    @property
    def facts(self) -> dict[str, Any]:
        """What `judge_answer` needs, as the meta of a document."""
        return {
            "question_kind": [said.kind for said in self.said],
            "questions": [said.question for said in self.said],
            "answers": [said.answer for said in self.said],
            "objects": self.objects,
            "scene": self.category,
        }


def converse(draw: Draw, number: int) -> Dialogue:
    """One to three different questions; kinds of scenes take turns by `number`."""
    count = 1 + draw.below(MOST_TURNS)
    if number % TEXT_ALONE == TEXT_ALONE - 1:
        asked = [_without_picture(draw) for _ in range(count)]
        return Dialogue(tuple(dict.fromkeys(asked)), [], "text")
    category = list(Category)[(number - number // TEXT_ALONE) % len(Category)]
    objects = scene(draw, category, kinds())
    open_questions = list(_QUESTIONS[category])
    said = []
    for _ in range(min(count, len(open_questions))):
        ask = open_questions.pop(draw.below(len(open_questions)))
        said.append(ask(draw, category, objects))
    return Dialogue(tuple(said), objects, category.value)


def judge_answer(answer: str, facts: Facts, turn: int = 0) -> bool:
    """Whether an answer is right.

    Args:
        answer: in any case; articles, "it is" and a final stop are free.
        facts: `meta` of the document.
        turn: which question of it, from 0.
    """
    if facts["question_kind"][turn] == "describe":
        return judge(answer, {"category": facts["scene"], "objects": facts["objects"]})
    return _plain(answer) == _plain(facts["answers"][turn])


_FREE = ("it is ", "there are ", "there is ", "the ", "a ", "an ")


def _plain(text: str) -> str:
    words = " ".join(text.lower().split()).rstrip(" .")
    for start in _FREE:
        words = words.removeprefix(start)
    return words


# --- questions -----------------------------------------------------------------------------

_Objects = Sequence[Facts]


def _name(item: Facts) -> str:
    return f"{item['colour']} {item['shape']}"


def _colour(draw: Draw, category: Category, objects: _Objects) -> Said:
    item = objects[draw.below(len(objects))]
    return Said("colour", f"what colour is the {item['shape']} ?", item["colour"])


def _shape(draw: Draw, category: Category, objects: _Objects) -> Said:
    item = objects[draw.below(len(objects))]
    return Said("shape", f"what shape is {item['colour']} ?", article(item["shape"]))


def _crowd_colour(draw: Draw, category: Category, objects: _Objects) -> Said:
    first = objects[0]
    return Said("colour", f"what colour are the {plural(first['shape'])} ?", first["colour"])


def _count(draw: Draw, category: Category, objects: _Objects) -> Said:
    first = objects[0]
    number = next(word for word, count in NUMBERS.items() if count == len(objects))
    named = f"{first['colour']} {plural(first['shape'])}"
    return Said("counting", f"how many {named} are there ?", number)


def _place(draw: Draw, category: Category, objects: _Objects) -> Said:
    one, other = _in_some_order(draw, objects)
    answer = f"{relation(one, other)} the {_name(other)}"
    return Said("place", f"where is the {_name(one)} ?", answer)


def _neighbour(draw: Draw, category: Category, objects: _Objects) -> Said:
    one, other = _in_some_order(draw, objects)
    question = f"what is {relation(one, other)} the {_name(other)} ?"
    return Said("neighbour", question, f"the {_name(one)}")


def _size(draw: Draw, category: Category, objects: _Objects) -> Said:
    item = objects[draw.below(len(objects))]
    return Said("size", f"what size is the {_name(item)} ?", item["size"])


def _presence(draw: Draw, category: Category, objects: _Objects) -> Said:
    there = sorted({(item["colour"], item["shape"]) for item in objects})
    absent = [kind for kind in kinds() if kind not in there]
    asked, answer = (there, "yes") if draw.chance(0.5) else (absent, "no")
    named = " ".join(asked[draw.below(len(asked))])
    return Said("presence", f"is there {article(named)} ?", answer)


def _describe(draw: Draw, category: Category, objects: _Objects) -> Said:
    return Said("describe", "describe the picture", caption(category, objects)[0])


def _in_some_order(draw: Draw, objects: _Objects) -> tuple[Facts, Facts]:
    first, second = objects
    return (first, second) if draw.chance(0.5) else (second, first)


_Ask = Callable[[Draw, Category, _Objects], Said]
_ONE: tuple[_Ask, ...] = (_colour, _shape, _presence, _describe)
_TWO: tuple[_Ask, ...] = (_colour, _shape, _place, _neighbour, _presence, _describe)
_QUESTIONS: dict[Category, tuple[_Ask, ...]] = {
    Category.single: _ONE,
    Category.colour: _ONE,
    Category.counting: (_crowd_colour, _count, _presence, _describe),
    Category.two: _TWO,
    Category.position: _TWO,
    Category.binding: (_colour, _shape, _size, _presence, _describe),
}


def _without_picture(draw: Draw) -> Said:
    match draw.below(3):
        case 0:
            words = list(NUMBERS)
            left = draw.below(4)
            right = draw.below(4 - left)
            question = f"what do {words[left]} and {words[right]} make ?"
            return Said("sum", question, words[left + right + 1])
        case 1:
            pair = OPPOSITES[draw.below(len(OPPOSITES))]
            one, other = pair if draw.chance(0.5) else pair[::-1]
            return Said("opposite", f"what is the opposite of {one} ?", other)
        case _:
            shape = list(CORNERS)[draw.below(len(CORNERS))]
            return Said("corners", f"how many corners has {article(shape)} ?", CORNERS[shape])
