"""Pictures of runs: they show what the run's files hold, and never cost a run its end."""

import json
import logging
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from harness.runs import REPOSITORY, SHORT, flags, metrics, report, run, train
from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.monitor.live_plot import live_plot
from nanogpt.plots.loss_plot import COLOURS, draw, save
from nanogpt.plots.run_history import name_differences, read_curve

ROW = {"step": 10, "wall_s": 20.0, "loss": 3.0, "full_pass_loss": None}

NO_TARGET = '{"config": {"subset_tokens": 100, "data": "builtin", "target_loss": 0}, "floor": 0.1}'


def write_run(path, rows=(ROW,), ranks=1, floor=0.03, **options):
    """The files of a run that goes on, with these options and rows -> its directory."""
    path.mkdir(parents=True)
    config = asdict(TrainConfig(**{"subset_tokens": 100, "out_dir": str(path)} | options))
    facts = {"config": config, "floor": floor, "world_size": ranks, "device": "a processor"}
    (path / "config.json").write_text(json.dumps(facts))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines_of(panel):
    """The (x, y) values of a panel's lines."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines]


def known(values):
    """Values that are not NaN."""
    return [value for value in values if value == value]


def labels_of(figure):
    """The labels of a figure's runs."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_picture_of_a_run_holds_its_data(finished):
    """Reference: metrics.jsonl and report.json of a real run, point by point, in both panels."""
    out_dir, _ = finished
    rows, told = metrics(out_dir), report(out_dir)
    figure = draw([read_curve(str(out_dir))])
    over_steps, over_time = figure.axes
    unit, unit_s = ("s", 1) if rows[-1]["wall_s"] < 180 else ("min", 60)  # a busy machine takes minutes
    times = [row["wall_s"] / unit_s for row in rows]
    for panel, x in ((over_steps, [row["step"] for row in rows]), (over_time, times)):
        training, passes, target, floor = lines_of(panel)
        assert training == (pytest.approx(x), [row["loss"] for row in rows])
        assert known(passes[1]) == [row["full_pass_loss"] for row in rows if row["full_pass_loss"] is not None]
        assert known(passes[1])[-1] == told["loss"]
        assert (set(target[1]), set(floor[1])) == ({0.099}, {told["floor"]})
        assert panel.get_yscale() == "log"
    assert over_steps.get_ylabel() == "loss (nats/token)"
    assert over_steps.get_xlabel() == "step"
    assert over_time.get_xlabel() == f"time in training ({unit})"
    assert figure.get_suptitle().startswith(f"256 tokens of builtin; target reached: step {told['steps']}, ")


def test_a_run_leaves_its_picture(finished, tmp_path):
    """Reference: what draw() makes of the finished run's files, byte by byte; and a reader of PNG."""
    out_dir, _ = finished
    save(draw([read_curve(str(out_dir))]), tmp_path / "again.png")
    assert (out_dir / "loss.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert imread(out_dir / "loss.png").shape == (440, 1000, 4)


@pytest.mark.parametrize(
    ("where", "matplotlibrc", "env"),
    [
        (".", b"text.usetex: True\nlines.linewidth: 9\nsavefig.bbox: tight\n", {}),
        (".", "font.family: café\n".encode("latin1"), {"MPLBACKEND": "module://not_installed.backend_inline"}),
        ("here", "font.family: café\n".encode("latin1"), {}),
        ("here", b"no such line\nbackend: unknown\n", {"MPLBACKEND": "unknown"}),
        (".", b"", {"MPLCONFIGDIR": "/dev/null/nowhere"}),
    ],
)
def test_no_setting_of_a_person_decides_over_a_picture(finished, tmp_path, where, matplotlibrc, env):
    """Reference: the picture that the run left, byte by byte; and nothing on stderr."""
    (tmp_path / "here").mkdir()
    (tmp_path / where / "matplotlibrc").write_bytes(matplotlibrc)
    env = {"MPLCONFIGDIR": str(tmp_path)} | env
    plot = (sys.executable, "-m", "nanogpt", "plot", finished[0], "--out=loss.png")
    done = run(*plot, cwd=tmp_path / "here", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "here" / "loss.png").read_bytes() == (finished[0] / "loss.png").read_bytes()


def test_a_persons_own_settings_stay(tmp_path):
    """Invariant: drawing, in two threads at once too, changes no setting of matplotlib, its log or other warnings."""
    curves = [read_curve(write_run(tmp_path / "run", data="日本.txt"))]
    save(draw(curves), tmp_path / "before.png")
    log = logging.getLogger("matplotlib")
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9, "savefig.dpi": 7}):
        log.setLevel(logging.INFO)
        settings = dict(matplotlib.rcParams)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda name: save(draw(curves), tmp_path / name), ["1.png", "2.png", "3.png", "4.png"]))
        assert dict(matplotlib.rcParams) == settings
        assert log.level == logging.INFO
        log.setLevel(logging.NOTSET)
    for name in ("1.png", "2.png", "3.png", "4.png"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "before.png").read_bytes()
    figure = Figure()
    figure.suptitle("日本")
    with pytest.warns(UserWarning, match="Glyph"):
        figure.savefig(tmp_path / "theirs.png")


def test_a_matplotlib_that_does_not_work_is_one_line(finished, tmp_path):
    """Invariant: status 2 and the first line of what it says, which may be a hundred lines."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise RuntimeError('\\nlatex could not be found\\n' * 50)")
    env = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = run(sys.executable, "-m", "nanogpt", "plot", finished[0], cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --out=loss.png cannot be drawn: latex could not be found\n"


def test_a_picture_while_the_run_goes_on(tmp_path):
    """Invariant: without a row no picture and no word; then the picture is there before the end, and whole at it."""
    directory, heard = tmp_path / "run", []
    write_run(directory, rows=())
    with closing(live_plot(directory, heard.append, period_s=0.02)) as live:
        time.sleep(0.2)
        assert not (directory / "loss.png").exists()
        (directory / "metrics.jsonl").write_text(json.dumps(ROW) + "\n" + '{"step": 20, "lo')  # being written
        give_up = time.monotonic() + 60
        while not (directory / "loss.png").exists():
            assert time.monotonic() < give_up
            time.sleep(0.02)
        (directory / "metrics.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"step": 20}) + "\n")
        live.result({}, None)
    save(draw([read_curve(str(directory))]), tmp_path / "again.png")
    assert (directory / "loss.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert heard == []
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "loss.png", "metrics.jsonl"]


@pytest.mark.slow
def test_without_matplotlib_a_run_goes_on(tmp_path):
    """Invariant: one line a picture says that there is none; status and files are those of any other run."""
    (tmp_path / "without" / "matplotlib").mkdir(parents=True)
    (tmp_path / "without" / "matplotlib" / "__init__.py").write_text("raise ImportError('No module matplotlib')")
    env = {"PYTHONPATH": f"{tmp_path / 'without'}:{REPOSITORY}"}
    done = train(*flags(**SHORT, max_steps=2), cwd=tmp_path, env=env)
    assert done.returncode == 3, done.stderr
    for name in ("loss.png", "memory.png", "recall.png"):
        assert done.stdout.count(f"warning: {name} could not be drawn (No module matplotlib); going on") == 1
    assert report(tmp_path / "out")["steps"] == 2
    done = run(sys.executable, "-m", "nanogpt", "plot", "out", cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no picture without matplotlib (No module matplotlib): pip install matplotlib\n"


@contextmanager
def no_file_above(size_bytes):
    """The file-size limit of this process, in place of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_one_line(tmp_path):
    """Invariant: however often drawing fails, it is said once; the picture before and no other file stay."""
    directory, heard = tmp_path / "run", []
    write_run(directory)
    live_plot(directory, heard.append).result({}, None)
    before = (directory / "loss.png").read_bytes()
    with no_file_above(10_000), closing(live_plot(directory, heard.append, period_s=0.02)) as live:
        time.sleep(2)
        live.result({}, None)
    assert len(heard) == 1
    assert heard[0].startswith("warning: loss.png could not be drawn ([Errno 27] File too large")
    assert (directory / "loss.png").read_bytes() == before
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "loss.png", "metrics.jsonl"]


def test_runs_are_told_apart_by_what_differs(tmp_path):
    """Reference: written out here; what changes no curve is no difference, and equal runs have their directories."""
    a = write_run(tmp_path / "a", learning_rate=1e-3, log_every=5, health="warn")
    b = write_run(tmp_path / "b", learning_rate=6e-4, data="/some/where/my_$text$.txt")
    c = write_run(tmp_path / "c", learning_rate=6e-4, ranks=8)
    d = write_run(tmp_path / "_d", learning_rate=6e-4, ranks=8)
    curves = [read_curve(path) for path in (a, b, c, d)]
    names = [
        "data=builtin, learning_rate=0.001, ranks=1",
        "data=my_$text$.txt, learning_rate=0.0006, ranks=1",
        f"data=builtin, learning_rate=0.0006, ranks=8 in {c}",
        f"data=builtin, learning_rate=0.0006, ranks=8 in {d}",
    ]
    assert name_differences(curves) == names
    assert name_differences([curves[2], curves[3]]) == [f"in {c}", f"in {d}"]
    assert name_differences(curves[:1]) == [""]
    figure = draw(curves)
    assert [label.replace("\n", " ") for label in labels_of(figure)] == [
        f"{name}: so far: step 10, 20 s" for name in names
    ]
    save(figure, tmp_path / "out.pdf")
    assert (tmp_path / "out.pdf").read_bytes().startswith(b"%PDF")


def test_many_runs_have_styles_of_their_own(tmp_path):
    """Invariant: no two of 15 runs have the same colour and dashes; targets that differ have their run's colour."""
    curves = [read_curve(write_run(tmp_path / str(seed), seed=seed, target_loss=0.1 + seed)) for seed in range(15)]
    panel = draw(curves).axes[0]
    training = panel.lines[0 : 2 * len(curves) : 2]
    assert len({(line.get_color(), line.get_linestyle()) for line in training}) == 15
    targets = {line.get_ydata()[0]: line.get_color() for line in panel.lines if len(set(line.get_ydata())) == 1}
    assert [targets[0.1 + seed] for seed in range(5)] == list(COLOURS[:5])


def test_figures_that_cannot_be_shown(tmp_path):
    """Invariant: null and 0 leave a gap; a floor far below the target is said and does not stretch the axis."""
    rows = [ROW, ROW | {"step": 20, "loss": None}, ROW | {"step": 30, "loss": 0.0}, ROW | {"step": 40, "loss": 1.0}]
    figure = draw([read_curve(write_run(tmp_path / "run", rows=rows, floor=1e-9))])
    save(figure, tmp_path / "out.png")
    panel, legend = figure.axes[0], figure.axes[1].get_legend()
    assert panel.get_ylim() == pytest.approx((0.099 / 1.3, 3.0 * 1.3))
    assert [text.get_text() for text in legend.get_texts()] == [
        "training loss", "full pass", "target 0.099", "entropy floor 1e-09 (below)",
    ]  # fmt: skip


def test_the_command(tmp_path, forked):
    """Invariant: the picture is where it was asked for, in the form that its name has; else one line, status 2."""
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1)
    assert forked(tmp_path, "nanogpt", "plot", "a", "b", "--out=both.svg").returncode == 0
    assert "<svg" in (tmp_path / "both.svg").read_text()
    write_run(tmp_path / "new", rows=[])
    for words in (["new"], ["a", "--out=a/b/c.png"]):
        done = forked(tmp_path, "nanogpt", "plot", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"config.json: no such file"),
        ("config.json", "{", r"config.json cannot be read"),
        ("config.json", "[]", r"config.json cannot be read: it holds no JSON object"),
        ("config.json", '{"config": {}, "floor": 0.1}', r"holds something else than a run: KeyError\('target_loss'\)"),
        ("config.json", NO_TARGET, r"holds something else than a run: ValueError\('0 on a logarithmic axis'\)"),
        ("metrics.jsonl", None, r"metrics.jsonl: no such file"),
        ("metrics.jsonl", '{"step": 1\n' + json.dumps(ROW) + "\n", r"metrics.jsonl is damaged at line 1$"),
        ("metrics.jsonl", "[1]\n", r"holds something else than a run"),
        ("metrics.jsonl", '{"step": null}\n', r"holds something else than a run"),
        ("metrics.jsonl", '{"step": Infinity}\n', r"metrics.jsonl is damaged at line 1$"),
        ("metrics.jsonl", '{"step": 1e999}\n', r"holds something else than a run"),
        ("report.json", "", r"report.json cannot be read"),
        ("report.json", "{}", r"report.json is not a run's: it has no exit_reason"),
    ],
)
def test_files_that_are_no_runs(tmp_path, name, content, message):
    """Invariant: a file that is missing or damaged is a ConfigError of one line that names it."""
    write_run(tmp_path / "run")
    if content is None:
        (tmp_path / "run" / name).unlink()
    else:
        (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read_curve(str(tmp_path / "run"))
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_wandb_is_sent_the_last_pictures(tmp_path):
    """Reference: loss.png and recall.png as the run leaves them, byte by byte."""
    done = train(*flags(**SHORT, max_steps=2, wandb="offline"), cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert done.returncode == 3, done.stderr
    for name in ("loss", "recall"):
        (sent,) = (tmp_path / "out" / "wandb").glob(f"offline-run-*/files/media/images/{name}_*.png")
        assert sent.read_bytes() == (tmp_path / "out" / f"{name}.png").read_bytes()
