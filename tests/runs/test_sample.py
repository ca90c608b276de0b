"""nanogpt sample: the same samples for a seed, marked as they come, by brackets or colours."""

import os
import pty
import re
import shutil

import pytest

from nanogpt.commands.sample import painted
from nanogpt.data.corpus import read_corpus
from nanogpt.data.tokenizer import decode, encode
from nanogpt.utils.console import wants_colour

TEXT = read_corpus("builtin").text
PROMPT = "--prompt=First Citizen:\nBefore we proceed any further, "
FIGURES = re.compile(r"(\S+)% of (\d+) tokens verbatim, in stretches of 12 or more; the longest: (\d+) tokens?\]")


def samples(stdout):
    """The samples under their headings."""
    return re.split(r"^=== sample \d+ ===\n", stdout, flags=re.MULTILINE)[1:]


def test_greedily_it_recites(finished, forked):
    """Reference: what `recite` says, all of it verbatim, and in brackets but for the prompt."""
    for prompt in ([], [PROMPT]):
        words = (".", *prompt, "--max_tokens=20")
        greedy, recited = (
            forked(finished[0], "nanogpt", *command, *words) for command in (("sample", "--temperature=0"), ("recite",))
        )
        assert greedy.stdout.count("[[") == greedy.stdout.count("]]") == 1
        assert greedy.stdout.replace("[[", "").replace("]]", "") == recited.stdout
        said = greedy.stdout.split("[[")[1]
        assert said.removesuffix("]]\n") in TEXT
        figures = "[100.0% of 20 tokens verbatim, in stretches of 12 or more; the longest: 20 tokens]\n"
        assert (greedy.returncode, greedy.stderr) == (0, figures)


def test_a_seed_has_its_samples(finished, forked):
    """Invariant: the same for a seed, whatever their number; another seed has others, and so has each sample."""
    words = (".", PROMPT, "--temperature=1.5", "--top_k=20", "--max_tokens=24")
    three, two, one, other = (
        forked(finished[0], "nanogpt", "sample", *words, *more)
        for more in (["--num_samples=3"], ["--num_samples=2"], [], ["--num_samples=2", "--seed=1"])
    )
    assert samples(three.stdout)[:2] == samples(two.stdout)
    assert samples(three.stdout)[0] == one.stdout
    assert len({*samples(three.stdout), *samples(other.stdout)}) == 5
    assert all(each.startswith(PROMPT.removeprefix("--prompt=")) for each in samples(three.stdout))
    *each, together = FIGURES.findall(three.stderr)
    assert [line.split(":")[0] for line in three.stderr.splitlines()] == [
        "[sample 1", "[sample 2", "[sample 3", "[all 3 samples"
    ]  # fmt: skip
    assert [count for _, count, _ in each] == ["24"] * 3
    assert together[1:] == ("72", str(max(int(longest) for _, _, longest in each)))


def test_what_is_marked_is_in_the_text(finished, forked):
    """Invariant: at a temperature at which the model errs, each bracket holds words of the memorised text."""
    done = forked(finished[0], "nanogpt", "sample", ".", "--num_samples=4", "--temperature=1.2", "--top_k=4")
    marked = re.findall(r"\[\[(.*?)\]\]", done.stdout, flags=re.DOTALL)
    known = decode(encode(TEXT)[:256])
    assert marked
    assert all(words in known for words in marked)
    assert "[all 4 samples: 100.0%" not in done.stderr


def test_without_the_text_nothing_is_marked(finished, tmp_path, forked):
    """Invariant: the same samples bare, and one line that says why; without a prompt, status 2."""
    shutil.copytree(finished[0], tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(config.replace('"builtin"', '"/nowhere.txt"'))
    words = (PROMPT, "--max_tokens=16", "--num_samples=2")
    known = forked(finished[0], "nanogpt", "sample", ".", *words)
    bare = forked(tmp_path, "nanogpt", "sample", "run", *words)
    assert bare.stdout == known.stdout.replace("[[", "").replace("]]", "")
    assert bare.stderr.startswith("[not marked: --data=/nowhere.txt: no such file")
    assert (bare.returncode, bare.stderr.count("\n")) == (0, 1)
    done = forked(tmp_path, "nanogpt", "sample", "run")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: --prompt is needed: ")


@pytest.mark.parametrize("prompt", ["x", "naïve caf", "Zebras  ", "<|endoftext|>", "Let us kill him, " * 30])
def test_any_prompt_is_gone_on_from(finished, prompt, forked):
    """Invariant: it is said once, as it was typed, and as many tokens as asked follow; also past the context."""
    done = forked(finished[0], "nanogpt", "sample", ".", f"--prompt={prompt}", "--max_tokens=40", "--temperature=1.3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(prompt)
    assert FIGURES.search(done.stderr)[2] == "40"


def test_marks_are_brackets_or_colours():
    """Reference: written out; a character that two tokens share is said with the second."""
    e = "é".encode()
    parts = [(b"a", 0), (b"b", 1), (e[:1], 1), (e[1:], 2), (b"c", 0), (b"d", 3), (e[:1], 3)]
    assert "".join(painted(parts, colour=False)) == "a[[b]][[é]]c[[d�]]"
    green, cyan, end = "\x1b[32m", "\x1b[36m", "\x1b[0m"
    assert "".join(painted(parts, colour=True)) == f"a{green}b{end}{cyan}é{end}c{green}d{end}�"


def test_colours_are_for_terminals_that_want_them(tmp_path, monkeypatch):
    """Invariant: none in a file, nor where NO_COLOR is set, or TERM dumb or none; an empty NO_COLOR asks nothing."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    controller, terminal = pty.openpty()
    with os.fdopen(controller), os.fdopen(terminal, "w") as screen, open(tmp_path / "file", "w") as file:
        for term, no_color, wanted in (("xterm", "", 1), ("xterm", "1", 0), ("dumb", "", 0), ("", "", 0)):
            monkeypatch.setenv("TERM", term)
            monkeypatch.setenv("NO_COLOR", no_color)
            assert wants_colour(screen) == wanted, (term, no_color)
            assert not wants_colour(file)
        monkeypatch.delenv("TERM")
        assert not wants_colour(screen)
