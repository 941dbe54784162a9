"""Captions as the words that COCO's evaluation counts.

That evaluation pipes captions through Stanford's Penn Treebank tokeniser, lower case, and drops
punctuation. The same words are made here without a JVM: contractions are split (`do n't`,
`man 's`), hyphenated words, numbers and abbreviations stay whole, brackets become `-lrb-` and
such (and stay, as they do there). Checked against the Java program on the sentences of
tests/evaluate/test_words.py.
"""

import re

# what the evaluation drops after tokenising; quotes and dashes never become tokens here
_PUNCTUATION = frozenset(".?!,:;-'`") | {"--", "...", "''", "``"}
_BRACKETS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
}  # fmt: skip
_ABBREVIATIONS = (
    "mr mrs ms dr st jr sr vs etc prof rev gen capt lt col sgt gov sen rep ave blvd rd mt ft co"
    " corp inc ltd dept no jan feb aug sept oct nov dec"
)
_TOKEN = re.compile(
    rf"""
      [\w.+-]+@[\w-]+(?:\.\w+)+                     # a mail address
    | (?:[a-z]\.){{2,}}                             # u.s., a.m.
    | (?:{"|".join(_ABBREVIATIONS.split())})\.(?!\w)
    | '(?:n'|em\b|til\b|tis\b|twas\b)               # rock 'n' roll, 'em
    | \d+(?:[.,:]\d+)+                              # 3.5  1,000  10:30
    | '\d0s\b                                       # the '60s
    | \w+(?:[-/'.]\w+)*                             # t-shirt  black/white  man's  kite.a
    | [?!]{{2,}}                                    # stays, as it does there
    | \.{{3}} | --+ | [^\s\w]
    """,
    re.VERBOSE,
)
_CONTRACTION = re.compile(r"(.+)(n't|'s|'re|'ve|'ll|'d|'m)")
_MERGED = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na",
    "lemme": "lem me", "gimme": "gim me",
}  # fmt: skip


def caption_words(caption: str) -> list[str]:
    """Words of a caption in lower case, without punctuation."""
    text = caption.lower().replace("\u2019", "'").replace("\u2018", "`")
    words: list[str] = []
    for token in _TOKEN.findall(text):
        words += _split(_BRACKETS.get(token, token))
    return [word for word in words if word not in _PUNCTUATION and word != '"']


def _split(token: str) -> list[str]:
    """A token with its contraction apart."""
    if token in _MERGED:
        return _MERGED[token].split()
    found = _CONTRACTION.fullmatch(token)
    return [*_split(found[1]), found[2]] if found else [token]
