"""What others import and install: names that stay, found when they are asked for, from a wheel too."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import nanogpt
from harness.runs import REPOSITORY, SHORT, environment, flags, report, run

NAMES = ["GPT", "ConfigError", "GPTConfig", "RunError", "TrainConfig", "__version__", "load_run", "train", "verify"]


def test_the_face():
    """Reference: the names, each of which is there; asking for an option's class imports no torch."""
    assert sorted(nanogpt.__all__) == dir(nanogpt) == sorted(NAMES)
    assert all(getattr(nanogpt, name) is not None for name in NAMES)
    code = "import sys, nanogpt; nanogpt.TrainConfig(max_steps=3); print('torch' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=REPOSITORY).stdout == "False\n"


def test_a_run_in_a_notebook(tmp_path):
    """Invariant: train returns what report.json holds and the status of the command, and ends no process."""
    config = nanogpt.TrainConfig(**SHORT, max_steps=3, out_dir=str(tmp_path / "out"), wandb="disabled")
    result = nanogpt.train(config)
    assert (result.exit_reason, result.status, result.out_dir) == ("max_steps", 3, tmp_path / "out")
    assert result.report.to_json() == report(tmp_path / "out")
    again = nanogpt.train(config)
    assert (again.exit_reason, again.status, again.report) == ("max_steps", 3, result.report)
    assert [check for check in nanogpt.verify(str(tmp_path / "out")) if not check.fits] == []
    assert isinstance(nanogpt.load_run(str(tmp_path / "out")).model, nanogpt.GPT)


def test_a_run_in_a_thread(tmp_path):
    """Invariant: as in the main thread, though a signal reaches that one alone; the file STOP ends it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "STOP").touch()
    config = nanogpt.TrainConfig(**SHORT, max_steps=3, out_dir=str(tmp_path / "out"), wandb="disabled")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(nanogpt.train, config).result(timeout=60).exit_reason == "stopped"
        (tmp_path / "out" / "STOP").unlink(missing_ok=True)
        assert pool.submit(nanogpt.train, config).result(timeout=60).exit_reason == "max_steps"


@pytest.mark.slow
def test_a_wheel_trains_in_an_empty_directory(tmp_path):
    """Invariant: all that the package needs is in it, DeepSpeed's default file too, and `nanogpt` is a command."""
    source = tmp_path / "source"  # a copy: setuptools builds among the sources
    shutil.copytree(REPOSITORY / "nanogpt", source / "nanogpt")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", tmp_path / "site", source], check=True, capture_output=True)
    (tmp_path / "empty").mkdir()
    env = {"PYTHONPATH": str(tmp_path / "site")}
    words = flags(**SHORT, max_steps=2, engine="deepspeed", zero_stage=1)
    done = subprocess.run(
        [tmp_path / "site" / "bin" / "nanogpt", "train", *words], cwd=tmp_path / "empty", env=environment(**env),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    told = report(tmp_path / "empty" / "out")
    assert told["engine"] == "deepspeed"
    (version,) = re.findall(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert told["versions"]["nanogpt-overfit"] == version
    assert (tmp_path / "site" / "nanogpt" / "py.typed").exists()  # else its annotations are nobody's
