"""Bad input gets one line and status 2, and leaves no trace."""

import os
import re
import shutil
import sys

import pytest

from harness.forks import forked, forked_ranks
from harness.lanes import slow
from harness.runs import REPOSITORY, SHORT, TRAIN, flags, report, run, torchrun, train
from nanogpt.__main__ import COMMANDS
from nanogpt.config.cli import _status
from nanogpt.config.errors import ReplicaError, RunError
from nanogpt.config.options import option_types
from nanogpt.config.train_config import TrainConfig

REFUSED = [
    (["--max_step=3"], "unknown option --max_step: did you mean --max_steps?"),
    (["--frobnicate=1"], "unknown option --frobnicate"),
    (["--seed=1", "--seed=2"], "--seed is given twice"),
    (["--out_dir", "--max_steps=3"], "--out_dir needs a value"),
    (["--", "--interactive"], "unexpected argument '--'"),
    (["-"], "unexpected argument '-'"),
    (["--out_dir", "-"], "unexpected argument '-'"),
    (["--out_dir", "-seed=3"], "unexpected argument '-seed=3'"),
    (["--=3"], "unexpected argument '--=3'"),
    (["--data=~nobody-of-that-name/x"], "--data=~nobody-of-that-name/x: no such file"),
    (["out"], "unexpected argument 'out'"),
    (["--subset_tokens=ten"], "--subset_tokens=ten is not of type int"),
    (["--subset_tokens=10.5"], "--subset_tokens=10.5 is not of type int"),
    (["--subset_tokens"], "--subset_tokens needs a value"),
    (["--data="], "--data= needs a value"),
    (["--learning_rate=fast"], "--learning_rate=fast is not of type float"),
    (["--learning_rate=nan"], "--learning_rate=nan must be a positive number"),
    (["--learning_rate=inf"], "--learning_rate=inf must be a positive number"),
    (["--max_minutes=-1"], "--max_minutes=-1.0 must be a positive number"),
    (["--batch_size=0"], "--batch_size=0 must be a positive number"),
    (["--batch_size=2147483648"], "--batch_size=2147483648 must be at most 2147483647"),
    (["--batch_size=1048577"], "--batch_size=1048577 must be at most 1048576"),
    (["--comm_timeout_s=1e300"], "--comm_timeout_s=1e+300 must be at most 2147483647"),
    (["--ema=1"], "--ema=1.0 must be from 0 to less than 1"),
    (["--profile_steps=13:10"], "--profile_steps=13:10 must be START:STOP with 1 <= START < STOP"),
    (["--seed=-1"], "--seed=-1 must be from 0 to"),
    (["--seed=99999999999999999999"], "--seed=99999999999999999999 must be from 0 to"),
    (["--dtype=int8"], "--dtype=int8 must be one of auto, bf16, fp32"),
    (["--engine=horovod"], "--engine=horovod must be one of"),
    (["--n_embd=100"], "--n_embd=100 must be a multiple of --n_head=12"),
    (["--context_length=1"], "--context_length=1 "),
    (["--context_length=2048"], "--context_length=2048 must not exceed --block_size=1024"),
    (["--stride=65"], "--stride=65 would leave tokens between windows untrained"),
    (["--subset_tokens=64"], "--subset_tokens=64 is shorter than one window"),
    (["--subset_tokens=100000"], "--subset_tokens=100000 is more than the"),
    (["--target_loss=0"], "--target_loss=0.0 must be a positive number"),
    (["--target_recall=0"], "--target_recall=0.0 must be a positive number"),
    (["--target_recall=1.5"], "--target_recall=1.5 must be a share, 1 at most"),
    (["--target_recall=nan"], "--target_recall=nan must be a positive number"),
    (["--preset=dmo"], "--preset=dmo must be one of demo"),
    (["--preset=demo", "--preset=demo"], "--preset is given twice"),
    (["--target_loss=0.01", "--preflight=strict"], "--preflight=strict: --target_loss=0.01 is below the entropy"),
    (["--n_layer=96", "--n_embd=12288", "--preflight=strict"], "--preflight=strict: about "),
    (["--n_layer=2147483647"], "the weights alone are 60884357"),
    (["--engine=ddp"], "--engine=ddp needs several processes"),
    (["--data=missing.txt"], "--data=missing.txt: no such file"),
    (["--data=."], "--data=./blank.txt is empty"),
    (["--data=/proc/self/fd"], "--data=/proc/self/fd: no file *.txt in this directory"),
    (["--data=short.txt,latin1.txt"], "--data=latin1.txt is not UTF-8 text (byte 0xef at offset 2)"),
    (["--data=short.txt,,latin1.txt"], "--data=short.txt,,latin1.txt names nothing beside a comma"),
    (["--data=short.txt,./short.txt"], "--data=short.txt,./short.txt has one file twice"),
    (["--data=/dev/zero"], "--data=/dev/zero is not a regular file"),
    (["--data=empty.txt"], "--data=empty.txt is empty"),
    (["--data=blank.txt"], "--data=blank.txt is empty"),
    (["--data=short.txt"], "--data=short.txt has 4 tokens, one window of --context_length=64 needs 65"),
    (["--data=latin1.txt"], "--data=latin1.txt is not UTF-8 text (byte 0xef at offset 2)"),
    (["--data=picture.png"], "--data=picture.png is not UTF-8 text (byte 0x89 at offset 0)"),
    (["--out_dir=short.txt/run"], "--out_dir=short.txt/run cannot be written"),
    (["--out_dir=/proc/run"], "--out_dir=/proc/run cannot be written"),
    (["--out_dir=" + "x" * 300], "--out_dir=xxx"),
    (["--out_dir=a/b/" + "x" * 300], "--out_dir=a/b/xxx"),
    (["--data=" + "x" * 300], "--data='xxx"),
]


@pytest.fixture
def room(tmp_path):
    """A directory with the files that a newcomer might try."""
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\n")
    (tmp_path / "short.txt").write_text("To be or not")
    (tmp_path / "latin1.txt").write_bytes("naïve café".encode("latin1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    return tmp_path


def assert_refused(done, line):
    """Status 2, and all that is said is one line on stderr that begins so."""
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith(line), done
    assert done.stderr.count("\n") == 1, done


def listing(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_every_refusal_is_one_line_and_leaves_no_trace(room, forked):
    """Invariant: status 2, exactly one line on stderr, nothing on stdout, the directory as it was."""
    before = listing(room)
    for words, line in REFUSED:
        assert_refused(forked(room, TRAIN, *words), f"error: {line}")
        assert listing(room) == before, words


def test_a_download_without_a_network(room, forked):
    """Invariant: one line that names the alternatives; a closed port stands for the missing network."""
    closed = {"https_proxy": "http://127.0.0.1:9", "XDG_CACHE_HOME": str(room / "cache")}
    done = forked(room, TRAIN, "--data=tinyshakespeare", **closed)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot download tinyshakespeare.txt (")
    assert "--data=builtin, or --data=PATH" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (room / "out").exists()


@pytest.mark.slow
def test_no_permission(room):
    """Invariant: without the permission to write here, or to read the text, one line; root is made an ordinary user."""
    (room / "closed").mkdir(mode=0o755)
    (room / "secret.txt").write_text("To be or not to be")
    (room / "secret.txt").chmod(0o600)
    room.chmod(0o755)
    ordinary = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    if ordinary and not shutil.which("setpriv"):
        pytest.skip("root needs setpriv to become an ordinary user")
    if not ordinary:
        (room / "closed").chmod(0o555)
        (room / "secret.txt").chmod(0)
    probe = run(*ordinary, sys.executable, "-c", "import fire, torch, nanogpt.config.train_config", cwd=room)
    if probe.returncode:
        pytest.skip(f"an ordinary user cannot use this Python: {probe.stderr.splitlines()[-1]}")
    for options, line in (
        (["--out_dir=closed/run"], "error: --out_dir=closed/run cannot be written: Permission denied"),
        (["--out_dir=closed"], "error: --out_dir=closed cannot be written: Permission denied"),
        (["--data=secret.txt"], "error: --data='secret.txt' cannot be read: Permission denied"),
    ):
        done = run(*ordinary, sys.executable, TRAIN, *options, cwd=room)
        assert (done.returncode, done.stderr) == (2, line + "\n")


def test_a_run_is_never_overwritten(room, forked):
    """Invariant: a directory that holds any part of a run is left as it is."""
    (room / "out").mkdir()
    (room / "out" / "metrics.jsonl").write_text("{}\n")
    done = forked(room, TRAIN)
    assert done.returncode == 2
    assert done.stderr == "error: --out_dir=out already holds a run: name another directory\n"
    assert (room / "out" / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--max_step=3", "error: unknown option --max_step"),
        slow("--out_dir=/proc/run", "error: --out_dir=/proc/run cannot be written"),  # which the first rank alone sees
    ],
)
def test_under_torchrun_it_is_said_once(room, option, line):
    """Invariant: one rank speaks, all leave, nothing is written."""
    before = listing(room)
    done = torchrun(2, option, cwd=room, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert line in done.stderr
    assert listing(room) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options", "line"),
    [
        (2, ["--engine=single"], "error: --engine=single cannot train on 2 ranks"),
        (3, ["--batch_size=2"], "error: --batch_size=2 leaves some of the 3 ranks without a window"),
        (2, ["--data=missing.txt"], "error: --data=missing.txt: no such file"),
    ],
)
def test_without_a_launcher_it_is_said_once(room, ranks, options, line):
    """Invariant: the same of mistakes that only the plan finds; every rank's status is 2."""
    before = listing(room)
    done = forked_ranks(ranks, room, TRAIN, *options)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1, done.stderr
    assert line in done.stderr
    assert listing(room) == before


def test_help_documents_every_option(tmp_path):
    """Invariant: each option with its type, unit and default; status 0, and no torch to wait for."""
    no_torch = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not needed for --help')")
    done = train("--help", cwd=REPOSITORY, timeout=30, env=no_torch)
    assert done.returncode == 0
    for f, _ in option_types(TrainConfig):
        default = "none" if f.default is None else f.default
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"  --{f.name}  ("))
        assert line.endswith(f"default {default})")
        assert f.metadata["unit"] in line
        assert f.metadata["doc"]


def test_help_says_what_each_command_does(room, forked):
    """Invariant: a line of at most 80 columns for each command, which has its name and a sentence."""
    done = forked(room, "nanogpt", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    described = dict(re.findall(r"^  (\w+) +(\S.*\.)$", done.stdout, flags=re.MULTILINE))
    assert list(described) == list(COMMANDS)
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith("  ")) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_its_options_in_groups(room, forked, command):
    """Invariant: each command's help says its options once, and each heading has a name and comes once."""
    done = forked(room, "nanogpt", command, "--help")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    headings = [line for line in lines if re.fullmatch(r"\S.*:|:", line)]
    options = [line.split()[0] for line in lines if re.match(r"  (--\w+|[A-Z_]+)  \(", line)]
    assert ":" not in headings
    assert len(headings) == len(set(headings))
    assert len(options) == len(set(options)) > 0


def test_values_are_taken_as_typed(room, forked):
    """Invariant: a name that looks like a number stays a name."""
    (room / "1e3").write_text("To be or not")
    assert "--data=1e3 has 4 tokens" in forked(room, TRAIN, "--data", "1e3").stderr
    assert "--data=None: no such file" in forked(room, TRAIN, "--data=None").stderr


def train_apart(room, data_of_rank_1):
    """Two ranks under torchrun, the second of which is given another text; both are refused, and nothing is written."""
    (room / "start.py").write_text(
        "import os, sys\n"
        f"if os.environ['RANK'] == '1': sys.argv.append('--data={data_of_rank_1}')\n"
        "import train_overfit\n"
        "train_overfit.main(train_overfit.run)\n"
    )
    done = torchrun(2, *flags(**SHORT, max_steps=2), cwd=room, timeout=120, script="start.py")
    assert done.returncode != 0
    assert not (room / "out").exists()
    return done.stderr


@pytest.mark.slow
def test_a_mistake_of_one_rank_alone_is_said(room):
    """Invariant: where only rank 1 cannot go on, it says so with its rank, and all leave before the time-out."""
    assert "error (rank 1): --data=only-here.txt: no such file" in train_apart(room, "only-here.txt")


@pytest.mark.slow
def test_ranks_that_differ_are_refused(room):
    """Invariant: ranks that would train on two texts refuse together instead of hanging."""
    (room / "other.txt").write_text("To be, or not to be: that is the question. " * 60)
    said = train_apart(room, "other.txt")
    assert "error: rank 1 has data " in said
    assert "other.txt, rank 0 builtin: make them the same" in said


MISTAKES = [
    (["recite"], "error: RUN_DIR is missing"),
    (["recite", "nowhere"], "error: nowhere: no such run directory"),
    (["recite", "."], "error: config.json: no such file"),
    (["recite", ".", "--max_token=3"], "error: unknown option --max_token: did you mean --max_tokens?"),
    (["recite", ".", "--max_tokens=0"], "error: --max_tokens=0 must be a positive number"),
    (["sample"], "error: RUN_DIR is missing"),
    (["sample", "nowhere"], "error: nowhere: no such run directory"),
    (["sample", ".", "--temperature=-1"], "error: --temperature=-1.0 must be 0, or from 0.000001 to 1000000"),
    (["sample", ".", "--temperature=nan"], "error: --temperature=nan must be 0, or from 0.000001 to 1000000"),
    (["sample", ".", "--temperature=1e-300"], "error: --temperature=1e-300 must be 0, or from 0.000001 to 1000000"),
    (["sample", ".", "--temperature=inf"], "error: --temperature=inf must be 0, or from 0.000001 to 1000000"),
    (["sample", ".", "--top_k=0"], "error: --top_k=0 must be a positive number"),
    (["sample", ".", "--top_p=0"], "error: --top_p=0.0 must be more than 0, and at most 1"),
    (["sample", ".", "--top_p=1.1"], "error: --top_p=1.1 must be more than 0, and at most 1"),
    (["sample", ".", "--top_p=nan"], "error: --top_p=nan must be more than 0, and at most 1"),
    (["sample", ".", "--seed=-1"], "error: --seed=-1 must be from 0 to"),
    (["sample", ".", "--num_samples=0"], "error: --num_samples=0 must be a positive number"),
    (["sample", ".", "--max_tokens=0"], "error: --max_tokens=0 must be a positive number"),
    (["sample", ".", "--prompt="], "error: --prompt= needs a value"),
    (["score"], "error: RUN_DIR is missing"),
    (["score", "nowhere"], "error: nowhere: no such run directory"),
    (["verify", "nowhere"], "error: nowhere: no such run directory"),
    (["verify", "."], "error: config.json: no such file"),
    (["plot"], "error: give either RUN_DIR, one or more, or --memory=RUN_DIR"),
    (["plot", "nowhere"], "error: nowhere: no such run directory"),
    (["plot", ".", "nowhere"], "error: config.json: no such file"),
    (["plot", ".", "--out=notes.txt"], "error: --out=notes.txt must end in one of .png, .svg, .pdf"),
    (["plot", ".", "--run_dir=."], "error: unexpected argument '.': --run_dir is given too"),
    (["sing"], "error: unknown command 'sing': one of train"),
]


def test_commands_refuse_in_one_line(room, forked):
    """Invariant: the same for python -m nanogpt."""
    for words, line in MISTAKES:
        assert_refused(forked(room, "nanogpt", *words), line)


def test_a_world_that_is_not_torchruns(room):
    """Invariant: half of torchrun's environment is refused, not hung upon; so are copies that srun started.

    Of those the first alone speaks.
    """
    copy = train(*flags(**SHORT), cwd=room, env={"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, timeout=60)
    assert (copy.returncode, copy.stdout, copy.stderr) == (2, "", "")
    for env, line in (
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
            "error: srun starts this command 2 times without torchrun",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "error: WORLD_SIZE=2 without MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "error: WORLD_SIZE=2 without MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "error: RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers"),
        (
            {"WORLD_SIZE": "1", "LOCAL_RANK": "5"},
            "error: RANK=0, WORLD_SIZE=1, LOCAL_RANK=5, LOCAL_WORLD_SIZE=6 do not fit together",
        ),
    ):
        assert_refused(forked(room, TRAIN, *flags(**SHORT), **env), line)


def test_a_reader_that_leaves_ends_no_run(tmp_path):
    """Invariant: train_overfit.py | head -n 1 trains until its budget is spent, in silence, and reports."""
    program = f"{sys.executable} {TRAIN} {' '.join(flags(**SHORT, log_every=1, max_steps=3))}"
    done = run("bash", "-c", f"{program} | head -n 1; exit ${{PIPESTATUS[0]}}", cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (3, 1, "")
    assert report(tmp_path / "out")["steps"] == 3


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RunError("the disk\nis full"), 1, "error: the disk\\nis full\n"),
        (RunError("rank 0 is missing", rank=3), 1, "error (rank 3): rank 0 is missing\n"),
        (RunError("one of several copies", status=2, is_told=True), 2, ""),
        (ReplicaError("the ranks no longer hold the same"), 1, "error: the ranks no longer hold the same\n"),
    ],
)
def test_a_run_that_cannot_go_on_ends_with_one_line(error, status, said, capsys, monkeypatch):
    """Invariant: an error of the run is one line on stderr and a status, and no line where another process says it."""
    monkeypatch.delenv("RANK", raising=False)

    def command():
        raise error

    assert _status(command) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("ranks", "said"), [("1", "result\nPython ended\n"), ("2", "result\n")])
def test_a_rank_of_several_leaves_without_python_s_end(ranks, said):
    """Invariant: output and status are whole; what Python does at its end, where gloo may abort, is not done."""
    program = """
import atexit
from nanogpt.config.cli import main
atexit.register(print, "Python ended")
print("result")
main(lambda: 3)
"""
    done = run(sys.executable, "-c", program, env=os.environ | {"WORLD_SIZE": ranks}, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (3, said)
