"""memory.html and memory.png of a run, from the files in its directory.

draw_page(Path("out"), encoding().decode_tokens_bytes(ids), goes_on=False)
"""

from collections.abc import Sequence
from pathlib import Path

from nanogpt.config.files import whole
from nanogpt.plots.loss_plot import save
from nanogpt.plots.run_history import read_curve
from nanogpt.storage.run_dir import MEMORY_PNG
from nanogpt.token_losses.history import MEMORY_NPZ, TokenHistory
from nanogpt.token_losses.page import make_page
from nanogpt.token_losses.picture import draw_memory

MEMORY_HTML = "memory.html"


def draw_page(out_dir: Path, tokens: Sequence[bytes], *, goes_on: bool) -> None:
    """Write memory.html; tokens: the bytes of each token of the memorised text.

    goes_on: the page loads itself again. Raises ConfigError where a file that it needs is damaged, OSError.
    """
    path = out_dir / MEMORY_NPZ
    # Before the first row there is a page to open already.
    history = TokenHistory.load(path) if path.exists() else TokenHistory.empty(len(tokens))
    curve = read_curve(str(out_dir))
    page = make_page(history, tokens, curve, title=curve.text, is_running=goes_on)
    with whole(out_dir / MEMORY_HTML) as file:
        file.write(page.encode())


def draw_picture(out_dir: Path) -> None:
    """Write memory.png, if the run has logged a step. Raises as draw_page does, and ImportError without matplotlib."""
    if (out_dir / MEMORY_NPZ).exists():
        history, curve = TokenHistory.load(out_dir / MEMORY_NPZ), read_curve(str(out_dir))
        save(draw_memory(history, curve, title=curve.text), out_dir / MEMORY_PNG)
