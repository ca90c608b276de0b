"""The losses of runs in one picture; or how a run came to know its text, token by token.

python -m nanogpt plot runs/a runs/b --out=loss.png
python -m nanogpt plot --memory runs/a
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from pathlib import Path

from nanogpt.config.errors import ConfigError, one_line
from nanogpt.config.files import user_path
from nanogpt.config.options import Options, option
from nanogpt.data.dataset import memorised_dataset
from nanogpt.data.tokenizer import encoding
from nanogpt.plots.loss_plot import FORMATS, draw, save
from nanogpt.plots.run_history import read_curve
from nanogpt.storage.run_dir import MEMORY_PNG, read_config, run_directory
from nanogpt.token_losses.draw import MEMORY_HTML, draw_page, draw_picture
from nanogpt.token_losses.history import MEMORY_NPZ, TokenHistory


@dataclass(frozen=True)
class PlotOptions(Options):
    """What `plot` is asked."""

    run_dir: tuple[str, ...] = option(MISSING, "directories of runs, which may be running still")
    out: str = option("loss.png", "the picture, a .png, .svg or .pdf")
    memory: str | None = option(
        None, "directory of a run, whose memory.html and memory.png to write again, in place of losses"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.run_dir) == bool(self.memory):
            raise ConfigError("give either RUN_DIR, one or more, or --memory=RUN_DIR")


def plot(options: PlotOptions) -> int:
    """Draw the loss of one run or several against steps and time, and name the options that differ."""
    if options.memory is not None:
        return _plot_memory(options.memory)
    out = user_path(options.out, f"--out={options.out}")
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out={options.out} must end in one of {', '.join(FORMATS)}")
    curves = [read_curve(run_dir) for run_dir in options.run_dir]
    for curve in curves:
        if not curve.steps:
            raise ConfigError(f"{curve.name} has logged no step yet")
    with _drawing(f"--out={options.out}"):
        save(draw(curves), out)
    print(f"{options.out} shows {len(curves)} runs" if len(curves) > 1 else f"{options.out} shows {curves[0].name}")
    return 0


def _plot_memory(run_dir: str) -> int:
    """Write memory.html and memory.png of a run again. Raises ConfigError."""
    path = run_directory(run_dir)
    TokenHistory.load(path / MEMORY_NPZ)  # which says why it cannot be
    info, config = read_config(path)
    dataset = memorised_dataset(config, info.corpus_sha256 or "", info.text_files or {})
    with _drawing(str(path / MEMORY_HTML)):
        draw_page(path, encoding().decode_tokens_bytes(dataset.windows.ids.tolist()), goes_on=False)
    with _drawing(str(path / MEMORY_PNG)):
        draw_picture(path)
    print(f"{Path(run_dir) / MEMORY_HTML} and {MEMORY_PNG} show {run_dir}")
    return 0


@contextmanager
def _drawing(what: str) -> Iterator[None]:
    """Let whatever fails inside be one line about what is drawn."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"no picture without matplotlib ({error}): pip install matplotlib") from None
    except OSError as error:
        raise ConfigError(f"{what} cannot be written: {error.strerror or error}") from None
    except ConfigError:
        raise
    except Exception as error:  # of matplotlib's: they have no common base
        raise ConfigError(f"{what} cannot be drawn: {one_line(error)}") from None
