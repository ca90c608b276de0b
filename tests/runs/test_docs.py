"""Tables in the documentation are what the benchmarks' JSON says, and what its pages name is there."""

import re

import pytest

from harness.runs import REPOSITORY

TABLE = re.compile(r"<!-- python (.+?) -->\n(.*?)<!-- end -->", re.DOTALL)
PAGES = [REPOSITORY / "README.md", REPOSITORY / "benchmarks" / "LOG.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
TABLES = [(path, command, table) for path in PAGES for command, table in TABLE.findall(path.read_text())]


def test_there_are_tables():
    """Invariant: the pattern above finds every one that has an end."""
    assert len(TABLES) == sum(path.read_text().count("<!-- end -->") for path in PAGES) > 5


@pytest.mark.parametrize("page", [*PAGES, *(REPOSITORY / name for name in ("CONTRIBUTING.md", "benchmarks/README.md"))])
def test_links_lead_somewhere(page):
    """Invariant: a link within the project names a file that is there, and a heading that it has."""
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, target


def test_the_tests_of_elsewhere_exist():
    """Invariant: what a page names as tests/.../test_x.py::test_name is a test of that file."""
    names = {name for page in PAGES for name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text())}
    assert len(names) > 10, "the pattern finds them"
    for path, test in sorted(names):
        assert re.search(rf"^def {test}\(", (REPOSITORY / path).read_text(), flags=re.MULTILINE), f"{path}::{test}"


@pytest.mark.parametrize(("path", "command", "table"), TABLES, ids=[command for _, command, _ in TABLES])
def test_a_table_is_generated(path, command, table, forked):
    """Reference: what the command above the table prints."""
    script, *words = command.split()
    done = forked(REPOSITORY, REPOSITORY / script, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == table.strip(), path


def test_the_python_of_a_page_runs(tmp_path, forked):
    """Invariant: the first program of docs/how-to/python.md trains, reads and verifies a run, and no figure differs.

    Of a shorter text, to a higher target; that the page's own figures lead to the target is shown by `finished`.
    """
    page = (REPOSITORY / "docs" / "how-to" / "python.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    theirs, ours = (
        "subset_tokens=256, batch_size=8, learning_rate=3e-3",
        "subset_tokens=40, batch_size=4, learning_rate=6e-3, target_loss=3",
    )
    assert theirs in program
    (tmp_path / "program.py").write_text(program.replace(theirs, ours))
    done = forked(tmp_path, tmp_path / "program.py")
    assert done.returncode == 0, done.stderr
    assert "\ntarget_reached " in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
