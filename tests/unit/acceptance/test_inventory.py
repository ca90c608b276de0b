"""The inventory names the ranks that are unlike the others, and the GPUs that say fault."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from harness.runs import ALONE
from nanogpt.acceptance.stages import gpu as gpu_module
from nanogpt.acceptance.stages import inventory
from nanogpt.acceptance.stages.gpu import Gpu, read_gpu
from nanogpt.acceptance.stages.inventory import RankInventory, judge_inventory, take_inventory
from nanogpt.acceptance.verdict import Verdict
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import from_json, parse_json, to_json

GPU = Gpu(
    uuid="GPU-1", driver="570.86.15", sm_clock_mhz=1755, max_sm_clock_mhz=1980, power_cap_w=700.0,
    default_power_cap_w=700.0, temperature_c=60, throttle_reasons=("software power cap",), ecc_uncorrected=0,
    remapped_rows=0, remap_pending=False, remap_failed=False, pcie_generation=5, max_pcie_generation=5, pcie_width=16,
    max_pcie_width=16, nvlinks_active=18, nvlinks=18,
)  # fmt: skip
RANK = RankInventory(
    host="node1", device="H100", kind="cuda", lacks_gpu=False, cores=16, numa_nodes=(0,), memory_nodes=(0, 1),
    locked_memory_bytes=None, kernel="6.8.0", torch="2.9.0", cuda="12.8", cudnn="91002", nccl="2.27.5",
    driver="570.86.15", gpu=GPU, no_gpu_why=None,
)  # fmt: skip
WELL = (RANK, RANK, replace(RANK, host="node2"), replace(RANK, host="node2"))


def judged(ranks, before=None):
    """Each check by its name."""
    return {check.name: check for check in judge_inventory(before or ranks, ranks)}


def with_last(**changes):
    """Four ranks of which the last is changed; in its GPU where that has such a field."""
    of_gpu = {name: value for name, value in changes.items() if hasattr(GPU, name) and name != "driver"}
    others = {name: value for name, value in changes.items() if name not in of_gpu}
    return (*WELL[:3], replace(WELL[3], **others, gpu=replace(GPU, **of_gpu)))


def test_a_healthy_cluster_passes():
    """Invariant: ranks that are alike, at work, with nothing to say of themselves, pass every check."""
    assert {check.verdict for check in judge_inventory(WELL, WELL)} == {Verdict.PASS}


@pytest.mark.parametrize(
    ("changes", "name", "found"),
    [
        ({"device": "A100"}, "device", "H100 on ranks 0, 1, 2; A100 on rank 3"),
        ({"lacks_gpu": True, "device": "cpu"}, "device", "cpu on rank 3"),
        ({"driver": "550.54"}, "software", "driver 570.86.15 on ranks 0, 1, 2; driver 550.54 on rank 3"),
        ({"nccl": None}, "software", "nccl 2.27.5 on ranks 0, 1, 2; nccl none on rank 3"),
        ({"cores": 1}, "cores", "1 core of 1 NUMA node on rank 3"),
        ({"locked_memory_bytes": 2**23}, "locked memory", "8,192 KiB on rank 3"),
        ({"ecc_uncorrected": 2}, "GPU memory errors", "2 uncorrected, 2 of them during the acceptance on rank 3"),
        ({"remap_pending": True}, "GPU memory rows", "0 remapped, one pending on rank 3"),
        ({"remap_failed": True, "remapped_rows": 8}, "GPU memory rows", "8 remapped, one failed on rank 3"),
        ({"pcie_width": 8}, "PCIe width", "x8 of x16 on rank 3"),
        ({"pcie_generation": 3}, "PCIe generation", "3 of 5 on rank 3"),
        ({"nvlinks_active": 17}, "NVLinks", "17 of 18 active on rank 3"),
        ({"power_cap_w": 500.0}, "GPU power cap", "500 W of 700 W on rank 3"),
        ({"power_cap_w": 650.0, "default_power_cap_w": 650.0}, "GPU power cap", "650 W of 650 W on rank 3"),
        ({"throttle_reasons": ("hardware slowdown", "idle")}, "GPU throttling", "hardware slowdown on rank 3"),
    ],
)
def test_each_fault_is_named(changes, name, found):
    """Invariant: one check fails, it names the rank, and says what was found; all others pass or are unknown."""
    checks = judged(with_last(**changes), before=WELL)
    failed = [check for check in checks.values() if check.verdict is Verdict.FAIL]
    assert [(check.name, check.ranks) for check in failed] == [(name, (3,))]
    assert found in failed[0].found


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"ecc_uncorrected": None}, "GPU memory errors"),
        ({"remap_failed": None}, "GPU memory rows"),
        ({"pcie_width": None}, "PCIe width"),
        ({"throttle_reasons": ("idle",)}, "PCIe generation"),
        ({"nvlinks": None, "nvlinks_active": None}, "NVLinks"),
        ({"power_cap_w": None}, "GPU power cap"),
        ({"throttle_reasons": None}, "GPU throttling"),
    ],
)
def test_what_was_not_measured_does_not_pass(changes, name):
    """Invariant: a figure that one GPU does not give makes its check unknown, and is named."""
    check = judged(with_last(**changes))[name]
    assert check.verdict is Verdict.UNKNOWN
    assert "not given by NVML on rank 3" in check.found


def test_a_tie_blames_nobody():
    """Invariant: with as many ranks of each kind, the check fails, names both values and no rank as the culprit."""
    ranks = [replace(rank, kernel="6.9.0") if i > 1 else rank for i, rank in enumerate(WELL)]
    check = judged(ranks)["software"]
    assert (check.verdict, check.ranks) == (Verdict.FAIL, ())
    assert check.found == "kernel 6.8.0 on ranks 0, 1; kernel 6.9.0 on ranks 2, 3"


def test_one_rank_has_no_like():
    """Invariant: what is only compared is unknown with one rank; what its GPU says is judged."""
    checks = judged([RANK])
    assert {n for n, check in checks.items() if check.verdict is Verdict.UNKNOWN} == {
        "device", "software", "cores", "locked memory",
    }  # fmt: skip
    assert "one rank: no other to compare with" in checks["device"].found


def test_links_that_all_lack_are_not_judged():
    """Invariant: links inactive on every GPU alike may be the board's design; more of them on one are a fault."""
    ranks = [replace(rank, gpu=replace(GPU, nvlinks_active=12)) for rank in WELL]
    assert judged(ranks)["NVLinks"].verdict is Verdict.UNKNOWN
    ranks[1] = replace(ranks[1], gpu=replace(GPU, nvlinks_active=0))
    assert judged(ranks)["NVLinks"].ranks == (1,)


def test_locked_memory_matters_between_nodes_with_gpus():
    """Invariant: a low limit, the same everywhere, fails only where GPUs of several nodes exchange data."""
    low = [replace(rank, locked_memory_bytes=2**16) for rank in WELL]
    assert judged(low)["locked memory"].ranks == (0, 1, 2, 3)
    assert judged([replace(rank, host="node1") for rank in low])["locked memory"].verdict is Verdict.PASS
    assert judged([replace(rank, kind="cpu") for rank in low])["locked memory"].verdict is Verdict.PASS


def test_without_nvml_there_is_one_reason():
    """Invariant: where no rank heard NVML, one unknown check says why, by rank where they differ."""
    ranks = [replace(rank, gpu=None, no_gpu_why="nvidia-ml-py is not installed") for rank in WELL]
    check = judged(ranks)["GPU health"]
    assert (check.verdict, check.found) == (Verdict.UNKNOWN, "nvidia-ml-py is not installed")
    assert len(judged(ranks)) == 5


def test_a_throttled_gpu_is_found_when_it_has_recovered():
    """Invariant: a reason that was given before counts as one that is given after."""
    hot = with_last(throttle_reasons=("hardware thermal slowdown",))
    assert judged(WELL, before=hot)["GPU throttling"].ranks == (3,)


def test_this_machine_is_seen(tmp_path, monkeypatch):
    """Reference: lists as the kernel writes them; and what is taken is read back from JSON unchanged."""
    for node, cores in enumerate(("0-1,4", "8-9", "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(f"{cores}\n")
    (tmp_path / "status").write_text("Name:\tx\nMems_allowed_list:\t0-1,3\n")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    )
    monkeypatch.setattr(inventory, "NODES", tmp_path)
    monkeypatch.setattr(inventory, "PROCESS_STATUS", tmp_path / "status")
    monkeypatch.setattr(inventory, "DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(inventory, "_cores", lambda: {1, 2, 8})
    (mine,) = take_inventory(ALONE)
    assert (mine.cores, mine.numa_nodes, mine.memory_nodes) == (3, (0, 1), (0, 1, 3))
    assert (mine.driver, mine.gpu, mine.no_gpu_why) == ("570.86.15", None, "no GPU here")
    for rank in (mine, RANK):
        assert from_json(RankInventory, parse_json(json.dumps(to_json(rank)))) == rank


def test_nothing_is_known_where_nobody_says(tmp_path, monkeypatch):
    """Invariant: without /proc and /sys the figures are None, and nothing is raised."""
    for name in ("NODES", "PROCESS_STATUS", "DRIVER_VERSION"):
        monkeypatch.setattr(inventory, name, tmp_path / "none")
    (mine,) = take_inventory(ALONE)
    assert (mine.numa_nodes, mine.memory_nodes, mine.driver) == (None, None, None)


class StandIn:
    """Stands in for nvidia-ml-py, because there is no GPU here: it shows which answers are read, not that they are
    NVIDIA's. It refuses ECC counts, lacks the newer functions, and has two links, one of which is up."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVML_VOLATILE_ECC, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1, 0, 0, 1
    NVML_NVLINK_MAX_LINKS = 4

    def __init__(self, *known, works=True):
        """known: the names by which it knows the device."""
        self.answers = {("nvmlDeviceGetHandleByUUID", name): "handle" for name in known if "-" in name}
        self.answers |= {("nvmlDeviceGetHandleByPciBusId", name): "handle" for name in known if "-" not in name}
        self.answers |= {("nvmlInit",): None} if works else {}
        self.answers |= {
            ("nvmlSystemGetDriverVersion",): "570.86.15",
            ("nvmlDeviceGetCurrentClocksThrottleReasons", "handle"): 0x4 | 0x40 | 0x800,
            ("nvmlDeviceGetRemappedRows", "handle"): (5, 2, 1, 0),
            ("nvmlDeviceGetPowerManagementLimit", "handle"): 350000,
            ("nvmlDeviceGetNvLinkState", "handle", 0): 1,
            ("nvmlDeviceGetNvLinkState", "handle", 1): 0,
        }

    def __getattr__(self, name):
        if name == "nvmlDeviceGetCurrentClocksEventReasons":
            raise AttributeError(name)
        return lambda *words: self.answers[(name, *words)]


@pytest.mark.parametrize("name", ["GPU-12ab", "MIG-12ab", "00000000:3b:00.0"])
def test_nvml_is_asked_by_name(name, monkeypatch):
    """Invariant: the device is found by its UUID, a part's or its bus, and what NVML refuses is None."""
    device = SimpleNamespace(uuid="12ab", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setitem(sys.modules, "pynvml", StandIn(name))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(gpu_module, "_keep_busy", lambda _: None)
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cuda", 0))
    gpu, why = read_gpu(world)
    nothing = dict.fromkeys(gpu.__dataclass_fields__)
    assert why is None
    assert gpu == Gpu(**nothing | {
        "driver": "570.86.15", "throttle_reasons": ("software power cap", "hardware thermal slowdown", "0x800"),
        "remapped_rows": 2, "remap_pending": True, "remap_failed": False, "power_cap_w": 350.0, "nvlinks": 2,
        "nvlinks_active": 1,
    })  # fmt: skip


def test_why_nvml_says_nothing_is_kept(monkeypatch):
    """Invariant: no library, a library without a driver, and an unknown device are reasons, not exceptions."""
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12ab"))
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as where it is not installed
    assert read_gpu(world) == (None, "nvidia-ml-py is not installed")
    monkeypatch.setitem(sys.modules, "pynvml", StandIn())
    assert read_gpu(world) == (None, "NVML does not know this rank's GPU")
    monkeypatch.setitem(sys.modules, "pynvml", StandIn(works=False))
    assert read_gpu(world) == (None, "NVML said: ('nvmlInit',)")
