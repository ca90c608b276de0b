"""Faults as a command line writes them."""

import pytest

from nanogpt.config.errors import ConfigError
from nanogpt.config.fault import ALLOWED, KINDS, Fault, check_fault
from nanogpt.config.train_config import TrainConfig


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_read(kind):
    """Reference: by hand, in either order."""
    assert Fault.parse(f"{kind}:rank=1,step=12") == Fault.parse(f"{kind}:step=12,rank=1") == Fault(kind, 1, 12)


@pytest.mark.parametrize(
    "words",
    [
        "kill", "kill:rank=1", "burn:rank=1,step=1", "kill:rank=1,step=0", "kill:rank=-1,step=1", "kill:rank=1,step=1,",
        "kill:rank=1,step=1.5", "kill:rank=1,step=1,step=2", "kill:rank,step", "kill:rank=1;step=1",
    ],
)  # fmt: skip
def test_what_is_none_is_refused(words):
    """Invariant: one line, with what is right."""
    with pytest.raises(ConfigError, match=r"must be KIND:rank=R,step=S with a step from 1 on, KIND one of kill,"):
        TrainConfig(inject=words)


def test_nobody_has_one_by_mistake(monkeypatch):
    """Invariant: the environment must allow it, and a rank must be there."""
    monkeypatch.delenv(ALLOWED, raising=False)
    with pytest.raises(ConfigError, match=f"set {ALLOWED}=1 if that is what you want"):
        check_fault(Fault.parse("kill:rank=0,step=1"), ranks=2)
    monkeypatch.setenv(ALLOWED, "1")
    check_fault(Fault.parse("kill:rank=1,step=1"), ranks=2)
    with pytest.raises(ConfigError, match="the last rank here is 1"):
        check_fault(Fault.parse("kill:rank=2,step=1"), ranks=2)
