"""Tables in the documentation are what the benchmarks' JSON says."""

import re

import pytest

from harness.runs import REPOSITORY

TABLE = re.compile(r"<!-- python (.+?) -->\n(.*?)<!-- end -->", re.DOTALL)
TABLES = [
    (path, command, table)
    for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    for command, table in TABLE.findall(path.read_text())
]


def test_there_are_tables():
    """Invariant: the pattern above finds every one that has an end."""
    pages = {path: path.read_text() for path in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]}
    assert len(TABLES) == sum(text.count("<!-- end -->") for text in pages.values()) > 5


@pytest.mark.parametrize(("path", "command", "table"), TABLES, ids=[command for _, command, _ in TABLES])
def test_a_table_is_generated(path, command, table, forked):
    """Reference: what the command above the table prints."""
    script, *words = command.split()
    done = forked(REPOSITORY, REPOSITORY / script, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == table.strip(), path
