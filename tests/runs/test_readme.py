"""The README's commands, as they stand there: .ci/run has the two that install."""

import re
import shlex
import shutil

import pytest

from harness.forks import forked
from harness.runs import REPOSITORY, flags
from nanogpt.config.cli import parse
from nanogpt.config.train_config import TrainConfig

README = (REPOSITORY / "README.md").read_text()
AFTERWARDS = re.findall(r"^\| `nanogpt (.+?)` \|", README, flags=re.MULTILINE)
BLOCK = README.split("## Your text, more processes\n\n```\n")[1].split("```")[0].splitlines()


@pytest.fixture(scope="module")
def home(finished, tmp_path_factory):
    """A directory with what the commands name: a finished run, another, and a text of 9,000 words."""
    home = tmp_path_factory.mktemp("home")
    for name in ("out", "runs/my"):
        shutil.copytree(finished[0], home / name)
    (home / "my.txt").write_text((REPOSITORY / "nanogpt" / "assets" / "coriolanus.txt").read_text())
    return home


def test_there_are_commands():
    """Invariant: the patterns above find what a reader sees."""
    assert len(AFTERWARDS) == README.count("| `nanogpt ") == 8
    assert len(BLOCK) == 6


@pytest.mark.parametrize("command", AFTERWARDS)
def test_a_command_of_the_table(home, command):
    """Invariant: it ends with status 0 on a finished run; what takes minutes on a tiny model, or its first stage."""
    name, *words = shlex.split(command)
    shorter = {"preflight": flags(n_layer=2, n_head=2, n_embd=64), "accept": flags(stages="inventory")}
    done = forked(home, "nanogpt", name, *words, *shorter.get(name, []))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", BLOCK)
def test_the_options_exist(line):
    """Invariant: what stands behind the program is what it takes."""
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.endswith(("train_overfit.py", ".sh")))
    parse(TrainConfig, words[at + 1 :], program="train_overfit.py", about=None)
