"""Docstrings, which are written as transformers' are, as mkdocstrings reads them.

[`name`] becomes a link to where the name is documented, and "`int`, *optional*" plain text.
"""

import re
from collections.abc import Iterator

import griffe

REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
PARAMETER = re.compile(r"^ +\*{0,2}\w+ \(.*\):$", re.MULTILINE)


def walk(obj: griffe.Object) -> Iterator[griffe.Object]:
    """An object of the package, and what is defined in it."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from walk(member)


def link(match: re.Match[str], obj: griffe.Object) -> str:
    """A reference of a docstring, as a link where the site has the name, and as code where it does not."""
    is_short, name = match.groups()
    try:
        path = obj.resolve(name)
    except griffe.NameResolutionError:
        path = name
    shown = name.rpartition(".")[2] if is_short else name
    return f'<autoref optional identifier="{path}">`{shown}`</autoref>'


def clean(match: re.Match[str]) -> str:
    """The line of a parameter, with its type as it is shown: as code."""
    name, _, type_name = match[0].partition(" (")
    return f"{name} ({type_name.replace('`', '').replace('*optional*', 'optional')}"


class TransformersDocstrings(griffe.Extension):
    """Rewrites all docstrings of a package, once all its names are known."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        for obj in walk(pkg):
            if obj.docstring:
                text = PARAMETER.sub(clean, obj.docstring.value)
                obj.docstring.value = REFERENCE.sub(lambda match, obj=obj: link(match, obj), text)
