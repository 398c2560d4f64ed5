"""README and site are true: their code runs, what they name and link exists, what is generated is current."""

import ast
import contextlib
import importlib.util
import io
import pydoc
import re
from functools import cache
from types import ModuleType

import pytest

import pvt_hf
from pvt_hf.commands.main import COMMANDS, main
from tests.support.pages import PAGES, find_missing, name_page, read_blocks
from tests.support.small_models import ROOT

DOCS = ROOT / "docs"
# What the blocks of a page take is long to import or to run.
HEAVY = {"python export", "python fastapi", "python lightning", "python torchao"}
PYTHON_PAGES = [
    pytest.param(page, id=name_page(page), marks=pytest.mark.slow if HEAVY & {block.info for block in blocks} else ())
    for page in PAGES
    if (blocks := read_blocks(page, "python"))
]
# Of other programs than ours, an option is not looked up.
OTHER_PROGRAMS = (
    "accelerate",
    "hf",
    "main.py",
    "mkdocs",
    "pip",
    "pytest",
    "tools/",
    "torchrun",
)  # those of mm* among them


def load_script(name: str) -> ModuleType:
    """A program of the folder docs, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.process
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """From top to bottom, in one namespace and an empty folder. A block may want a package, or an extra of ours."""
    monkeypatch.chdir(tmp_path)
    namespace, missing = {}, []
    for block in read_blocks(page, "python"):
        tag = block.info.removeprefix("python").strip()
        code = compile("\n" * (block.line - 1) + block.text, page, "exec")
        if tag == "no-run":
            check_names(block.text)
        elif packages := find_missing(tag) if tag else []:
            missing += packages
        else:
            exec(code, namespace)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def check_names(text: str) -> None:
    """Of a block that is not run (it wants a network or a checkpoint): what it imports and names of ours exists."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), {})
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pvt_hf":
            assert hasattr(pvt_hf, node.attr), node.attr


@cache
def read_help(command: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main([command, "--help"])
    return printed.getvalue()


def has_option(text: str, option: str) -> bool:
    return re.search(rf"(?<![\w-]){option}(?![\w-])", text) is not None


@pytest.mark.process
@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_options_exist(page):
    """Those of each command line by its own `--help`, those that the text names by that of any program."""
    text = page.read_text()
    lines = re.findall(
        r"^ *(?:pvt-hf|accelerate launch -m pvt_hf\.commands\.)\s?([a-z][\w-]+)(.*)$",
        text.replace("\\\n", " "),
        flags=re.MULTILINE,
    )
    for name, arguments in lines:
        command = name.replace("_", "-")
        assert command in COMMANDS, command
        for option in re.findall(r"(?<!\S)--[a-z][\w-]+", arguments.split(" #")[0]):
            assert has_option(read_help(command), option), (command, option)
    named = [span for span in re.findall(r"`([^`\n]*--[a-z][^`\n]*)`", text) if not span.startswith(OTHER_PROGRAMS)]
    if named:
        known = "\n".join(map(read_help, COMMANDS))
        for option in re.findall(r"(?<!\S)--[a-z][\w-]+", " ".join(named)):
            assert has_option(known, option), option


@pytest.mark.process
def test_every_command_is_on_a_page_and_in_a_guide():
    text = "\n".join(page.read_text() for page in PAGES if page.parent.name != "commands")
    for command in COMMANDS:
        assert f"pvt-hf {command}" in text, command


@pytest.mark.process
def test_pages_of_commands_are_what_help_says(tmp_path, monkeypatch, capsys):
    script = load_script("generate_commands")
    assert script.run(["--check"]) == 0, capsys.readouterr().out
    (tmp_path / "gone.md").write_text("of a command that there was")
    (tmp_path / "convert.md").write_text((DOCS / "commands" / "convert.md").read_text().replace("--variant", "--kind"))
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "COMMANDS", {"convert": COMMANDS["convert"]})
    assert script.run(["--check"]) == 1
    assert capsys.readouterr().out.count("differs") == 3
    assert script.run([]) == 0 and script.run(["--check"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"convert.md", "index.md"}


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown makes it."""
    text = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_links_lead_somewhere(page):
    """Files and headings of this repository. (mkdocs knows the anchors of the API reference.)"""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"(?<!`)\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(DOCS) or not page.is_relative_to(DOCS), f"{target} is not on the site"
        if anchor and not anchor.startswith("pvt_hf."):
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_pictures_are_small():
    pictures = {path.name: path.stat().st_size for path in (DOCS / "pictures").glob("*.png")}
    assert pictures and all(size < 300_000 for size in pictures.values()), pictures


def test_api_reference_has_every_public_name():
    found = re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in PAGES), flags=re.MULTILINE)
    assert not [name for name in found if pydoc.locate(name) is None]
    assert sorted(name for name in found if name.count(".") == 1) == sorted(f"pvt_hf.{name}" for name in pvt_hf.__all__)
    assert len(set(found)) == len(found)


def test_what_the_papers_map_to_exists():
    text = (DOCS / "papers.md").read_text()
    rows = re.findall(r"^\| ((?:section|equation).*?) \| .* \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(rows) > 15
    for place, cell in rows:
        names = re.findall(r"`([\w.]+)`", cell)
        assert names, place
        for name in names:
            path = re.sub(r"^models\.", "pvt_hf.models.", name)
            assert pydoc.locate(path) is not None, name
