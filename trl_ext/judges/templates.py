"""A judge's question: a template, its fields, and inserted texts that cannot pass for the template's own lines."""

import html
import re
import unicodedata
from typing import NamedTuple


# A name in one pair of braces is a field; in two it is the name in one.
# What `str.format` would read, such as an index or a precision, is part of a name that no column has, and refused.
_FIELD = re.compile(r"\{(?P<literal>\{[^\W\d][^{}\s\"]*\})\}|\{(?P<name>[^\W\d][^{}\s\"]*)\}")
# What a heading begins with: Markdown's marks, and rules of any characters.
_MARKS = " #*=_~->+|[](){}<>`\\/.:"
_TAG = re.compile(r"</?[a-z][^<>]{0,200}>")
_NUMBER = re.compile(r"^\d{1,3}[.):]\s*")
# Letters of other alphabets that look like Latin ones, after `casefold`.
_LOOKALIKES = str.maketrans(
    "\u0430\u0432\u0441\u0435\u0456\u0458\u043a\u043c\u043d\u043e\u0440\u0455\u0442\u0443\u0445"
    "\u03b1\u03b5\u03b9\u03ba\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7",
    "abceijkmhopstyxaeikvoptux",
)


class Section(NamedTuple):
    """
    The text of a template's line, up to its first field.

    Args:
        plain (`str`): The text without differences of case, width, spacing and invisible characters.
        words (`str`): `plain` without the marks around it.
        has_marks (`bool`): Whether it begins with marks, as a heading does.
    """

    plain: str
    words: str
    has_marks: bool


def fields_of(template: str) -> set[str]:
    """The names of a template's fields."""
    return {found["name"] for found in _FIELD.finditer(template) if found["name"]}


def sections_of(template: str) -> list[Section]:
    """The lines of a template that tell its parts apart: all that do not begin with a field."""
    marked = _FIELD.sub(lambda found: found["literal"] or "\0", template)
    sections = []
    for line in marked.splitlines():
        plain = _plain(line.partition("\0")[0])
        words = plain.strip(_MARKS)
        if words:
            sections.append(Section(plain, words, not plain.startswith(words)))
    return sections


def fill(template: str, values: dict[str, str], sections: list[Section]) -> str:
    """
    Returns the template with its fields filled in one pass, so that an inserted text is never read as a template.
    `str.format` would not do: what a model wrote may hold braces, and a template may hold JSON.

    Args:
        template (`str`): The template.
        values (`dict[str, str]`): Texts by field.
        sections (`list[Section]`): The template's own lines ([`sections_of`]), which a text must not imitate.
    """
    return _FIELD.sub(lambda found: found["literal"] or quote_sections(values[found["name"]], sections), template)


def quote_sections(text: str, sections: list[Section]) -> str:
    """
    Shows each line of a text that imitates a section as a quotation, `> ` before it, without the marks that make it a
    heading.

    A completion could otherwise end its own part, forge the opponent's response, or give the verdict itself.
    """
    lines = text.splitlines(keepends=True)
    if not any(_imitates(line, sections) for line in lines):
        return text
    return "".join(f"> {line.lstrip().lstrip(_WIDE_MARKS)}" if _imitates(line, sections) else line for line in lines)


# The marks and the characters that compatibility normalization turns into them.
_WIDE_MARKS = _MARKS + "".join(chr(ord(mark) + 0xFEE0) for mark in _MARKS if "!" <= mark <= "~")


def _imitates(line: str, sections: list[Section]) -> bool:
    plain = _plain(line)
    words = plain.strip(_MARKS)
    has_marks = not plain.startswith(words)
    bare = {_bare(plain), _bare(" ".join(_TAG.sub(" ", plain).split()))} - {""}
    for section in sections:
        if _bare(section.words) in bare:
            return True
        if section.has_marks:
            # A heading is one by its marks, of whatever kind and number, or by being all of its line.
            if words == section.words or (has_marks and words.startswith(section.words)):
                return True
        elif plain.startswith(section.plain) or words == section.words:
            return True
    return False


def _plain(text: str) -> str:
    """The text without differences of case, width, accents, look-alikes, spacing, and invisible characters."""
    text = unicodedata.normalize("NFKD", html.unescape(text)).casefold()
    text = "".join(character for character in text if unicodedata.category(character) not in ("Cf", "Mn", "Me"))
    return " ".join(text.translate(_LOOKALIKES).split())


def _bare(plain: str) -> str:
    """The text between its first and its last letter or digit, without the number of an item."""
    start = next((i for i, character in enumerate(plain) if character.isalnum()), len(plain))
    end = next((i for i in range(len(plain), start, -1) if plain[i - 1].isalnum()), start)
    return _NUMBER.sub("", plain[start:end], count=1)
