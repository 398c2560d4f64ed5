"""Links of the API reference: the docstrings' [`name`], as transformers writes them, to where that is documented."""

import re
from collections.abc import Iterator

import griffe

REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")


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


class CrossReferences(griffe.Extension):
    """Rewrites the references of all docstrings of a package, once all its names are known."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        for obj in walk(pkg):
            if obj.docstring:
                obj.docstring.value = REFERENCE.sub(lambda match, obj=obj: link(match, obj), obj.docstring.value)
