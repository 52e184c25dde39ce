"""Docstrings as TRL writes them, for doc-builder, made readable for mkdocstrings."""

import re

import griffe


# Public name -> the path under which the API pages have it; `build.py` fills it.
PLACES: dict[str, str] = {}


class DocBuilder(griffe.Extension):
    """
    Rewrites each docstring before it is parsed: links such as [`~trl.DPOTrainer`] become links within the site or
    code, the titles between groups of parameters go, and GitHub's notes become admonitions.
    """

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs) -> None:
        for item in walk(pkg):
            if item.docstring is not None:
                item.docstring.value = rewrite(item.docstring.value)


def rewrite(text: str) -> str:
    text = re.sub(r"\[`(~?)([\w.]+)`\](?![(\[])", link, text)
    text = re.sub(r"^ *> (?!\[)[^\n]*\n\n?", "", text, flags=re.MULTILINE) if "\n    > Param" in text else text
    # `name (`str`, *optional*, defaults to `"x"`):` is shown as code, beside the default of the signature.
    text = re.sub(r"^( +[\w, ]+ \()(.+?)(\):)(?= |$)", plain_type, text, flags=re.MULTILINE)
    # So are the types of `Raises:` and `Returns:`.
    text = re.sub(
        r"^( +)((?:`[\w. |]+`(?:, )?)+):(?= |$)", lambda match: match[0].replace("`", ""), text, flags=re.MULTILINE
    )
    return notes(text)


def plain_type(match: re.Match) -> str:
    kind = re.sub(r",? *\*optional\*.*", "", match[2])
    return match[1] + re.sub(r"\[?`~?([^`]*)`(\]\[[\w.]+\])?\]?", r"\1", kind) + match[3] if kind else match[0]


def link(match: re.Match) -> str:
    path = match[2]
    name = path.rpartition(".")[2]
    is_own = path.startswith("trl_ext.") or "." not in path
    shown = name if match[1] else path
    return f"[`{shown}`][{PLACES[name]}]" if is_own and name in PLACES else f"`{shown}`"


def walk(item):
    yield item
    for member in item.members.values():
        if not member.is_alias:
            yield from walk(member)


def notes(text: str) -> str:
    """`> [!NOTE]` and the quoted lines after it -> an admonition."""
    lines, inside, indent = [], False, ""
    for line in text.split("\n"):
        start = re.match(r"( *)> \[!(\w+)\]", line)
        if start:
            inside, indent = True, start[1]
            lines += [f"{indent}!!! {start[2].lower()}", ""]
        elif inside and re.match(rf"{indent}> ?", line):
            content = re.sub(rf"^{indent}> ?", "", line)
            if content.startswith("- ") and not lines[-1].strip().startswith("- "):
                lines.append("")  # Markdown's lists begin after an empty line
            lines.append(indent + "    " + content)
        else:
            inside = False
            lines.append(line)
    return "\n".join(lines)
