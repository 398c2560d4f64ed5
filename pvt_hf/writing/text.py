"""Text that comes from users' files (names of classes, tensors, data sets, runs), for terminals and model cards."""

import html
import json
import re

# What means something to markdown within a line. Within a word an underscore does not.
_MARKUP = re.compile(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])")


def escape_control(text: str) -> str:
    """The text in one line, with escapes as Python writes them in place of all that is not printed: line breaks,
    sequences that change a terminal, marks that turn the direction of text.

    Args:
        text: Of anybody.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def escape_lines(text: str) -> str:
    """The text with its line breaks, and otherwise as of [`escape_control`].

    Args:
        text: Of ours, with names of anybody in it.
    """
    return "\n".join(map(escape_control, text.split("\n")))


def escape_markdown(text: str) -> str:
    """The text as markdown that shows it literally: in a line, a heading or a cell of a table, also where HTML counts.

    Args:
        text: Of anybody.
    """
    return _MARKUP.sub(r"\\\g<0>", html.escape(escape_control(text), quote=False))


def code_span(text: str) -> str:
    """The text as code of markdown, in a line.

    Args:
        text: Of anybody; it may have backticks.
    """
    text = escape_control(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if "`" in text or not text.strip() else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def python_string(text: str) -> str:
    """The text as a literal of Python in double quotes, for programs in a card.

    Args:
        text: Of anybody.
    """
    return escape_control(json.dumps(text, ensure_ascii=False))
