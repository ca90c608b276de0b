"""The scores of a report, computed by other software: transformers, on the exported model, by proof.md alone."""

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.forks import forked
from harness.runs import REPOSITORY

transformers = pytest.importorskip("transformers")
T, HOP, SUBSET = 32, 16, 256


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory):
    """(report.json, transformers' model, the memorised tokens, the control's tokens)."""
    directory = tmp_path_factory.mktemp("other") / "exported"
    assert forked(directory.parent, "nanogpt", "export", finished[0], directory).returncode == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    text = (REPOSITORY / "nanogpt" / "assets" / "coriolanus.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)
    told = json.loads((Path(finished[0]) / "report.json").read_text())
    return told, model, ids[:SUBSET], ids[SUBSET : 2 * SUBSET]


@torch.no_grad()
def window(model, ids, start):
    """(is each target the argmax, its nats) for the T targets of the window at start; fewer at the end of the text."""
    piece = torch.tensor(ids[start : start + T + 1])
    logits = model(piece[None, :-1]).logits[0].double()
    nats = torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none")
    return (logits.argmax(-1) == piece[1:]).tolist(), nats.tolist()


def decoded(model, prompts, count):
    """transformers' own greedy continuation of prompts of one length."""
    prompts = torch.tensor(prompts)
    said = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=50256,
    )  # fmt: skip
    return said[:, prompts.size(1) :].tolist()


def random_starts(ids, count):
    return np.random.default_rng([0, 2, 0]).permutation(len(ids) - T)[:count].tolist()


def edits(a, b):
    """Levenshtein's distance, by the book."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]


def test_the_full_pass(other):
    """Reference: eight grids of windows, one by one: loss, argmax, and what generate() says of each second half."""
    told, model, ids, _ = other
    last = len(ids) - 1 - T
    starts = sorted({min(max(k * T - shift, 0), last) for shift in range(0, 32, 4) for k in range(9)})
    right, nats = zip(*(window(model, ids, start) for start in starts), strict=True)
    said = decoded(model, [ids[s : s + HOP] for s in starts], HOP)
    loss = np.mean(nats)
    assert (
        told["full_pass"]
        == {
            "windows": len(starts),
            "loss": pytest.approx(loss, rel=1e-5),  # fp32 logits on either side
            "loss_above_floor": pytest.approx(loss - told["floor"], rel=1e-5),
            "token_accuracy": pytest.approx(np.mean(right)),
            "exact_recall": np.mean([a == ids[s + HOP : s + 2 * HOP] for a, s in zip(said, starts, strict=True)]),
        }
    )
    assert told["loss"] == told["full_pass"]["loss"]


@pytest.fixture(scope="module", params=["memorised", "control"])
def text(request, other):
    """A text with its part of report.json: which, scores, ids, how many prompts, the model and window() at a start."""
    told, model, ids, rest = other
    which = request.param
    scores, ids, prompts = (told, ids, 256) if which == "memorised" else (told["control"], rest, 64)
    read = cache(lambda start: window(model, ids, start))
    return SimpleNamespace(which=which, scores=scores, ids=ids, prompts=prompts, model=model, read=read)


def test_the_scores_at_random_offsets(text):
    """Reference: generate() after each prompt, and the loss and likelihoods of the same windows."""
    scores, ids, recall = text.scores, text.ids, text.scores["recall"]
    starts = random_starts(ids, text.prompts)
    said = decoded(text.model, [ids[s : s + HOP] for s in starts], HOP)
    hits = [a == ids[s + HOP : s + 2 * HOP] for a, s in zip(said, starts, strict=True)]
    assert (recall["exact_recall"], recall["exact_recall_prompts"]) == (np.mean(hits), len(starts))
    nats = [text.read(s)[1] for s in starts]
    assert scores["random_offset_loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    log_p = [-sum(n[HOP - 1 : 2 * HOP - 1]) for n in nats]
    for name, q in (("min", 0), ("p10", 0.1), ("median", 0.5), ("p90", 0.9), ("max", 1)):
        assert recall["log_p"][name] == pytest.approx(np.quantile(log_p, q), rel=1e-5), name
    p = math.exp(np.median(log_p))
    if text.which == "memorised":
        for share in (50, 99):
            draws = round(10 ** recall[f"log10_draws_for_{share}"]["median_prompt"])
            assert 1 - (1 - p) ** draws >= share / 100 > 1 - (1 - p) ** (draws - 1)
    else:  # so many that (1 - p) is 1 in floating point
        assert recall["log10_draws_for_50"]["median_prompt"] == pytest.approx(math.log10(math.log(2) / p), rel=1e-5)


def test_the_scores_of_each_token_once(text):
    """Reference: a plain loop. A token beyond the first window is of the first hop's window that reaches it."""
    scores, ids, recall = text.scores, text.ids, text.scores["recall"]

    def strided(token):
        start = max(0, math.ceil((token - T) / HOP) * HOP)
        return tuple(figures[token - 1 - start] for figures in text.read(start))

    in_order = [strided(token) for token in range(1, len(ids))]
    nats = [n for _, n in in_order]
    assert scores["strided_loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert recall["token_accuracy"] == pytest.approx(np.mean([right for right, _ in in_order]))
    assert recall["recitation_breaks"] == sum(not right for right, _ in in_order[HOP - 1 :])
    reference = [-math.log(ids.count(token) / len(ids)) for token in ids[1:]]
    assert scores["reference_loss"] == pytest.approx(np.mean(reference))
    bits = max(0, (sum(reference) - sum(nats)) / math.log(2))
    assert scores["memorised_bits"] == pytest.approx(bits, rel=1e-5)
    assert scores["bits_per_parameter"] == pytest.approx(bits / text.model.num_parameters(), rel=1e-5)


def verbatim_run(text, start):
    """How many tokens are the argmax, one after the other, after the prompt at start."""
    run = 0
    while (token := start + HOP + run) < len(text.ids):
        base = start + max(0, math.ceil((token - start - T) / HOP) * HOP)
        if not text.read(base)[0][token - 1 - base]:
            break
        run += 1
    return run


def test_the_scores_of_recitation(text):
    """Reference: argmax by argmax from each hop, and generate() over each hop."""
    ids, recall = text.ids, text.scores["recall"]
    hops = range(0, len(ids) - HOP, HOP)
    runs = [verbatim_run(text, start) for start in hops]
    assert recall["verbatim_run"] == {
        "starts": len(runs), "min_tokens": min(runs), "median_tokens": np.median(runs), "max_tokens": max(runs),
        "to_the_end": np.mean([start + HOP + n == len(ids) for start, n in zip(hops, runs, strict=True)]),
    }  # fmt: skip
    said = decoded(text.model, [ids[s : s + HOP] for s in hops], HOP)
    pairs = [(a[: len(ids) - s - HOP], ids[s + HOP : s + 2 * HOP]) for a, s in zip(said, hops, strict=True)]
    count = len(ids) - HOP
    assert recall["hop_recitation"] == {
        "tokens": count,
        "recited": sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True)) / count,
        "edit_distance": sum(edits(a, b) for a, b in pairs) / count,
    }


def test_the_control_holds_no_memory(other):
    """Invariant: a text that was not trained on comes out near zero."""
    control = other[0]["control"]
    assert control["recall"]["exact_recall"] == 0.0
    assert control["memorised_bits"] == 0.0
    assert control["recall"]["verbatim_run"]["max_tokens"] < 8
    assert control["recall"]["hop_recitation"]["edit_distance"] > 0.8
