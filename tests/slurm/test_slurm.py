"""slurm/train.sh on a real cluster of three nodes, which cluster.sh starts: nothing of Slurm is imitated.

Its timers are shorter than a site's, so that nobody waits for minutes: KillWait 10 s, SlurmdTimeout 10 s, and 5 s until
a requeued job may start again.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import CPU_NODES, REPOSITORY, TINY, Job, ask_slurm, slurm, start_cluster, why_not
from harness.runs import flags, metrics, outcome, report
from nanogpt.storage.checkpoint import CheckpointReader, examine
from nanogpt.storage.json_file import FORMAT_VERSION
from scenarios import SCENARIOS, cancel, failing_rank

pytestmark = pytest.mark.slurm
REQUEUED = [name for name, play in SCENARIOS.items() if play not in (cancel, failing_rank)]


@pytest.fixture(scope="module")
def cluster():
    """Three nodes."""
    if reason := why_not():
        pytest.skip(f"no Slurm cluster here: {reason}")
    try:
        with start_cluster(nodes=3) as running:
            yield running
    except BlockingIOError:
        pytest.skip("another process runs a Slurm cluster on this machine")


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """A job on two nodes that ran to its end."""
    job = cluster.submit(tmp_path_factory.mktemp("undisturbed"), "--nodes=2", *CPU_NODES)
    job.wait_until_over()
    assert (job.state, job.facts["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    return job


@pytest.fixture
def clone(tmp_path):
    """A copy of what train.sh needs, in a directory with a blank, whose site.env brings the environment."""
    there = tmp_path / "my clone"
    for name in ("nanogpt", "slurm"):
        shutil.copytree(REPOSITORY / name, there / name)
    for name in ("train_overfit.py", "ds_config.json"):
        shutil.copy(REPOSITORY / name, there / name)
    venv = Path(sys.executable).parent
    site = f'PATH="{venv}:$PATH" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" WANDB_MODE=disabled'
    (there / "slurm" / "site.env").write_text(f"export {site}\n")
    return there


def assert_same(job: Job, reference: Job):
    assert job.state == "COMPLETED", job.log
    for got, wanted in zip(outcome(job.run_dir), outcome(reference.run_dir), strict=True):
        assert got == wanted


def test_it_says_where_it_runs(undisturbed):
    """Invariant: nodes, attempt, rendezvous and logs are in the job log; each rank has a log of its own."""
    first = [line.split("train.sh: ")[1] for line in undisturbed.log.splitlines()[:3]]
    job = undisturbed.id
    assert first[0] == f"job {job}, attempt 0 of at most 21: runs/{job}, logs in runs/{job}/logs/{job}.0"
    assert first[1] == "nodes: 2 (node[1-2]), GPUs per node: 0, CPUs per node: 4"
    assert re.fullmatch(rf"rendezvous node1:[12]\d{{4}}, id {job}\.0", first[2])
    assert undisturbed.log.splitlines()[-1].endswith("target reached")
    assert undisturbed.trains(attempt=0)
    assert undisturbed.rank_log(attempt=0, rank=1).exists()
    assert report(undisturbed.run_dir)["world_size"] == 2


@pytest.mark.parametrize("name", REQUEUED)
def test_it_is_requeued_and_goes_on(name, cluster, tmp_path, undisturbed):
    """Reference: a job that nobody disturbed: the same rows, report and weights, bit for bit."""
    job = SCENARIOS[name](cluster, tmp_path).job
    assert job.restarts == 1
    resumed = int(re.search(r"resumed from step_(\d+)", job.log)[1])
    assert resumed >= 10, "from a checkpoint"
    assert_same(job, undisturbed)


def test_scancel_saves_and_is_final(cluster, tmp_path):
    """Invariant: a cancelled job has saved its newest step and is not requeued."""
    job = cancel(cluster, tmp_path).job
    assert (job.state, job.restarts) == ("CANCELLED", 0)
    assert job.report["exit_reason"] == "stopped"
    _, newest = next(examine(job.run_dir))
    assert isinstance(newest, CheckpointReader), newest
    assert newest.step == job.report["steps"] > 10


def test_a_failing_rank_fails_the_job(cluster, tmp_path):
    """Invariant: at once, not requeued, and the log names the rank, its node and what ended it."""
    played = failing_rank(cluster, tmp_path)
    assert (played.job.state, played.job.restarts, played.job.facts["ExitCode"]) == ("FAILED", 0, "1:0")
    assert played.left_s < 30, "not at once"
    assert re.search(r"error: node[12]: rank [01] failed \(SIGKILL\)", played.job.log), played.job.log


def test_a_finished_job_stays_finished(cluster, undisturbed):
    """Invariant: requeued, it finds its target reached, changes nothing and is COMPLETED again."""
    before = outcome(undisturbed.run_dir)
    slurm("scontrol", "requeue", undisturbed.id)
    undisturbed.wait_until(lambda: "nothing to do" in undisturbed.log, "it runs again")
    undisturbed.wait_until_over()
    assert (undisturbed.state, undisturbed.restarts) == ("COMPLETED", 1)
    assert outcome(undisturbed.run_dir) == before


def test_the_real_time_limit(cluster, tmp_path):
    """Invariant: Slurm's own signal, up to 30 s earlier than asked for, is in time; the job did not end by TIMEOUT.

    Also of a job that another job submits, which inherits what Slurm told that one of itself.
    """
    words = ("--nodes=1", *CPU_NODES, "--time=2", "--signal=B:USR1@60")
    inherited = {"SLURM_RESTART_COUNT": "3", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"}
    job = cluster.submit(tmp_path, *words, options={"target_loss": 1e-4}, env=inherited)
    job.wait_until(lambda: job.restarts == 1, "it is requeued")
    slurm("scancel", job.id)
    assert "time limit near, saved; requeued" in job.log
    assert "asked to stop by the file STOP" in job.log
    assert job.report["exit_reason"] == "stopped"


def test_a_signal_before_the_first_step(cluster, tmp_path):
    """Invariant: USR1 while the ranks start is not lost, and with MAX_RESTARTS=0 the job is not requeued."""
    job = cluster.submit(tmp_path, "--nodes=1", *CPU_NODES, env={"MAX_RESTARTS": "0"})
    job.wait_until(lambda: "rendezvous" in job.log, "it starts")
    job.signal_batch_script("USR1")
    job.wait_until_over()
    assert (job.state, job.restarts, job.facts["ExitCode"]) == ("FAILED", 0, "4:0")
    assert "asked to stop before the first step" in job.log
    assert "not requeued, MAX_RESTARTS=0 is reached" in job.log
    assert not (job.run_dir / "STOP").exists()


def test_two_copies_do_not_both_write(cluster, tmp_path):
    """Invariant: each step once, every checkpoint whole, when Slurm runs a job again that still trains on a lost node.

    The lock's file is removed, as on a file system that does not share locks between nodes.
    """
    job = cluster.submit(tmp_path, "--nodes=1", *CPU_NODES, options={"target_loss": 1e-4})
    job.wait_until(lambda: job.steps > 12, "it trains")
    node = job.facts["NodeList"]
    cluster.freeze(node)
    try:
        job.wait_until(lambda: job.restarts == 1, "Slurm gives the node up")
        assert len(job.ranks()) == 1, "the old copy trains on"
        (job.run_dir / ".lock").unlink()
        job.wait_until(lambda: job.trains(attempt=1), "the new copy trains")
        job.wait_until(lambda: "has taken over" in job.rank_log(0).read_text(), "the old copy leaves")
        steps = job.steps
        job.wait_until(lambda: job.steps > steps + 20 and len(job.ranks()) == 1, "the new copy trains alone")
        assert job.restarts == 1, "the old copy's batch script leaves the job alone"
        slurm("scancel", job.id)
        job.wait_until_over()
    finally:
        cluster.boot(node)
    steps = [row["step"] for row in metrics(job.run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    assert all(isinstance(found, CheckpointReader) for _, found in examine(job.run_dir))


def test_two_jobs_share_the_nodes(cluster, tmp_path, undisturbed):
    """Reference: a job that had the nodes to itself; neither takes the other's port, GPU or directory."""
    part = ("--oversubscribe", "--gpus-per-node=1", "--cpus-per-task=2", "--nodes=2", "--nodelist=node1,node2")
    first, second = (cluster.submit(tmp_path, *part) for _ in range(2))
    for job in (first, second):
        job.wait_until_over()
        assert_same(job, undisturbed)
    assert second.facts["StartTime"] < first.facts["EndTime"], "they ran at the same time"
    assert "GPUs per node: 1, CPUs per node: 2" in first.log


def test_a_sweep_ends_in_a_table(cluster, tmp_path):
    """Reference: the runs' own reports; a run for each value, and of the array a signal requeues one task alone.

    Also where sbatch keeps back all variables but a list.
    """
    options = flags(**{name: value for name, value in TINY.items() if name != "learning_rate"})
    sweep = [
        REPOSITORY / "slurm" / "sweep.sh",
        "learning_rate=6e-3,4e-3",
        "-p",
        "grace",
        "--nodes=1",
        "--export=PATH,OMP_NUM_THREADS,CUDA_VISIBLE_DEVICES,WANDB_MODE",
        *CPU_NODES,
        "--",
        *options,
    ]
    told = slurm(*map(str, sweep), cwd=tmp_path)
    array, summary = re.match(r"job (\d+): .*; job (\d+) writes", told).groups()
    sweep_dir = tmp_path / "runs" / array
    first, last = (Job(f"{array}_{task}", tmp_path) for task in (0, 1))
    last.wait_until(lambda: "\nstep " in last.log, "it trains")
    last.signal_batch_script("USR1")
    Job(summary, tmp_path).wait_until_over()
    assert Job(summary, tmp_path).facts["Partition"] == first.facts["Partition"] == "grace", "-p is for both"
    assert (first.state, last.state) == ("COMPLETED", "COMPLETED")
    assert (first.restarts, last.restarts) == (0, 1)
    table = (sweep_dir / "summary.md").read_text().splitlines()
    for row, value in zip(table[2:4], ("4e-3", "6e-3"), strict=True):
        run_dir = sweep_dir / f"learning_rate={value}"
        told = report(run_dir)
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[:4] == [run_dir.name, "target_reached", str(told["steps"]), f"{told['loss']:.4g}"]
        assert json.loads((run_dir / "config.json").read_text())["config"]["learning_rate"] == float(value)
    assert table[-1].startswith("2 of 2 runs reached their target after ")


def test_a_report_of_an_unknown_version_has_no_figures(tmp_path):
    """Invariant: its row tells the version and no more, it counts as not reached; Python's own library suffices."""
    newer = FORMAT_VERSION + 1
    versions = {"seed=0": {}, "seed=1": {"format_version": FORMAT_VERSION}, "seed=2": {"format_version": newer}}
    for name, version in versions.items():
        (tmp_path / name).mkdir()
        content = {"exit_reason": "target_reached", "reached": True, "steps": 36} | version
        (tmp_path / name / "report.json").write_text(json.dumps(content))
    command = [sys.executable, "-IS", REPOSITORY / "slurm" / "summary.py", tmp_path]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert table[2:5] == [
        "| seed=0 | target_reached | 36 |  |  |  |",
        "| seed=1 | target_reached | 36 |  |  |  |",
        f"| seed=2 | report.json has format_version {newer}, {FORMAT_VERSION} is the newest known here |  |  |  |  |",
    ]
    assert table[-1] == "2 of 3 runs reached their target after 36 to 36 steps, median 36."


@pytest.mark.parametrize("words", [["seed=0,1", "--", "--out_dir=x"], ["out_dir=x,y"]])
def test_the_runs_of_a_sweep_do_not_share_a_directory(words, tmp_path):
    """Invariant: status 2 and one line before anything is submitted, which would need no cluster to be refused."""
    done = subprocess.run(
        [REPOSITORY / "slurm" / "sweep.sh", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "a directory of its own" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_does_not_mix_with_an_older_one(cluster, tmp_path):
    """Invariant: where the directory of its number is taken, status 2, one line, and its jobs are cancelled."""
    latest = slurm("sbatch", "--parsable", "--output=/dev/null", "--wrap=true")
    array = str(int(latest) + 1)
    (tmp_path / "runs" / array).mkdir(parents=True)
    done = ask_slurm(str(REPOSITORY / "slurm" / "sweep.sh"), "seed=0,1", *CPU_NODES, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"runs/{array} cannot be made (File exists)" in done.stderr
    assert Job(array, tmp_path).state == "CANCELLED"
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", array]


def test_a_rank_for_each_gpu_and_an_engine(cluster, tmp_path):
    """Invariant: by default a job has the whole node, and starts a rank for each of its GPUs; ENGINE passes through.

    Its budget spent it is FAILED 3:0, and so it is when it is requeued.
    """
    job = cluster.submit(tmp_path, "--nodes=1", options={"max_steps": 2}, env={"ENGINE": "deepspeed"})
    job.wait_until_over()
    assert (job.state, job.facts["ExitCode"]) == ("FAILED", "3:0"), job.log
    assert "GPUs per node: 2, CPUs per node: 4" in job.log
    for rank in (0, 1):  # Slurm's GPUs are pretended here, and the health check notices
        assert re.search(rf"warning: rank {rank} on node\d: .+ although the job has GPUs on this node", job.log)
    assert (job.report["world_size"], job.report["engine"]) == (2, "deepspeed")
    assert job.report["exit_reason"] == "max_steps"
    slurm("scontrol", "requeue", job.id)
    job.wait_until(lambda: "nothing to do" in job.log, "it runs again")
    job.wait_until_over()
    assert (job.state, job.facts["ExitCode"]) == ("FAILED", "3:0"), job.log


def test_a_bad_cable_is_named(cluster, tmp_path):
    """Invariant: with --health=strict a slow link ends the job in one line that names its node."""
    with cluster.slowed("node2", "20mbit"):
        job = cluster.submit(tmp_path, "--nodes=3", *CPU_NODES, options={"health": "strict"})
        job.wait_until_over()
    assert job.state == "FAILED"
    (line,) = re.findall(r"^error: --health=strict: .*$", job.log, re.MULTILINE)
    assert re.search(r"rank 1 on node2: .*GB/s from rank 0 on node1", line), line
    assert job.steps == 0


def test_torch_is_missing(cluster, tmp_path):
    """Invariant: one line says on which node, for which Python, and the job fails."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    job = cluster.submit(tmp_path, "--nodes=2", *CPU_NODES, env={"PATH": f"{tmp_path / 'venv' / 'bin'}:/usr/bin:/bin"})
    job.wait_until_over()
    assert job.state == "FAILED"
    lines = re.findall(r"^error: node[12]: \S+/venv/bin/python3 cannot import torch .*$", job.log, re.MULTILINE)
    assert lines, job.log
    assert "Traceback" not in job.log


def test_a_mistake_is_one_line(cluster, tmp_path):
    """Invariant: what train_overfit.py says of a wrong option is in the job log, and the job fails."""
    job = cluster.submit(tmp_path, "--nodes=1", *CPU_NODES, options={"batch_size": 0})
    job.wait_until_over()
    assert (job.state, job.facts["ExitCode"]) == ("FAILED", "1:0")
    assert job.log.count("error: --batch_size=0 must be a positive number") == 1
    assert "Traceback" not in job.log


def test_the_ways_to_submit_it(cluster, tmp_path, clone):
    """Invariant: it trains where it was told to, with the environment of site.env, and ends with the documented status.

    Through a link; a home with a blank, as ~; tasks that Slurm would start itself; an environment that sbatch keeps
    back, wholly or but for a list.
    """
    link = tmp_path / "train me.sh"
    link.symlink_to(clone / "slurm" / "train.sh")
    home = tmp_path / "my home"
    home.mkdir()
    words = ("--nodes=1", *CPU_NODES, "--ntasks-per-node=2", "--export=HOME")
    options = {"out_dir": "~/a b", "wandb_notes": "two\n lines", "max_steps": 2}
    told = cluster.submit(tmp_path, *words, options=options, env={"HOME": str(home)}, script=link)
    options = {"target_loss": 1e-4}
    script = clone / "slurm" / "train.sh"
    bare = cluster.submit(
        tmp_path, "--nodes=1", *CPU_NODES, options=options, env={"SBATCH_EXPORT": "NONE"}, script=script
    )
    bare.wait_until(lambda: bare.trains(attempt=0), "it trains")
    (bare.run_dir / "STOP").touch()
    for job in (told, bare):
        job.wait_until_over()
    assert (told.state, told.facts["ExitCode"]) == ("FAILED", "3:0"), told.log
    assert (bare.state, bare.facts["ExitCode"]) == ("FAILED", "4:0"), bare.log
    assert told.log.splitlines()[-1].endswith("target not reached: max_steps")
    assert (report(home / "a b")["world_size"], bare.report["world_size"]) == (1, 1)
    assert (home / "a b" / "logs" / f"{told.id}.0" / "rank_0.log").exists()
    assert not list(tmp_path.rglob("~*"))


def test_what_cannot_start_is_one_line(cluster, tmp_path):
    """Invariant: status 2, one line that names what is wrong, and nothing left beside the log."""
    alone = tmp_path / "train.sh"
    shutil.copy(REPOSITORY / "slurm" / "train.sh", alone)
    words = ("--nodes=1", *CPU_NODES)
    jobs = {
        "MAX_RESTARTS=1e3 must be": cluster.submit(tmp_path, *words, env={"MAX_RESTARTS": "1e3"}),
        "no user nobody-of-that-name": cluster.submit(tmp_path, *words, options={"out_dir": "~nobody-of-that-name/x"}),
        "--out_dir=/proc/x cannot be": cluster.submit(tmp_path, *words, options={"out_dir": "/proc/x"}),
        "no train_overfit.py above": cluster.submit(tmp_path, *words, script=alone),
    }
    for said, job in jobs.items():
        job.wait_until_over()
        assert (job.state, job.facts["ExitCode"], job.log.count("\n")) == ("FAILED", "2:0", 1), job.log
        assert said in job.log
    assert {path.name for path in tmp_path.iterdir()} == {"train.sh", *(f"slurm-{job.id}.out" for job in jobs.values())}


def test_steps_that_cannot_start_are_not_a_lost_node(cluster, tmp_path):
    """Invariant: what fails before any rank has run, and every node up, fails the job at once and is not requeued."""
    job = cluster.submit(tmp_path, "--nodes=2", *CPU_NODES, env={"SLURM_MPI_TYPE": "none such"})  # srun refuses
    job.wait_until(lambda: job.restarts == 1 or job.state == "FAILED", "it fails")
    slurm("scancel", job.id)
    assert (job.state, job.restarts, job.facts["ExitCode"]) == ("FAILED", 0, "1:0"), job.log
    assert job.log.splitlines()[-1].startswith("error: no rank has started")


def test_a_node_lost_before_the_ranks_start(cluster, tmp_path):
    """Invariant: requeued, as Slurm says that the node is down, though no rank has run that could have been hurt."""
    job = cluster.submit(tmp_path, "--nodes=2", *CPU_NODES)
    job.wait_until(lambda: "rendezvous" in job.log, "it starts")
    node = slurm("scontrol", "show", "hostnames", job.facts["NodeList"]).split()[1]
    cluster.crash(node)
    try:
        job.wait_until(lambda: job.restarts == 1 or job.state == "FAILED", "it is requeued")
        assert job.restarts == 1, job.log
        slurm("scancel", job.id)
    finally:
        cluster.boot(node)
    assert not job.rank_log(attempt=0).exists()


def test_a_number_that_slurm_uses_again(cluster, undisturbed):
    """Reference: the job that had the number, from whose code and result, in runs/NUMBER, the new one takes nothing.

    The last test: the controller forgets all jobs.
    """
    before = outcome(undisturbed.run_dir)
    started = undisturbed.run_dir / "code" / undisturbed.id / "train_overfit.py"
    started.write_text("raise SystemExit('the old code')")
    cluster.forget(undisturbed.id)
    job = cluster.submit(undisturbed.cwd, "--nodes=2", *CPU_NODES)
    assert job.id == undisturbed.id
    job.wait_until(lambda: "this job writes runs/" in job.log, "it starts", timeout_s=60)
    job = replace(job, name=re.search(r"this job writes runs/(\S+)", job.log)[1])
    job.wait_until(lambda: job.steps > 12, "it has trained 12 steps")
    job.signal_batch_script("USR1")
    job.wait_until(lambda: job.restarts == 1, "it is requeued")
    job.wait_until_over()
    assert int(re.findall(r"resumed from step_(\d+)", job.log)[-1]) > 12, "its own"
    assert_same(job, undisturbed)
    assert outcome(undisturbed.run_dir) == before
    assert sorted(path.name for path in (undisturbed.cwd / "runs").iterdir()) == [undisturbed.id, job.name]
