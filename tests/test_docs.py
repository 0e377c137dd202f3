"""What the documentation shows is true: its examples run, its commands have the options shown, its links lead somewhere.

Everything is collected from the tree: the docstrings of both packages, README, CONTRIBUTING and docs.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent
from typing import Any, NamedTuple

import prepared
import prose
import pytest
import torch
import typer

import sora_kernels

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [page for folder in ("docs", "docs/integrations") for page in sorted((ROOT / folder).glob("*.md"))]
# A block that begins with this comment is shown, not run: it would take minutes or needs a GPU.
NOT_RUN = "# Not run by the tests:"


class Docstring(NamedTuple):
    path: Path
    name: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}::{self.name}"


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    @property
    def runs(self) -> bool:
        return not self.text.startswith(NOT_RUN)


def docstrings() -> Iterator[Docstring]:
    """Every docstring."""
    for path in sorted(file for package in ("sora_kernels", "sora_model") for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield Docstring(path, getattr(node, "name", "module"), text, node.body[0].lineno)


def unchecked(text: str) -> list[str]:
    """Parts of a docstring that are Python code, by a call or an assignment in them, without the `>>>` that makes them run.

    Parts are paragraphs and what is indented in them. Sentences, formulas and trees of folders are no Python code.
    """
    paragraphs = re.split(r"\n\s*\n", text)
    parts = [*paragraphs, *(part for text in paragraphs for part in re.findall(r"(?:^ {4,}.+\n?)+", text, re.MULTILINE))]
    return [part for part in dict.fromkeys(dedent(part).strip() for part in parts) if ">>>" not in part and is_code(part)]


def is_code(text: str) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call | ast.Assign) for node in nodes)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text[: match.start()].count("\n") + 2, match[1].strip(), match[2]) for match in found]


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """Lines and pieces of code that call `sora`, and whether they are whole ones that could be typed in."""
    text = page.read_text()
    for block in blocks(page):
        if block.language != "python":
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.startswith("sora "):
                    yield line, True
    fenceless = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for piece in re.findall(r"`(sora [^`]+)`", fenceless):
        yield " ".join(piece.split()), False


ALL_DOCSTRINGS = list(docstrings())
DOCSTRINGS = [docstring for docstring in ALL_DOCSTRINGS if ">>>" in docstring.text]
PYTHON_PAGES = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
COMMANDS = [(page, *found) for page in PAGES for found in commands(page)]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Examples show what comes out, not how good it is: two denoising steps do."""
    from sora_model import SoraPipeline

    monkeypatch.setitem(inspect.unwrap(SoraPipeline.__call__).__kwdefaults__, "num_inference_steps", 2)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def skip_without(text: str) -> None:
    """What uses the integration of diffusers is skipped where it refuses the version that is installed."""
    if "integrations.diffusers" in text:
        pytest.importorskip("sora_kernels.integrations.diffusers", exc_type=ValueError)


@pytest.mark.parametrize("docstring", DOCSTRINGS, ids=str)
def test_docstring(docstring):
    module = ".".join(docstring.path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    skip_without(module)
    examples = doctest.DocTestParser().get_examples(docstring.text)
    needed = prepared.names_used("".join(example.source for example in examples))
    names = prepared.ALWAYS | {name: prepared.value(name) for name in needed} | vars(importlib.import_module(module))
    test = doctest.DocTest(examples, names, str(docstring), str(docstring.path), docstring.line, docstring.text)
    output: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)


def test_code_in_docstrings_runs():
    found = {str(docstring): unchecked(docstring.text) for docstring in ALL_DOCSTRINGS}
    assert {name for name, code in found.items() if code} == set()


def test_code_in_docstrings_is_found():
    code = ["x = 3  # an example", "f(x)     # [3]\nf(y)", "for i in range(3):\n    f(i)"]
    text = ["A sentence.", "gelu(x),   gelu(u) = u (1 + tanh(u)) / 2", "clips/\n  a.mp4   a.txt", "a call f(x)", "Word"]
    for part in code:
        assert unchecked(f"What it is.\n\n{indent(part, ' ' * 4)}\n\nMore.")[0] == part
        assert unchecked(f"What it is.\n\n{part}\n\nMore.")[0] == part
        assert unchecked(f"What it is:\n{indent(part, ' ' * 4)}\nMore.") == [part]
    assert unchecked("\n\n".join([*text, *(indent(part, " " * 4) for part in text), "    >>> f(x)\n    3"])) == []


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_page(page):
    """The blocks of a page run in order, in one namespace."""
    skip_without(page.read_text())
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and block.runs:
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(page), "exec"), names)


def test_few_examples_are_not_run():
    left_out = [f"{block.page.name}:{block.line}" for page in PAGES for block in blocks(page) if not block.runs]
    left_out += [str(one) for one in DOCSTRINGS if "doctest: +SKIP" in one.text]
    assert len(left_out) <= 4, left_out


def parse(line: str, whole: bool) -> None:
    """Raises click's error for an unknown option or a value of another type, and for a missing argument of a whole line."""
    from sora_model.cli import app

    group: Any = typer.main.get_command(app)
    words = shlex.split(line, comments=True)[1:]
    command = group if words[0].startswith("-") else group.commands.get(words.pop(0))
    assert command is not None, f"no such command: {line}"
    try:
        command.make_context("sora", words)
    except Exception as error:
        # `sora long` in a sentence is a name, not a call; --help and --version exit.
        if type(error).__name__ not in ({"Exit"} if whole else {"Exit", "MissingParameter"}):
            raise


@pytest.mark.parametrize(("page", "line", "whole"), COMMANDS, ids=[f"{page.name}: {line}" for page, line, _ in COMMANDS])
def test_command(page, line, whole):
    parse(line, whole)


def test_commands_are_parsed():
    with pytest.raises(Exception, match="No such option"):
        parse("sora loop 'a red circle' --no-such-option 3", whole=False)
    with pytest.raises(Exception, match="Missing parameter: prompt"):
        parse("sora loop  # a prompt is needed", whole=True)
    with pytest.raises(AssertionError, match="no such command"):
        parse("sora no-such-command", whole=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    inside = [target.partition("#") for target in targets if not target.startswith(("http:", "https:"))]
    assert not [path for path, _, _ in inside if not (page.parent / path).exists()]
    for path, _, anchor in inside:
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / path if path else page).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_the_map_of_the_source_names_every_module():
    tree = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"\w+\.py\b", tree.partition("## Source tree")[2].partition("\n## ")[0]))
    modules = {path.name for package in ("sora_kernels", "sora_model") for path in (ROOT / package).rglob("*.py")}
    assert not modules - named - {"__init__.py", "__main__.py"}


def test_lines_are_wrapped():
    long = [
        f"{page.name}:{number}"
        for page in PAGES
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > 132 and not line.startswith(("|", "sora "))  # a table's row and a command are one line
    ]
    assert not long


def test_the_kernels_page_names_all_that_is_public():
    page = (ROOT / "docs" / "kernels.md").read_text()
    sources = [ROOT / "setup.py", *(ROOT / "sora_kernels").glob("*.py")]
    variables = {name for path in sources for name in re.findall(r"SORA_KERNELS_[A-Z_]+", path.read_text())}
    assert not {*sora_kernels.__all__, *variables} - set(re.findall(r"\w+", page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page):
    found = prose.measure(page.read_text())
    assert found.longest <= 40, found.sentence
    assert found.mean <= 18


def test_sentences_are_counted():
    text = "# A heading of words\n\nOne `a b c` [two](x.md). Three\nfour five.\n\n- Six seven\n\n| a | b |\n\n```\ncode\n```\n"
    assert prose.sentences(text) == ["One Code two.", "Three four five.", "Six seven"]
    assert prose.measure(text)[:2] == (8 / 3, 3)
