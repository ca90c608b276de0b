"""Make a GPT memorise a text until it has provably memorised it.

    from nanogpt import TrainConfig, load_run, train, verify

    result = train(TrainConfig(out_dir="out", max_minutes=30))
    result.report.loss, load_run("out").model
    [check for check in verify("out") if not check.fits]

Names are imported when they are first used: asking for TrainConfig imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt.config.errors import ConfigError, RunError
    from nanogpt.config.train_config import TrainConfig
    from nanogpt.evaluate.verify import verify
    from nanogpt.model.gpt import GPT, GPTConfig
    from nanogpt.storage.run_dir import load_run
    from nanogpt.training.run import train

__all__ = ["GPT", "ConfigError", "GPTConfig", "RunError", "TrainConfig", "__version__", "load_run", "train", "verify"]
_MODULES = {
    "ConfigError": "nanogpt.config.errors",
    "GPT": "nanogpt.model.gpt",
    "GPTConfig": "nanogpt.model.gpt",
    "RunError": "nanogpt.config.errors",
    "TrainConfig": "nanogpt.config.train_config",
    "load_run": "nanogpt.storage.run_dir",
    "train": "nanogpt.training.run",
    "verify": "nanogpt.evaluate.verify",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("nanogpt-overfit")
    if name not in _MODULES:
        raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
