"""slurm/accept.sh on a real cluster: a healthy one passes, and of sick ones the node that is to blame is named."""

import pytest
from acceptances import NODES, accept, dead_node, healthy, report, slow_node, wrong_node

from cluster import start_cluster, why_not

pytestmark = pytest.mark.slurm
# Other tests share the two cores: what depends on speed alone is judged on one sick cluster, which is slower by far.


@pytest.fixture(scope="module")
def cluster():
    """Four nodes."""
    if reason := why_not():
        pytest.skip(f"no Slurm cluster here: {reason}")
    try:
        with start_cluster(nodes=NODES) as running:
            yield running
    except BlockingIOError:
        pytest.skip("another process runs a Slurm cluster on this machine")


def blamed(job):
    """{check: ranks that it blames} of all that failed."""
    checks = report(job)["checks"].values()
    return {check["name"]: check["ranks"] for stage in checks for check in stage if check["verdict"] == "FAIL"}


def test_a_healthy_cluster(cluster, tmp_path):
    """Invariant: two nodes train along the golden curves with every engine, and the job is COMPLETED."""
    job = healthy(cluster, tmp_path, "--stages=numerics", "--minutes=12", nodes=2)
    assert (job.state, job.facts["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    assert {check["verdict"] for check in report(job)["checks"]["numerics"]} == {"PASS"}, job.log
    assert report(job)["hosts"] == ["node1", "node2"]


def test_a_slow_node_is_named(cluster, tmp_path):
    """Invariant: a node with a part of a core is to blame for slow products, and the job fails."""
    job = slow_node(cluster, tmp_path, "--stages=compute", "--minutes=3")
    assert (job.state, job.facts["ExitCode"]) == ("FAILED", "1:0"), job.log
    assert 2 in blamed(job)["fp32 products, speed"], job.log
    assert "--exclude=" in job.log
    assert "node3 (rank 2)" in job.log


def test_a_node_that_computes_wrongly_is_named(cluster, tmp_path):
    """Invariant: its rank leaves the curve alone, the others do not, and all together do."""
    job = wrong_node(cluster, tmp_path, "--stages=numerics", "--minutes=12", nodes=3)
    assert job.state == "FAILED", job.log
    found = blamed(job)
    assert found["fp32, each rank alone"] == [2], job.log
    assert {"fp32, ddp", "fp32, sharded"} <= found.keys(), job.log
    assert "without them: sbatch --exclude=node3\n" in job.log


def test_a_node_that_dies_is_named(cluster, tmp_path):
    """Invariant: the report is written by the nodes that are left, and blames the one that is not."""
    job = dead_node(cluster, tmp_path, "--stages=network,numerics", "--minutes=4")
    assert job.state in ("FAILED", "NODE_FAIL"), job.log
    assert blamed(job)["ranks that answer"] == [1], job.log
    assert report(job)["is_finished"]


@pytest.mark.parametrize("words", [["--out_dir"], ["--minutes=0"]])
def test_a_mistake_fails_the_job(words, cluster, tmp_path):
    """Invariant: one line with the reason in the job's log, and no report."""
    job = accept(cluster, tmp_path, *words, nodes=1)
    job.wait_until_over()
    assert job.state == "FAILED"
    assert "error: write --out_dir=DIRECTORY" in job.log or "--minutes=0.0 must be a positive number" in job.log
    assert report(job) == {}
