"""What a machine's network must reach: the file of `nanogpt accept --expect=FILE`, and the one in the package.

    expected = read_expected("our_cluster.json")        # None: the package's, assets/expected_network.json
    machine = expected.fitting(devices=("NVIDIA H100 80GB HBM3",) * 8, hosts=("node1",) * 8)

{"machines": [{"name": "ours", "device": "NVIDIA H100 80GB HBM3", "ranks_per_node": 8, "nodes": null,
               "within_gbps": 400, "across_gbps": 40, "all_gbps": null, "source": "accepted on 2026-01-15"}]}
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import as_file, files
from math import isfinite
from pathlib import Path
from typing import Any

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import user_path
from nanogpt.storage.json_file import JsonFile, SchemaError, find_known, from_json, key, keys_of

ASSET = "expected_network.json"


@dataclass(frozen=True, kw_only=True)
class ExpectedMachine:
    """The least that is accepted of one kind of machine: bus bandwidth of a large all_reduce."""

    name: str = key("of the machine, for people")
    device: str = key("what the device calls itself; * stands for anything")
    ranks_per_node: int | None = key("on every node; null: any number")
    nodes: int | None = key("of the job; null: any number", default=None)
    within_gbps: float | None = key("GB/s at least within a node; null: no expectation", default=None)
    across_gbps: float | None = key("GB/s at least among the first ranks of the nodes", default=None)
    all_gbps: float | None = key("GB/s at least among all ranks, where nodes have several", default=None)
    source: str = key("where the figures are from")

    def at_least_gbps(self, group: str) -> float | None:
        """Of within, across or all."""
        return {"within": self.within_gbps, "across": self.across_gbps, "all": self.all_gbps}[group]

    def fits(self, devices: Sequence[str], hosts: Sequence[str]) -> bool:
        """Whether these are such machines; devices, hosts: of each rank."""
        per_node = Counter(hosts)
        return (
            all(fnmatchcase(device, self.device) for device in set(devices))
            and self.ranks_per_node in (None, *(set(per_node.values()) if len(set(per_node.values())) == 1 else ()))
            and self.nodes in (None, len(per_node))
        )


@dataclass(frozen=True, kw_only=True)
class ExpectedNetwork(JsonFile):
    """What is expected of networks."""

    machines: tuple[ExpectedMachine, ...] = key("of which the first that fits counts")

    def fitting(self, *, devices: Sequence[str], hosts: Sequence[str]) -> ExpectedMachine | None:
        """The machine that these devices on these hosts are, by rank; None where none is known."""
        return next((machine for machine in self.machines if machine.fits(devices, hosts)), None)


def read_expected(path: str | None) -> ExpectedNetwork:
    """What path holds; of None what the package knows. Raises ConfigError with one line."""
    if path is not None:
        return _read(user_path(path, f"--expect={path}"), f"--expect={path}")
    with as_file(files("nanogpt") / "assets" / ASSET) as asset:
        return _read(asset, ASSET)


def _read(path: Path, what: str) -> ExpectedNetwork:
    if (content := find_known(path)) is None:
        raise ConfigError(f"{what}: no such file")
    try:
        expected = from_json(ExpectedNetwork, content)
        for index, (machine, given) in enumerate(zip(expected.machines, content["machines"], strict=True)):
            _check(machine, given, f"machines[{index}]")
    except SchemaError as error:
        raise ConfigError(f"{what}: {error}") from None
    return expected


def _check(machine: ExpectedMachine, given: dict[str, Any], place: str) -> None:
    """Raise SchemaError for what would be overlooked, or compared with nothing."""
    if unknown := sorted(given.keys() - keys_of(ExpectedMachine)):
        raise SchemaError(f"{place} has an unknown key {unknown[0]}; known are {', '.join(keys_of(ExpectedMachine))}")
    figures = {name: getattr(machine, name) for name in ("within_gbps", "across_gbps", "all_gbps")}
    figures = {name: value for name, value in figures.items() if value is not None}
    if not figures:
        raise SchemaError(f"{place} expects nothing: give within_gbps, across_gbps or all_gbps")
    for name, value in figures.items():
        if not (isfinite(value) and value > 0):
            raise SchemaError(f"{place}.{name} is {value:g}, not above 0")
