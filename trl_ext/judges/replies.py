"""Verdicts from the words of a language model."""

import re


# A verdict's letter is a capital and a word of its own. An "A" before another word is an article, unless that word
# continues the sentence after the letter ("A is", "A and").
_GOES_ON = "is|was|wins|won|has|and|or|nor|over|than|by|for"
_LETTER = rf"(?<![\w'])(?:A(?!\s+(?!(?:{_GOES_ON})\b)[a-z])|[BT])(?![\w'])"
_NAMED = rf"(?:(?i:response|answer|option|completion)\s+)?({_LETTER})"
_TIE = r"(?<![\w'])(?i:tie|tied|neither|equally good)(?![\w'])"
# Forms that say what the letter stands for, the most explicit first.
_LABELED = re.compile(
    rf"\b(?i:verdict|winner|decision|choice|final answer|answer\s+is|answer\s*:)(?:\s+is)?[\s:]*{_NAMED}"
)
_PREFERRED = re.compile(
    rf"\b(?i:better|best|stronger|superior|preferable)(?:\s+\w+)?\s+is\s+{_NAMED}"
    rf"|{_NAMED}\s+(?:(?:is|was)\s+(?:\w+\s+){{0,3}}?(?:better|best|stronger|superior|preferable)\b|wins\b|won\b)"
    rf"|\b(?i:prefer|choose|pick)\s+{_NAMED}"
    rf"|({_TIE}).*"  # neither of what follows
)
_FIRST = re.compile(rf"^[^\S\n]*{_NAMED}\s*(?:[.;!]|$)", flags=re.MULTILINE)
_WORD = re.compile(rf"({_LETTER})|({_TIE})")
# A clause with one of these words does not say that a letter is better, or not for sure.
_HEDGED = re.compile(r"\b(?i:not|cannot|never|if|whether|hardly|worse|worst)\b|n't\b")
_CLAUSE_END = re.compile(r"[.,;:!?()\n]+|\b(?:because|since|while|whereas|but|although|though|as)\b")


def parse_verdict(reply: str) -> float | None:
    """
    Returns 1 for A, 0 for B, 1/2 for T, "tie" or "neither"; `None` for a reply that says none of them, or more than
    one.

    The first of these forms that the reply has counts: the letter alone; a letter that is labeled as the verdict
    ("Verdict: B"); one that is said to be better ("B is better", "A better answer is B", "B wins"); one that stands
    alone before its reasons; the only such word in the reply. Clauses that deny or doubt ("A is not better") are no
    verdict, and text within `<think>...</think>` is ignored.
    """
    reply = re.sub(r"<think>.*?(</think>|\Z)", "", reply, flags=re.DOTALL).rpartition("</think>")[2]
    # Markdown, quotes and brackets; an apostrophe is part of a word, unless it stands before or after one.
    reply = re.sub(r"[*_`\"“”\[\](){}<>$\\]|(?<!\w)['‘’]|['‘’](?!\w)", " ", reply.replace("’", "'")).strip()
    if only := re.fullmatch(rf"{_NAMED}[\s.,;:!]*", reply):
        return _value(only[1])
    clauses = _CLAUSE_END.split(reply)
    said = [clause for clause in clauses if not _HEDGED.search(clause)]
    for form, texts in ((_LABELED, [reply]), (_PREFERRED, said), (_FIRST, [reply]), (_WORD, clauses)):
        found = {_value(next(filter(None, match.groups()))) for text in texts for match in form.finditer(text)}
        if found:
            break
    else:
        return None
    if form is _WORD and any(_WORD.search(clause) for clause in clauses if _HEDGED.search(clause)):
        return None
    return found.pop() if len(found) == 1 else None


def _value(word: str) -> float:
    return {"A": 1.0, "B": 0.0}.get(word, 0.5)
