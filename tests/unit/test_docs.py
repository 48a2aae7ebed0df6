"""Pages that are made from the program's tables say what these say."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_models_page_is_what_the_tables_give():
    page = runpy.run_path(str(DOCS / "generate_models.py"))["render"]()

    assert (DOCS / "models.md").read_text() == page, "run `make docs`"


def test_page_of_commands_is_what_the_program_says():
    page = runpy.run_path(str(DOCS / "generate_cli.py"))["render"]()

    assert (DOCS / "reference" / "cli.md").read_text() == page, "run `make docs`"
