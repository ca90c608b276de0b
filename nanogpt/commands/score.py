"""What a run memorised, as its report states it; a line's shortest prompt; the text as a page for a browser.

python -m nanogpt score out --line="Let us kill him"
python -m nanogpt score out --html=recall.html
"""

import os
import sys
from dataclasses import MISSING, dataclass, replace

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import user_path
from nanogpt.config.options import Options, option
from nanogpt.data.dataset import memorised_dataset
from nanogpt.data.tokenizer import decode
from nanogpt.evaluate.recite import locate, shortest_prompt
from nanogpt.evaluate.verify import load_scored_run, one_process, score_run
from nanogpt.plots.recall_html import make_page
from nanogpt.plots.recall_map import headline
from nanogpt.plots.score_table import score_table
from nanogpt.storage.run_dir import Run
from nanogpt.token_losses.draw import MEMORY_HTML
from nanogpt.utils.format import counted


@dataclass(frozen=True)
class ScoreOptions(Options):
    """What `score` is asked."""

    run_dir: str = option(MISSING, "directory of a finished run")
    line: str | None = option(None, "words of the memorised text: find the shortest prompt that brings them back")
    html: str | None = option(None, "a page to write for a browser: the text, token by token, as the model recites it")


def score(options: ScoreOptions) -> int:
    """Print the scores in a run's report, beside those of a text that it was not trained on."""
    run = load_scored_run(options.run_dir)
    if options.html is not None:  # known before anything is computed
        page = user_path(options.html, f"--html={options.html}")
        if page.suffix != ".html":
            raise ConfigError(f"--html={options.html} must end in .html")
        if page.name == MEMORY_HTML or str(page) in run.text_files:
            raise ConfigError(f"--html={options.html} is a file of the run itself: name another")
        if not os.path.isdir(page.parent):
            raise ConfigError(f"--html={options.html} cannot be written: {page.parent} is no directory")
        if os.path.isdir(page):
            raise ConfigError(f"--html={options.html} cannot be written: it is a directory")
    if options.line is None:
        print(score_table(run.report), end="")
    else:
        _tell_shortest_prompt(run, options.line)
    if options.html is not None:
        _write_page(run, options.html)
    return 0


def _tell_shortest_prompt(run: Run, line: str) -> None:
    """How much of the text before line it takes to bring line back. Raises ConfigError."""
    try:
        ids = memorised_dataset(run.config, run.report.corpus_sha256, run.text_files).windows.ids.tolist()
    except ConfigError as error:
        raise ConfigError(f"--line cannot be found: {error}") from None
    if (place := locate(ids, line)) is None:
        raise ConfigError(f"--line={line!r} is not in the memorised text, or only at its first token")
    start, end = place
    count = shortest_prompt(run.model, ids, start, end, context_length=run.config.context_length)
    if count is None:
        tried = min(start, run.config.context_length)
        print(f"no prompt of 1 to {counted(tried, 'token')} before the line brings it back")
    else:
        print(f"shortest prompt that brings it back, {counted(count, 'token')}: {decode(ids[start - count : start])!r}")


def _write_page(run: Run, to: str) -> None:
    """The recitation, made again from the weights and the text, as one HTML file. Raises ConfigError."""
    try:
        dataset = memorised_dataset(run.config, run.report.corpus_sha256, run.text_files)
    except ConfigError as error:
        raise ConfigError(f"--html={to} cannot be made: {error}") from None
    card = score_run(run, dataset, one_process())
    page = make_page(card.recited, headline(run.config.data, replace(run.report, scores=card.values())))
    try:
        user_path(to, f"--html={to}").write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ConfigError(f"--html={to} cannot be written: {error.strerror or error}") from None
    print(f"{to}: open it in a browser", file=sys.stderr)
