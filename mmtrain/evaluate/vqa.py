"""Accuracy of short answers, with the normalisation of the official VQA evaluation.

Visual Question Answering (Antol et al. 2015, arXiv:1505.00468; VQAv2, OK-VQA and VizWiz use the
same measure): ten people answered; an answer counts min(1, people who said the same / 3), averaged
over the ten sets of nine people. Answers are compared after number words, articles, contractions
and punctuation are made equal; when all ten people agree to the letter, nothing is changed.
"""

import re
from collections.abc import Sequence

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")
# an answer with one apostrophe left out is given it back
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""


def _shortened() -> dict[str, str]:
    out = {"somebody'd": "somebodyd"}  # a slip of the official table, kept for equal figures
    for whole in _CONTRACTIONS.split():
        for place, letter in enumerate(whole):
            if letter == "'":
                out[whole[:place] + whole[place + 1 :]] = whole
    return out


_SHORTENED = _shortened()


def normalise(answer: str) -> str:
    """An answer in the form in which answers are compared."""
    words = [_NUMBERS.get(word, word) for word in _unmarked(_plain(answer)).lower().split()]
    return " ".join(_SHORTENED.get(word, word) for word in words if word not in _ARTICLES)


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _unmarked(answer: str) -> str:
    """A mark beside a blank goes; one inside a word parts it, unless digits hold a comma."""
    joins = _DIGIT_COMMA.search(answer) is not None
    out = answer
    for mark in _MARKS:
        beside = f"{mark} " in answer or f" {mark}" in answer
        out = out.replace(mark, "" if beside or joins else " ")
    return _STOP.sub("", out)


def accuracy(answer: str, people: Sequence[str]) -> float:
    """Share of credit of an answer, 0 to 1.

    Args:
        answer: what the model said.
        people: what every person said, ten in the published sets.
    """
    said, told = [_plain(person) for person in people], _plain(answer)
    if len(set(said)) > 1:
        said, told = [normalise(person) for person in said], normalise(told)
    matches = sum(person == told for person in said)
    # without one person: `matches` persons leave out one match each, the others leave out none
    credit = [min(1.0, (matches - (person == told)) / 3) for person in said]
    return sum(credit) / len(credit)
