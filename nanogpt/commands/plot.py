"""The losses of runs in one picture.

python -m nanogpt plot runs/a runs/b --out=loss.png
"""

from dataclasses import MISSING, dataclass

from nanogpt.config.errors import ConfigError, one_line
from nanogpt.config.files import user_path
from nanogpt.config.options import Options, option
from nanogpt.plots.loss_plot import FORMATS, draw, save
from nanogpt.plots.run_history import read_curve


@dataclass(frozen=True)
class PlotOptions(Options):
    """What `plot` is asked."""

    run_dir: tuple[str, ...] = option(MISSING, "directories of runs, which may be running still")
    out: str = option("loss.png", "the picture, a .png, .svg or .pdf")


def plot(options: PlotOptions) -> int:
    """Draw the loss of one run or several against steps and time, and name the options that differ."""

    out = user_path(options.out, f"--out={options.out}")
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out={options.out} must end in one of {', '.join(FORMATS)}")
    curves = [read_curve(run_dir) for run_dir in options.run_dir]
    for curve in curves:
        if not curve.steps:
            raise ConfigError(f"{curve.name} has logged no step yet")
    try:
        save(draw(curves), out)
    except ImportError as error:
        raise ConfigError(f"no picture without matplotlib ({error}): pip install matplotlib") from None
    except OSError as error:
        raise ConfigError(f"--out={options.out} cannot be written: {error.strerror or error}") from None
    except Exception as error:  # of matplotlib's: they have no common base
        raise ConfigError(f"--out={options.out} cannot be drawn: {one_line(error)}") from None
    print(f"{options.out} shows {len(curves)} runs" if len(curves) > 1 else f"{options.out} shows {curves[0].name}")
    return 0
