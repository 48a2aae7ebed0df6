"""README.md and docs/ do what they say: their examples run, and what they name exists."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import msgspec
import pytest
import yaml

from benchmarks.__main__ import build_parser
from pals import config
from pals.cli.app import COMMANDS, run
from pals.settings import Settings
from tests.integration.pages import PAGES, blocks, matches, snippets, steps
from tests.integration.terminals import Terminals, assert_make_target

BENCHMARKS = "python -m benchmarks"
VARIABLES = {value for name, value in vars(config).items() if name.endswith("_VARIABLE")}
GO_ON = {"getting-started.md": ("nat.md", "clients.md")}
"""Pages whose examples need the machines of another one."""

WITH_EXAMPLES = [
    page
    for page in PAGES
    if blocks(page.read_text(), "console", "python") and page.name not in sum(GO_ON.values(), ())
]

_COMMAND = re.compile(r"(?<![\w.-])pals(?: [a-z]+(?:-[a-z]+)*)+|python -m benchmarks")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
_VARIABLE = re.compile(r"\bPALS_[A-Z_]+")

on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# --- examples ------------------------------------------------------------------------


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_examples_of_a_page_run_in_their_order(page: Path, tmp_path: Path, shared_cache: Path):
    texts = [page.read_text()]
    texts += [page.with_name(name).read_text() for name in GO_ON.get(page.name, ())]
    with Terminals(tmp_path, shared_cache / "xla") as terminals:
        for language, content in blocks("".join(texts), "console", "python"):
            if language == "python":
                terminals.run_python(content)
                continue
            for step in steps(content):
                terminals.run(step)


@on_every_page
def test_presets_of_a_page_are_read(page: Path):
    for _, content in blocks(page.read_text(), "toml"):
        assert msgspec.toml.decode(content, type=Settings) != Settings()


@on_every_page
def test_settings_of_other_programs_can_be_read(page: Path):
    for language, content in blocks(page.read_text(), "json", "yaml"):
        assert (json.loads if language == "json" else yaml.safe_load)(content)


# --- names ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Return every command line that there is, with the options that it takes."""
    found = {BENCHMARKS: set(_OPTION.findall(build_parser().format_help()))}
    for command in COMMANDS:
        with redirect_stdout(StringIO()) as captured:
            assert run([*command.split(), "--help"]) == 0
        found[f"pals {command}"] = {"--help", *_OPTION.findall(captured.getvalue())}
    return found


@on_every_page
def test_commands_and_options_of_a_page_exist(page: Path, options: Mapping[str, set[str]]):
    named = snippets(page.read_text())
    assert [problem for snippet in named for problem in problems_of(snippet, options)] == []


@pytest.mark.parametrize(
    ("snippet", "problem"),
    [
        ("pals sevre --port 1", "no command `pals sevre`"),
        ("pals peers", "no command `pals peers`"),
        ("PALS_INVITE=x pals login --prot 1", "`pals login` has no --prot"),
        ("anna@tower$ pals peers list --port 1", "`pals peers list` has no --port"),
        ("--shard", "no command has --shard"),
        ("python -m benchmarks demo --slow", "`python -m benchmarks` has no --slow"),
    ],
)
def test_what_does_not_exist_is_found(snippet: str, problem: str, options: Mapping[str, set[str]]):
    assert problems_of(snippet, options) == [problem]


def problems_of(snippet: str, options: Mapping[str, set[str]]) -> list[str]:
    """Return which commands and options of a line of code there are not."""
    named = _OPTION.findall(snippet)
    if snippet.startswith("--"):
        known = set().union(*options.values())
        return [f"no command has {option}" for option in named if option not in known]
    found = _COMMAND.search(snippet)
    if found is None:
        return []
    command = next((c for c in options if f"{found[0]} ".startswith(f"{c} ")), None)
    if command is None:
        return [f"no command `{found[0].strip()}`"]
    return [f"`{command}` has no {option}" for option in named if option not in options[command]]


@on_every_page
def test_targets_variables_and_files_of_a_page_exist(page: Path):
    text = page.read_text()
    for snippet in snippets(text):
        for target in re.findall(r"^make ([a-z-]+)$", snippet):
            assert_make_target(target)
    assert set(_VARIABLE.findall(text)) <= VARIABLES
    missing = [link for link in _LINK.findall(text) if not (page.parent / link).exists()]
    assert missing == []


# --- the reader of pages -------------------------------------------------------------


def test_steps_know_user_command_and_output():
    console = "a@x$ one \\\n    two\nshown\n\n$ three\n"
    first, second = steps(console)
    assert (first.user, first.command, first.output) == ("a", "one two", ["shown", ""])
    assert (second.user, second.command, second.output) == ("anna", "three", [])


def test_an_ellipsis_stands_for_anything_and_nothing_else_does():
    assert matches("peer …, layers 0:1", "peer abc, layers 0:1")
    assert not matches("peer …, layers 0:1", "peer abc, layers 0:10")
    assert not matches("a.c", "abc")
