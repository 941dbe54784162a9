"""What the evaluators released with Emu cut from a written answer (baaivision/Emu, Emu1).

A pretrained model goes on after its answer; the first sentence is meant. Pure functions of text.
"""

_OPENINGS = ("it is ", "it's ", "a ", "an ", "the ")


def caption_of(text: str) -> str:
    """The first sentence, in lower case, without its stop."""
    return _first(text, ("\n", ". ")).removesuffix(".").strip().lower()


def answer_of(text: str) -> str:
    """The first phrase, in lower case, without its stop and opening words."""
    answer = _first(text, ("\n", ". ", '"', ", ")).removesuffix(".").strip().lower()
    for opening in _OPENINGS:
        answer = answer.removeprefix(opening)
    return answer


def _first(text: str, ends: tuple[str, ...]) -> str:
    text = text.strip()
    for end in ends:
        text = text.split(end, 1)[0]
    return text
