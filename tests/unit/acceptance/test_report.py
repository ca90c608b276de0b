"""An acceptance: its verdicts follow from its figures, and what was changed afterwards is found."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest

from nanogpt.acceptance.files import differences, exclude, headline, page_of, write
from nanogpt.acceptance.report import STAGES, Acceptance, Failure
from nanogpt.acceptance.signature import checked_signature, find_key, sign
from nanogpt.acceptance.stages.numerics import Curve, golden, golden_sha256
from nanogpt.acceptance.verdict import Check, Verdict, worst
from nanogpt.config.errors import ConfigError
from nanogpt.storage.provenance import provenance

RIGHT = golden("fp32")
CURVES = tuple(
    Curve(dtype="fp32", kind="cpu", engine="single", rank=rank, losses=RIGHT.losses, grad_norms=RIGHT.grad_norms)
    for rank in range(3)
)
BLANK = Acceptance(
    begun_at="2026-11-30 12:00:00", minutes=5.0, stages=tuple(STAGES), hosts=("node1", "node2", "node3"),
    devices=("a <CPU>",) * 3, seconds={"numerics": 1.5}, checks={}, files={}, golden_sha256=golden_sha256(),
    code=provenance(), curves=CURVES, is_finished=True,
)  # fmt: skip


def wrong(rank):
    """The same with a rank whose norms are half of what they should be."""
    curves = [replace(c, grad_norms=tuple(n / 2 for n in c.grad_norms)) if c.rank == rank else c for c in CURVES]
    return replace(BLANK, curves=tuple(curves))


def test_nothing_that_was_not_made_passes():
    """Invariant: stages without figures are UNKNOWN, and with one of them the whole is no PASS."""
    found = BLANK.judged()
    verdicts = {stage: worst(found.checks[stage]) for stage in STAGES}
    assert verdicts.pop("numerics") is Verdict.PASS
    assert set(verdicts.values()) == {Verdict.UNKNOWN}
    assert found.verdict is Verdict.UNKNOWN
    assert headline(found) == "UNKNOWN: nothing failed, 5 of 6 checks unknown"


def test_who_fails_is_named_and_excluded():
    """Invariant: rank 1's curve is wrong: the headline names its node and --exclude= nothing else."""
    found = wrong(1).judged()
    assert found.verdict is Verdict.FAIL
    assert headline(found) == "FAIL: node2 (rank 1); fp32, each rank alone"
    assert exclude(found) == "--exclude=node2"
    alone = replace(found, hosts=("node2",) * len(found.hosts), inject="flip:rank=1,step=5").judged()
    assert headline(alone).startswith("FAIL (broken on purpose: flip:rank=1,step=5): node2 (rank 1); ")
    assert exclude(alone) == "", "no other node is left"


def test_lost_ranks_fail():
    """Invariant: ranks that do not answer any more are to blame, and what was not made says why."""
    found = replace(BLANK, lost=(2,), curves=()).judged()
    assert (found.verdict, found.blamed) == (Verdict.FAIL, ("node3",))
    assert found.checks["numerics"][0].found == "ranks were lost before it"


def test_a_part_that_hangs_or_breaks_fails():
    """Invariant: what broke is FAIL with the ranks that broke first, what there was no time for UNKNOWN."""
    failures = (
        Failure(stage="network", part="links", said="rank 2: status 1: NCCL error", ranks=(2,)),
        Failure(stage="training", part="training", said="", out_of_time=True),
    )
    found = replace(BLANK, failures=failures).judged()
    assert found.checks["network"][0].verdict is Verdict.FAIL
    assert found.blamed == ("node3",)
    assert (found.checks["training"][0].verdict, found.checks["training"][0].found) == (
        Verdict.UNKNOWN, "the time was over",
    )  # fmt: skip


def test_it_reads_what_it_writes(tmp_path):
    """Reference: the acceptance itself, through acceptance.json and back."""
    found = write(wrong(2), tmp_path)
    assert Acceptance.read(tmp_path / "acceptance.json", of="it") == found
    assert list(differences(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report.update(verdict="PASS"), "the verdict is PASS, the checks say FAIL"),
        (lambda report: report["checks"].update(numerics=[]), "the checks of numerics do not follow from its figures"),
        (lambda report: report["curves"][0]["losses"].__setitem__(3, 1.0), "the checks of numerics do not follow"),
        (lambda report: report.update(is_finished=False), "the acceptance was not finished"),
        (lambda report: report.update(files={"faults/x/report.json": "00"}), "faults/x/report.json is missing"),
        (lambda report: report["curves"][0]["losses"].clear(), "the checks of numerics do not follow"),
        (lambda report: report.update(hosts=["n1", "n2", "n4"]), "acceptance.html does not show acceptance.json"),
    ],
)
def test_what_was_changed_is_found(change, said, tmp_path):
    """Invariant: whoever changes a verdict, a check, a figure, a name or a hash is told of."""
    write(wrong(2), tmp_path)
    report = json.loads((tmp_path / "acceptance.json").read_text())
    change(report)
    (tmp_path / "acceptance.json").write_text(json.dumps(report))
    assert any(said in line for line in differences(tmp_path)), list(differences(tmp_path))


def test_a_page_that_was_changed_is_found(tmp_path):
    """Invariant: the page is what the figures give, or it is named."""
    write(wrong(2), tmp_path)
    page = tmp_path / "acceptance.html"
    page.write_text(page.read_text().replace("FAIL", "PASS"))
    assert list(differences(tmp_path)) == ["acceptance.html does not show acceptance.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report["versions"].update({"nanogpt-overfit": "0.1"}), "is of nanogpt-overfit 0.1"),
        (lambda report: report.update(golden_sha256="00"), "which may judge otherwise"),
        (lambda report: report["curves"][0].update(dtype="fp64"), "figures of which nothing can be made"),
        (lambda report: report.update(hosts=["node1"]), "figures of which nothing can be made"),
        (lambda report: report.pop("hosts"), "it has no hosts"),
    ],
)
def test_what_cannot_be_judged_is_one_line(change, said, tmp_path):
    """Invariant: another version's report, and one that is damaged, is a ConfigError that says so."""
    write(wrong(2), tmp_path)
    report = json.loads((tmp_path / "acceptance.json").read_text())
    change(report)
    (tmp_path / "acceptance.json").write_text(json.dumps(report))
    with pytest.raises(ConfigError, match=said):
        list(differences(tmp_path))


def test_the_page_draws_what_tells():
    """Invariant: of ranks alone the curve that leaves its band is drawn, all together are, and one rank's is."""
    together = replace(CURVES[0], rank=None, engine="ddp")
    shown = [curve.name for curve in page_of(replace(wrong(1), curves=(together, *wrong(1).curves)).judged()).curves]
    assert shown == ["fp32, ddp", "fp32, rank 1 alone"]
    lonely = replace(BLANK, hosts=("node1",), devices=("a",), curves=CURVES[:1]).judged()
    assert [curve.name for curve in page_of(lonely).curves] == ["fp32, rank 0 alone"]


def test_the_worst_verdict():
    """Invariant: FAIL before UNKNOWN before PASS; of nothing UNKNOWN."""
    passed, failed = (Check.of(blamed, name="x", found="", expected="") for blamed in (False, [0]))
    unknown = Check.unknown("x", "no time")
    assert worst([passed, unknown, failed]) is Verdict.FAIL
    assert worst([passed, unknown]) is Verdict.UNKNOWN
    assert worst([passed]) is Verdict.PASS
    assert worst([]) is Verdict.UNKNOWN


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen: install OpenSSH's client")
def test_a_signature_is_of_these_bytes(tmp_path):
    """Invariant: ssh-keygen finds the signature good, and bad once a byte has changed."""
    key, file = tmp_path / "key", tmp_path / "acceptance.json"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, stdin=subprocess.DEVNULL)
    file.write_text("{}")
    sign(file, find_key(str(key)))
    signature = tmp_path / "acceptance.json.sig"
    is_good, said = checked_signature(file, signature)
    assert is_good
    assert "Good" in said
    assert "SHA256:" in said
    file.write_text("{ }")
    assert not checked_signature(file, signature)[0]


def test_a_key_that_is_none_is_refused(tmp_path):
    """Invariant: one line, before anything is measured."""
    with pytest.raises(ConfigError, match="no such file"):
        find_key(str(tmp_path / "key"))
    (tmp_path / "key").write_text("not a key")
    with pytest.raises(ConfigError, match="is no private key without a passphrase"):
        find_key(str(tmp_path / "key"))
