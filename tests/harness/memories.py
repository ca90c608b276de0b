"""A made-up run whose text lights up, for tests of the page and the picture, and to look at them.

PYTHONPATH=. python tests/harness/memories.py OUT_DIR     # writes sample pages and pictures
"""

import base64
import json
import re
import sys
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from nanogpt.data.corpus import read_corpus
from nanogpt.data.tokenizer import encode, encoding
from nanogpt.plots.run_history import Curve
from nanogpt.token_losses.history import UNSEEN, TokenHistory, levels_of


def bytes_of(text, most=None):
    """The bytes of each token of text."""
    return [encoding().decode_single_token_bytes(token) for token in encode(text)[:most]]


def unpacked(page):
    """(data, text, pieces, levels) of a page, read as its script reads them."""
    data, packed = (re.search(rf'id="{name}">([^<]*)<', page)[1] for name in ("data", "packed"))
    data, content = json.loads(data), zlib.decompress(base64.b64decode(packed))
    end, tokens = data["text_bytes"], data["tokens"]
    pieces = np.frombuffer(content, "<u2", tokens, end).astype(int)
    rows = np.frombuffer(content, np.uint8, offset=end + 2 * tokens).reshape(-1, tokens)
    return data, content[:end].decode(), pieces.tolist(), rows.cumsum(axis=0, dtype=np.uint8)


def memory(tokens, *, rows=74, last=365, seed=0):
    """(history, curve) of a run that learns tokens: common ones first; unseen before their turn in the first epoch."""
    rng = np.random.default_rng(seed)
    count = len(tokens)
    steps = np.linspace(0, last, rows).round().astype(np.int64)
    frequency = Counter(tokens)
    common = np.log2([frequency[token] for token in tokens])
    start = np.clip(10.8 - common * 0.6 + rng.normal(0, 0.5, count), 4, 12.6)
    middle = np.clip(6.5 - 0.62 * common + rng.normal(0, 1.0, count), 1, 9)  # as far as frequency alone leads
    learnt = last * np.clip(
        0.52 - 0.02 * common + rng.normal(0, 0.13, count) + rng.exponential(0.02, count), 0.12, 0.97
    )
    losses = []
    for step in steps:
        early = middle + (start - middle) * np.exp(-step / (0.05 * last))
        late = 1 / (1 + np.exp(-(learnt - step) / (0.035 * last)))
        losses.append(np.maximum(0, (early * late + 0.02) * np.exp(rng.normal(0, 0.12, count))))
    levels = np.stack([levels_of(row.astype(np.float32)) for row in losses])
    levels[:, 0] = UNSEEN
    order = rng.random(count)
    for row, step in enumerate(steps):  # windows come in some order in the first epoch
        levels[row, order > (step + 1) / (0.04 * last)] = UNSEEN
    means = [float(row[1:].mean()) for row in losses]
    curve = Curve(
        name="runs/a", options={}, steps=steps.tolist(), wall_s=[float(s) for s in steps], loss=means,
        full_pass_loss=means, text=f"{count:,} tokens of builtin", target=0.1, floor=0.01,
        outcome=f"target reached: step {last:,}, 10 min",
    )  # fmt: skip
    return TokenHistory(steps, levels), curve


def main(directory):
    """Sample pages: a run that is over, one that goes on, and a long text."""
    from nanogpt.plots.loss_plot import save
    from nanogpt.token_losses.page import make_page
    from nanogpt.token_losses.picture import draw_memory

    directory.mkdir(parents=True, exist_ok=True)
    text = read_corpus("builtin").text
    tokens = bytes_of(text, 2048)
    history, curve = memory(tokens)
    whole = b"".join(tokens).decode()
    recital = (whole[:190], whole[190:900], "The next 512 tokens came back exactly.")
    title = "A text lights up: 2,048 tokens of builtin"
    save(draw_memory(history, curve, title=title), directory / "memory.png")
    over = make_page(replace(history, recital=recital), tokens, curve, title=title, is_running=False)
    (directory / "over.html").write_text(over, encoding="utf-8")
    running = make_page(history.until(180), tokens, curve, title=title, is_running=True)
    (directory / "running.html").write_text(running, encoding="utf-8")
    tokens = (bytes_of(text) * 40)[:300_000]
    history, curve = memory(tokens, rows=55, last=5400)
    save(draw_memory(history, curve, title="300,000 tokens"), directory / "long.png")
    long = make_page(history, tokens, curve, title="300,000 tokens", is_running=False)
    (directory / "long.html").write_text(long, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
