"""The house keeps its floors: a module imports only from floors below its own."""

import ast
from pathlib import Path

import pytest

from conftest import REPOSITORY

FLOORS = [
    {"nanogpt." + name for name in floor.split()}
    for floor in (
        "errors",
        "files stop_signals",
        "config digest eager fence lost_terminal model rendezvous strict_json tensor_file tokenizer",
        "world",
        """
        checkpoint cli corpus data ds_config eta flops health hf loggers metrics muon records repeat run_dir stopping
        watchdog
        """,
        "memory preflight replicas",
        "optim",
        "curves decode engine plan profile progress resume terminal wandb_logger",
        "forecast gauge plot recall recite report saver",
        "feasibility heatmap messages score_table scorecard",
        "certificate judge recall_layout recall_page",
        "live_plot recall_plot",
        "trainer",
        "session",
        "__main__",
    )
]
FLOORS[-1].add("train_overfit")
SOURCES = [REPOSITORY / "train_overfit.py", *sorted((REPOSITORY / "nanogpt").rglob("*.py"))]


def floor(module):
    """The floor of a module; the modules of a package stand on the package's floor."""
    return next((i for i, floor in enumerate(FLOORS) for m in floor if module == m or module.startswith(m + ".")), None)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_come_from_below(path):
    """Invariant: floor(imported) < floor(importer), except within one package."""
    name = module_name(path)
    if name == "nanogpt":
        assert not path.read_text().strip()
        return
    assert floor(name) is not None, f"{name} stands on no floor"
    for node in ast.walk(ast.parse(path.read_text())):
        assert getattr(node, "level", 0) == 0, "a relative import hides its floor"
        imported = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
        for other in filter(lambda m: m and m.startswith("nanogpt"), imported):
            same_package = name.startswith("nanogpt.engine") and other.startswith("nanogpt.engine")
            assert same_package or floor(other) < floor(name), f"{name} imports {other} from its own floor or above"


def test_the_model_knows_torch_only():
    """Invariant: model.py imports nothing but torch and the standard library."""
    tree = ast.parse((REPOSITORY / "nanogpt" / "model.py").read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert imported == {"torch", "math", "dataclasses", "collections", "contextlib", "typing"}
