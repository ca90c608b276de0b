"""What a rank's GPU says of itself through NVML, while it has work.

    gpu, why = read_gpu(world)          # gpu is None where nobody says, and why says why
    gpu.temperature_c, gpu.throttle_reasons

NVML is asked through nvidia-ml-py, where that is installed (`pip install nanogpt-overfit[nvml]`).
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from nanogpt.config.errors import one_line
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import key

BUSY_S = 1.0  # that a GPU has work while it is asked: idle, it lowers its clocks and its link's generation
# Bits of nvmlDeviceGetCurrentClocksEventReasons (NVML API Reference, "NvmlClocksEventReasons").
THROTTLE_REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "software power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown", 0x80: "hardware power brake",
    0x100: "display clocks",
}  # fmt: skip
# A GPU at its power cap is a GPU at work; one that is too hot or has too little power has a fault around it.
FAULTY_REASONS = {THROTTLE_REASONS[bit] for bit in (0x8, 0x20, 0x40, 0x80)}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What NVML says of a GPU that has work; null where it does not say."""

    uuid: str | None = key("NVML's name of the device")
    driver: str | None = key("version of the driver")
    sm_clock_mhz: int | None = key("clock of the multiprocessors, MHz")
    max_sm_clock_mhz: int | None = key("the highest that it can be, MHz")
    power_cap_w: float | None = key("power limit, W")
    default_power_cap_w: float | None = key("power limit that the device comes with, W")
    temperature_c: int | None = key("temperature of the chip, degrees Celsius")
    throttle_reasons: tuple[str, ...] | None = key("what holds the clocks down; none: nothing")
    ecc_uncorrected: int | None = key("uncorrectable memory errors since the driver was loaded")
    remapped_rows: int | None = key("memory rows replaced because of uncorrectable errors, over the device's life")
    remap_pending: bool | None = key("whether a row is to be replaced at the next reset")
    remap_failed: bool | None = key("whether a row could not be replaced")
    pcie_generation: int | None = key("of the PCIe link")
    max_pcie_generation: int | None = key("the highest that device and slot allow")
    pcie_width: int | None = key("lanes of the PCIe link")
    max_pcie_width: int | None = key("the most that device and slot allow")
    nvlinks_active: int | None = key("NVLinks that are up")
    nvlinks: int | None = key("NVLinks that the chip has; null: none, or NVML does not say")


def read_gpu(world: World) -> tuple[Gpu | None, str | None]:
    """(what NVML says of this rank's GPU, or None; why it is None). Takes BUSY_S or so where there is a GPU."""
    if world.device.type != "cuda":
        return None, "no GPU here"
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        if (handle := _handle(nvml, torch.cuda.get_device_properties(world.device))) is None:
            return None, "NVML does not know this rank's GPU"
        _keep_busy(world)
        return _told(nvml, handle), None
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    except Exception as error:  # NVMLError, and whatever a library of another version raises
        return None, f"NVML said: {one_line(error)}"


def _keep_busy(world: World) -> None:
    """Give the GPU work for BUSY_S, and return when half of it is done."""
    with suppress(RuntimeError):  # no memory: it will say that it is idle
        matrix = torch.ones(4096, 4096, device=world.device)
        product = matrix @ matrix
        for _ in range(min(1000, int(BUSY_S / world.seconds_of(lambda: matrix @ matrix)))):
            torch.mm(matrix, matrix, out=product)
        time.sleep(BUSY_S / 2)


def _asked(nvml: Any, names: str, *words: Any) -> Any:
    """What the first of these functions answers that library and driver have; None where none does."""
    for name in names.split():
        with suppress(Exception):  # what is not supported is not known
            return getattr(nvml, name)(*words)
    return None


def _handle(nvml: Any, device: Any) -> Any:
    """NVML's of what CUDA calls device, None where it has none. By name: the two number devices differently."""
    uuid = str(getattr(device, "uuid", "")).removeprefix("GPU-")
    for name in (f"GPU-{uuid}", f"MIG-{uuid}"):
        if uuid and (handle := _asked(nvml, "nvmlDeviceGetHandleByUUID", name)) is not None:
            return handle
    if not hasattr(device, "pci_bus_id"):
        return None
    bus = f"{device.pci_domain_id:08x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
    return _asked(nvml, "nvmlDeviceGetHandleByPciBusId", bus)


def _told(nvml: Any, handle: Any) -> Gpu:
    """All that NVML says of handle."""

    def ask(names: str, *words: Any) -> Any:
        return _asked(nvml, names, handle, *words)

    def watts(name: str) -> float | None:
        milliwatts = ask(name)
        return None if milliwatts is None else milliwatts / 1000

    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons nvmlDeviceGetCurrentClocksThrottleReasons")
    _, rows, pending, failed = ask("nvmlDeviceGetRemappedRows") or (None, None, None, None)
    answers = [ask("nvmlDeviceGetNvLinkState", link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)]
    links = [bool(answer) for answer in answers if answer is not None]
    return Gpu(
        uuid=ask("nvmlDeviceGetUUID"),
        driver=_asked(nvml, "nvmlSystemGetDriverVersion"),
        sm_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        max_sm_clock_mhz=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        power_cap_w=watts("nvmlDeviceGetPowerManagementLimit"),
        default_power_cap_w=watts("nvmlDeviceGetPowerManagementDefaultLimit"),
        temperature_c=ask("nvmlDeviceGetTemperatureV nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        throttle_reasons=None if reasons is None else _reasons(reasons),
        ecc_uncorrected=ask(
            "nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        remapped_rows=rows,
        remap_pending=None if pending is None else bool(pending),
        remap_failed=None if failed is None else bool(failed),
        pcie_generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        max_pcie_generation=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
        max_pcie_width=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        nvlinks_active=sum(links) if links else None,
        nvlinks=len(links) or None,
    )


def _reasons(bits: int) -> tuple[str, ...]:
    """Their names, a new one's bit."""
    return tuple(THROTTLE_REASONS.get(1 << i, f"{1 << i:#x}") for i in range(bits.bit_length()) if bits >> i & 1)
