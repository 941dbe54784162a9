"""Metrics: equal to the published programs where they have one, by golden numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.evaluate import vqa
from mmtrain.evaluate.cider import cider
from mmtrain.evaluate.ranks import ndcg, rank_of, summary
from mmtrain.evaluate.released import answer_of, caption_of
from mmtrain.evaluate.words import caption_words

# left: captions; right: what Stanford's PTBTokenizer 3.4.1 gives, lower case, punctuation dropped
TOKENISED = {
    "A man's dog doesn't like the black-and-white cat; it's cute.":
        "a man 's dog does n't like the black-and-white cat it 's cute",
    "Two people, sitting on a bench (outside), can't see \"the sign\".":
        "two people sitting on a bench -lrb- outside -rrb- ca n't see the sign",
    "I'm gonna buy 3.5 lbs of U.S. beef for $5.00 at 10:30 a.m.!":
        "i 'm gon na buy 3.5 lbs of u.s. beef for $ 5.00 at 10:30 a.m.",
    "The St. Louis arch -- a landmark... isn't it?": "the st. louis arch a landmark is n't it",
    "cannot they've we'll you'd o'clock rock 'n' roll":
        "can not they 've we 'll you 'd o'clock rock 'n' roll",
    "a/b choice, 50% off & more, e-mail me@x.com #1":
        "a/b choice 50 % off & more e-mail me@x.com # 1",
    "the women's room and the dogs' toys": "the women 's room and the dogs toys",
    "1,000 birds in the 1990's sky - wow": "1,000 birds in the 1990 's sky wow",
    "t-shirt with text 'hello' on it": "t-shirt with text hello on it",
    "A boy (age 5) rides [bike] {fast}":
        "a boy -lrb- age 5 -rrb- rides -lsb- bike -rsb- -lcb- fast -rcb-",
    "two-year-old child w/ toy": "two-year-old child w / toy",
    "Mr. Smith and Dr. Jones vs. them etc.": "mr. smith and dr. jones vs. them etc.",
    "someone is flying a kite.A man standing": "someone is flying a kite.a man standing",
    "A dog, wearing a Santa hat!!": "a dog wearing a santa hat !!",
    "she could've gotta wanna": "she could 've got ta wan na",
    "boys' shirts; James's hat": "boys shirts james 's hat",
    "a sandwich, fries, and a drink ,on a table .": "a sandwich fries and a drink on a table",
    "a pizza with pepperoni,cheese and olives": "a pizza with pepperoni cheese and olives",
    "1/2 of a pizza": "1/2 of a pizza",
}  # fmt: skip


@pytest.mark.parametrize("caption", TOKENISED)
def test_captions_become_the_words_of_cocos_evaluation(caption: str) -> None:
    assert caption_words(caption) == TOKENISED[caption].split()


REFERENCES = [
    ["a man rides a brown horse", "a man on a horse", "the man is riding"],
    ["two dogs play in the snow", "dogs playing in snow"],
    ["a red double-decker bus on the street", "a bus drives down the street"],
    ["a cat", "a small cat sleeps on a sofa"],
]
CANDIDATES = ["a man riding a horse", "two dogs play in snow", "a red bus", "a dog"]


def test_cider_is_that_of_pycocoevalcap() -> None:
    """Golden numbers: CiderScorer of pycocoevalcap 1.2 on the same words."""
    references = [[caption_words(text) for text in image] for image in REFERENCES]
    scores = cider([caption_words(text) for text in CANDIDATES], references)
    assert scores == pytest.approx([2.3486124, 4.45227603, 1.3912324, 0.08788927], rel=1e-6)


def test_cider_is_highest_for_the_reference_itself_and_nothing_for_other_words() -> None:
    references = [[caption_words(image[0])] for image in REFERENCES]
    exact = cider([image[0] for image in references[:3]] + [["xylophone"] * 4], references)
    assert exact[:3] == pytest.approx([10.0] * 3) and exact[3] == 0
    assert cider([["a"]], [[["a"]]]) == [0.0]  # one image: every word is in all of them


# GT-Vision-Lab/VQA, vqaEval.py: processPunctuation, then processDigitArticle
NORMALISED = {
    "The Red  dog.": "red dog",
    "two": "2",
    "None": "0",
    "dont know": "don't know",
    "yall'll": "y'all'll",
    "t-shirt": "t shirt",
    "red/white": "red white",
    "red, white": "red white",
    "yes, sir": "yes sir",
    "1,000": "1000",
    "1,000 t-shirts": "1000 tshirts",
    "3.5": "3.5",
    "5 p.m.": "5 pm",
    "what?": "what",
    "(on) the table": "on table",
    "somebody'd": "somebodyd",
    "oclock": "o'clock",
    "a": "",
}


@pytest.mark.parametrize("answer", NORMALISED)
def test_answers_are_normalised_as_officially(answer: str) -> None:
    assert vqa.normalise(answer) == NORMALISED[answer]


@given(st.lists(st.sampled_from(["red", "blue", "two", "2", "a dog"]), min_size=10, max_size=10))
def test_vqa_accuracy_is_the_mean_over_nine_of_ten(people: list[str]) -> None:
    """The definition, spelt out, against the closed form."""
    different = len(set(people)) > 1
    said = [vqa.normalise(p) for p in people] if different else people
    for answer in ("red", "2", "dog"):
        credits = []
        for left_out in range(10):
            others = said[:left_out] + said[left_out + 1 :]
            credits.append(min(others.count(answer) / 3, 1))
        assert vqa.accuracy(answer, people) == pytest.approx(sum(credits) / 10)


def test_vqa_accuracy_at_its_steps() -> None:
    for matches, credit in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        people = ["yes"] * matches + ["no"] * (10 - matches)
        assert vqa.accuracy("Yes.", people) == pytest.approx(credit if matches < 10 else 0)
    assert vqa.accuracy("yes", ["yes"] * 10) == 1  # all agree: compared to the letter
    assert vqa.accuracy("two", ["2", "two", "2", "3"] * 2 + ["2", "2"]) == 1


def test_ranks_and_gains() -> None:
    scores = [0.5, 0.1, 0.9, 0.1]
    assert [rank_of(scores, true) for true in range(4)] == [3, 2, 4, 2]  # a tie goes against it
    told = summary([1, 2, 7])
    assert told["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 7) / 3)
    assert (told["recall_at_1"], told["recall_at_5"], told["recall_at_10"]) == pytest.approx(
        (1 / 3, 2 / 3, 1)
    )
    assert told["mean_rank"] == pytest.approx(10 / 3)
    assert ndcg([1, 2, 3], [1, 0.5, 0]) == 1
    swapped = (0.5 + 1 / math.log2(3)) / (1 + 0.5 / math.log2(3))
    assert ndcg([2, 1, 3], [1, 0.5, 0]) == pytest.approx(swapped)
    assert ndcg([1, 2], [0, 0]) == 0


def test_written_text_is_cut_as_released() -> None:
    assert caption_of(" A dog on a sofa. The dog is\n") == "a dog on a sofa"
    assert caption_of("A St. Bernard.") == "a st"  # as released: the cut is at the first ". "
    assert caption_of("a cat.\nb") == "a cat"
    assert answer_of(" It is a dog, or a cat") == "dog"
    assert answer_of('The sign says "stop"') == "sign says"
    assert answer_of("it's the red one. It") == "red one"
    assert answer_of("Yes.") == "yes"
