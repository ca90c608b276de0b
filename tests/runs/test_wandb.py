"""W&B sees what metrics.jsonl sees; whatever is wrong with it, the run goes on. Offline runs, read back by W&B's tool.

Where a server answers, it is a stand-in: there is no W&B server to be had in a test.
"""

import json
import os
import pty
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from harness.runs import SHORT, TRAIN, environment, flags, free_port, metrics, report, run, torchrun, train, wait_for

OPTIONS = SHORT | {"dtype": "fp32", "max_steps": 8, "log_every": 2, "out_dir": "out"}
KEY = "a" * 40


@pytest.fixture
def env(tmp_path, no_wandb_settings):
    """No key, and W&B not switched off."""
    return {"HOME": str(tmp_path)}


def wandb_runs(out_dir):
    """The records of each offline W&B run below a run directory, oldest first: {type: [content, ...]}."""
    runs = []
    for path in sorted((out_dir / "wandb").glob("offline-run-*/*.wandb")):
        done = run("wandb", "leet", "inspect", "--json", path, cwd=out_dir)
        assert done.returncode == 0, done.stderr
        records = {}
        for line in done.stdout.splitlines():
            record = json.loads(line)
            records.setdefault(record["type"], []).append(record[record["type"]])
        runs.append(records)
    return runs


def rows_of(records):
    """Of a W&B run's history, what are rows of metrics.jsonl, under W&B's names."""
    history = [record["item"] for record in records["history"]]
    return [row for row in history if "train/lr" in row]


def assert_mirrors(rows, expected):
    """Every finite figure of metrics.jsonl stands in W&B's row, under its section."""
    assert [row["trainer/step"] for row in rows] == [row["step"] for row in expected]
    for got, wanted in zip(rows, expected, strict=True):
        wanted = wanted | wanted.pop("time_share")
        flat = {name.rpartition("/")[2]: value for name, value in got.items()}
        assert {name: flat.get(name) for name, value in wanted.items() if value is not None} == {
            name: value for name, value in wanted.items() if value is not None
        }


def test_an_offline_run_mirrors_the_run_directory(tmp_path, env):
    """Reference: metrics.jsonl, config.json and report.json; a resumed run goes on under the same id, rows and all."""
    options = flags(**OPTIONS, wandb_group="g", wandb_tags="a,b", wandb_artifact="true")
    assert train(*options, cwd=tmp_path, env=env).returncode == 3
    before = metrics(tmp_path / "out")
    options = flags(**(OPTIONS | {"max_steps": 16}))
    assert train(*options, cwd=tmp_path, env=env).returncode == 3
    first, second = wandb_runs(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    for records in (first, second):
        (begun,) = {record["run_id"]: record for record in records["run"]}.values()
        assert begun["run_id"] == stored["wandb_run_id"]
        told = begun["config"]["update"]
        for name in ("n_layer", "seed", "corpus_sha256", "git_commit", "hosts"):
            assert told[name] == stored.get(name, stored["config"].get(name))
    axes = [record["name"] for record in first["metric"] if "name" in record]
    assert axes == ["trainer/step", "trainer/tokens", "trainer/wall_s"]
    assert (first["run"][0]["run_group"], first["run"][0]["tags"]) == ("g", ["a", "b"])
    assert any(record["type"] == "model" for record in first["artifact"])
    assert not any(record["type"] == "model" for record in second["artifact"])
    assert_mirrors(rows_of(first), before)
    after = metrics(tmp_path / "out")
    assert_mirrors(rows_of(second), [row for row in after if row["step"] >= 8])
    summary = {}
    for record in second["summary"]:
        summary |= record["update"]
    told = report(tmp_path / "out")
    assert {name: summary[name] for name in ("loss", "exit_reason", "steps", "floor")} == {
        name: told[name] for name in ("loss", "exit_reason", "steps", "floor")
    }
    assert any(name.startswith("recitation") for name in summary)
    assert first["exit"][0].get("exit_code", 0) == 0


@pytest.mark.slow
def test_only_the_first_rank_has_a_run(tmp_path, env):
    """Invariant: two ranks, one W&B run, and one alert of a target that is reached."""
    torchrun(2, *flags(**(OPTIONS | {"target_loss": 11.0})), cwd=tmp_path, env=env)
    (records,) = wandb_runs(tmp_path / "out")
    assert [alert["title"] for alert in records["alert"]] == ["Target reached"]


@pytest.mark.slow
def test_disabled_leaves_nothing(tmp_path, env):
    """Invariant: no directory of W&B's, by option; by variable is in test_the_run_directory_is_a_contract."""
    assert train(*flags(**OPTIONS, wandb="disabled"), cwd=tmp_path, env=env).returncode == 3
    assert not (tmp_path / "out" / "wandb").exists()


@pytest.mark.slow
def test_without_a_key_nobody_is_asked(tmp_path, env):
    """Invariant: on a terminal too, auto goes offline by itself, and online is refused in one line."""
    ours, theirs = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, TRAIN, *flags(**OPTIONS)],
        cwd=tmp_path, env=environment(**env), stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # Linux's way of saying that the other side has closed
        pass
    assert program.wait(timeout=200) == 3, said.decode()
    assert b"W&B: offline" in said
    assert b"Enter your choice" not in said
    options = flags(**(OPTIONS | {"out_dir": "new"}), wandb="online")
    done = train(*options, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "needs a key" in done.stderr
    done = train(*options, cwd=tmp_path, env=env | {"WANDB_API_KEY": "short"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "another key" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_refused_tag_leaves_nothing(tmp_path, forked):
    """Invariant: one line on stderr, status 2, no run directory."""
    done = forked(tmp_path, TRAIN, *flags(**OPTIONS, wandb="offline", wandb_tags=","))
    assert (done.returncode, done.stdout) == (2, "")
    reason = "Tag at index 0 is empty. Tags must be between 1 and 64 characters"
    assert done.stderr.startswith(f"error: W&B rejects --wandb_tags: {reason}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_broken_installation_is_warned_of(tmp_path, env):
    """Invariant: where wandb cannot be imported the run has its own result, after one line; online is refused."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text("raise ImportError('No module named wandb')\n")
    env = env | {"PYTHONPATH": f"{tmp_path / 'site'}:{environment()['PYTHONPATH']}"}
    done = train(*flags(**OPTIONS, wandb_tags="a"), cwd=tmp_path, env=env)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("warning: W&B is off from here on (No module named wandb)") == 1
    assert metrics(tmp_path / "out")[-1]["step"] == 8
    done = train(*flags(**(OPTIONS | {"out_dir": "new"})), "--wandb=online", cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--wandb=online needs W&B, which cannot be imported (No module named wandb)" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_closed_port_is_no_server(tmp_path, env):
    """Invariant: one warned line, offline, and the run's own result."""
    url = f"http://127.0.0.1:{free_port()}"
    done = train(*flags(**OPTIONS), cwd=tmp_path, env=env | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url})
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("warning: W&B") == 1
    (records,) = wandb_runs(tmp_path / "out")
    assert_mirrors(rows_of(records), metrics(tmp_path / "out"))


@pytest.mark.slow
def test_a_silent_server_is_no_server(tmp_path, env):
    """Invariant: as with a closed port, though the kernel takes the connection and nothing is ever said on it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = train(*flags(**OPTIONS), cwd=tmp_path, env=env | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url})
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("warning: W&B cannot be reached") == done.stdout.count("warning: W&B") == 1
    (records,) = wandb_runs(tmp_path / "out")
    assert_mirrors(rows_of(records), metrics(tmp_path / "out"))


@pytest.mark.slow
def test_a_refused_key_is_warned_of(tmp_path, env):
    """Invariant: as with a closed port; the server is a stand-in that answers 401 to everything."""

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(401)
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = train(*flags(**OPTIONS), cwd=tmp_path, env=env | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url})
        server.shutdown()
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("warning: W&B") == 1
    assert metrics(tmp_path / "out")[-1]["step"] == 8


@pytest.mark.slow
def test_a_crash_of_its_service_is_warned_of(tmp_path, env):
    """Invariant: with wandb-core killed in the middle the run goes on until it is stopped, after one warned line."""
    options = flags(**(OPTIONS | {"max_steps": 10**6, "log_every": 1, "target_loss": 1e-6}))
    with (tmp_path / "log").open("w") as log:
        program = subprocess.Popen(
            [sys.executable, TRAIN, *options],
            cwd=tmp_path, env=environment(**env), stdout=log, stderr=log,
        )  # fmt: skip

    def goes_on_until(condition):
        wait_for(condition, program, seconds=120)
        assert program.poll() is None, (tmp_path / "log").read_text()

    goes_on_until(lambda: "W&B: offline" in (tmp_path / "log").read_text())
    assert subprocess.run(["pkill", "-9", "-P", str(program.pid), "-f", "wandb-core"]).returncode == 0
    goes_on_until(lambda: "warning: W&B" in (tmp_path / "log").read_text())
    reached = metrics(tmp_path / "out")[-1]["step"]
    goes_on_until(lambda: metrics(tmp_path / "out")[-1]["step"] > reached + 2)
    program.terminate()
    assert program.wait(timeout=200) == 4
    said = (tmp_path / "log").read_text()
    assert said.count("warning: W&B") == 1
    assert "Traceback" not in said
