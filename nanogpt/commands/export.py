"""The model of a finished run for other software.

python -m nanogpt export out exported
"""

from dataclasses import MISSING, dataclass
from typing import Literal

from safetensors import SafetensorError

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import user_path
from nanogpt.config.options import Options, option
from nanogpt.storage.hf import write_hf
from nanogpt.storage.run_dir import load_run


@dataclass(frozen=True)
class ExportOptions(Options):
    """What `export` is asked."""

    run_dir: str = option(MISSING, "directory of a finished run")
    out: str = option(MISSING, "directory to write, which must not hold files yet")
    format: Literal["hf"] = option("hf", "hf: what transformers' Auto classes load, weights and tokenizer")


def export(options: ExportOptions) -> int:
    """Write the model of a finished run for other software; train_overfit.py --init_from=OUT goes on from it."""
    run, out = load_run(options.run_dir), user_path(options.out, options.out)
    try:
        write_hf(run.model, out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{out} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    print(f"{out}: for transformers.AutoModelForCausalLM and AutoTokenizer, and for --init_from")
    return 0
