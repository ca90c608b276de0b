"""Scores read off forward passes against plain loops and real decoding, on a model that has memorised a little text."""

import time
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from harness.runs import ALONE
from nanogpt.data.corpus import read_corpus
from nanogpt.data.tokenizer import decode, encode, encoding, stable_prefix
from nanogpt.data.windows import Windows, memorised_windows
from nanogpt.evaluate.recall import (
    Forward,
    full_pass,
    hop_starts,
    in_order,
    longest_run,
    possible_recall,
    read,
    recite_text,
    verbatim_runs,
)
from nanogpt.evaluate.recite import _can_spell, continue_text, generate, locate, shortest_prompt, verdict
from nanogpt.model.generate import decode_greedily, hop_length
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.storage.run_dir import load_run


@pytest.fixture(scope="module")
def memory(finished):
    """The tiny run's model, its windows and its configuration."""
    run = load_run(finished[0])
    return run.model, memorised_windows(encode(read_corpus("builtin").text), run.config), run.config


def test_a_full_pass_is_the_mean_over_all_targets(memory):
    """Reference: one window at a time, added up in a plain loop."""
    model, windows, _ = memory
    starts = windows.judged_starts(4)
    total = count = 0
    with torch.no_grad():
        for start in starts.tolist():
            window = windows.ids[start : start + windows.context_length + 1]
            total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
            count += windows.context_length
    for rows in (1, 7, 1000):
        loss = full_pass(model, windows, starts, Forward(ALONE, dtype="fp32", rows=rows))
        assert loss == pytest.approx(total / count, rel=1e-5)  # fp32 sums in another order


def test_a_full_pass_leaves_training_mode_on(memory):
    """Invariant: evaluation mode ends with the pass."""
    model, windows, _ = memory
    model.train()
    full_pass(model, windows, torch.tensor([0]), Forward(ALONE, dtype="fp32", rows=1))
    assert model.training
    model.eval()


def greedy(model, prompt, count, context_length, pending=b""):
    return list(islice(generate(model, prompt, context_length=context_length, pending=pending), count))


def forward(rows):
    return Forward(ALONE, dtype="fp32", rows=rows)


def test_a_reading_is_the_softmax_of_each_target(memory):
    """Reference: log-softmax and argmax of one window at a time; its mean is the full pass."""
    model, windows, _ = memory
    starts = torch.tensor([0, 7, 100, windows.last_start])
    told = read(model, windows, starts, forward(3))
    for row, start in enumerate(starts.tolist()):
        window = windows.ids[start : start + windows.context_length + 1]
        with torch.no_grad():
            logits = model(window[None, :-1])[0].double()
        nll = F.cross_entropy(logits, window[1:], reduction="none")
        # Logits of about 20 are rounded to 2e-6, in another order for each shape.
        torch.testing.assert_close(told.nll[row].double(), nll, atol=5e-6, rtol=1e-5)
        assert told.right[row].tolist() == (logits.argmax(-1) == window[1:]).tolist()
        best = logits.topk(2).values.T
        truth = logits[range(len(logits)), window[1:]]
        expected = torch.where(told.right[row], truth - best[1], best[0] - truth)
        torch.testing.assert_close(told.margin[row].double(), expected, atol=1e-4, rtol=0)  # fp32 logits of about 20
    # torch's fp32 cross-entropy, which full_pass trusts, is itself up to 7e-5 nats off for one target on a CPU.
    assert told.nll.mean().item() == pytest.approx(full_pass(model, windows, starts, forward(9)), abs=7e-5)


def test_the_text_in_order_is_recitation_put_right_where_it_breaks(memory):
    """Reference: greedy decoding by hops, restarted with the true token after each mistake.

    Of the memorised text and some that follows it, which was not trained on and breaks it.
    """
    model, memorised, config = memory
    ids, length = encode(read_corpus("builtin").text)[: len(memorised.ids) + 40], config.context_length
    windows = Windows(torch.tensor(ids), context_length=length, stride=length, phase="random", seed=0)
    hop = hop_length(length)
    told = in_order(read(model, windows, hop_starts(windows), forward(5)).right, windows)
    expected = []
    with torch.no_grad():
        for i in range(1, len(ids)):
            start = 0 if i <= length else -(-(i - length) // hop) * hop
            expected.append(int(model(torch.tensor([ids[start:i]]))[0, -1].argmax()) == ids[i])
    assert told.tolist() == expected
    assert 200 < sum(expected) < len(expected), "the comparison needs breaks"


@pytest.mark.parametrize("context_length", [32, 15])
def test_recitation_is_greedy_decoding(memory, context_length):
    """Reference: real decoding, one prompt at a time, of each verbatim run to its end and of each hop."""
    model, memorised, _ = memory
    ids, hop = memorised.ids.tolist()[:150], hop_length(context_length)
    windows = Windows(torch.tensor(ids), context_length=context_length, stride=context_length, phase="random", seed=0)
    starts = hop_starts(windows)
    reading = read(model, windows, starts, forward(4))
    told = recite_text(model, windows, reading, forward(4))
    runs = verbatim_runs(reading.right, windows).tolist()
    assert len(set(runs)) > 3, "the comparison needs runs of several lengths"
    expected = [-1] * hop
    for start, run in zip(starts.tolist(), runs, strict=True):
        truth = ids[start + hop :]
        said = greedy(model, ids[start : start + hop], len(truth), context_length)
        same = [a == b for a, b in zip(said, truth, strict=True)]
        assert run == (same.index(False) if False in same else len(same))
        expected += said[:hop]
    assert told.said.tolist() == expected[: len(ids)]
    assert told.recited.tolist() == [a == b for a, b in zip(told.said.tolist(), ids, strict=True)]
    for token in (1, hop, hop + 1, 3 * hop - 1, 3 * hop, len(ids) - 1):
        start = max(token // hop - 1, 0) * hop
        with torch.no_grad():
            right = int(model(torch.tensor([ids[start:token]]))[0, -1].argmax()) == ids[token]
        assert bool(told.predicted[token]) is right, token
    assert not told.predicted[0]


def test_many_prompts_decode_as_each_alone(memory):
    """Reference: `generate`, one prompt at a time; the margins are those of plain forward passes; none is allowed."""
    model, windows, config = memory
    prompts = windows.ids[torch.tensor([[3], [50], [120]]) + torch.arange(9)]
    said, margins = decode_greedily(model, prompts, 60, context_length=config.context_length)
    for prompt, row in zip(prompts.tolist(), said.tolist(), strict=True):
        assert row == greedy(model, prompt, 60, config.context_length)
    with torch.no_grad():
        best = model(torch.cat([prompts, said[:, :5]], dim=1))[:, -1].topk(2).values
    torch.testing.assert_close(margins[:, 5], best[:, 0] - best[:, 1], atol=1e-4, rtol=0)
    assert decode_greedily(model, prompts[:0], 3, context_length=32)[0].shape == (0, 3)


@pytest.mark.parametrize("context_length", [1, 2, 5, 16])
def test_generation_with_a_cache_equals_plain_decoding(context_length):
    """Reference: a forward pass over the whole context for each token, dropping half a window when it is full."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32)).eval()
    context, expected = [11, 22], []
    keep = context_length - hop_length(context_length) + 1
    context = context if len(context) <= context_length else context[-keep:]
    with torch.no_grad():
        for _ in range(40):
            token = int(model(torch.tensor([context]))[0, -1].argmax())
            expected.append(token)
            context = [*context, token] if len(context) < context_length else [*context, token][-keep:]
    assert greedy(model, [11, 22], 40, context_length) == expected


def test_a_prompt_is_healed(memory):
    """Invariant: wherever a prompt is cut, inside a word or after a blank, the answer goes on with the text."""
    model, windows, config = memory
    told = in_order(read(model, windows, hop_starts(windows), forward(64)).right, windows).tolist()
    text = decode(windows.ids.tolist())
    breaks = [token for token in range(12, len(told)) if not told[token]]
    known = decode(windows.ids[: breaks[0] if breaks else None].tolist())  # up to the first break after a few words
    assert len(known) > 80
    for cut in range(60, 76):
        said = b"".join(islice(continue_text(model, known[:cut], context_length=config.context_length), 4)).decode()
        assert said, "something is said"
        assert text.startswith((known[:cut] + said)[: len(known)]), f"{known[:cut]!r} -> {said!r}"


def test_healing_never_repeats_the_prompt(memory):
    """Invariant: for a prompt that the model does not know, the healed bytes are spelled once and not said again."""
    model, _, config = memory
    torch.manual_seed(0)
    stranger = GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=32)).eval()
    for prompt in ("Zebras quack loud", "Zebras  ", "naïve caf", "x"):
        pieces = list(islice(continue_text(stranger, prompt, context_length=32), 8))
        stable, pending = stable_prefix(prompt)
        ids = greedy(stranger, stable, 8, 32, pending) if stable else greedy(stranger, encode(prompt), 8, 32)
        spelled = encoding().decode_bytes([*(stable or encode(prompt)), *ids])
        assert prompt.encode() + b"".join(pieces) == spelled, prompt
    with pytest.raises(ValueError, match="at least one token"):
        next(continue_text(model, "", context_length=config.context_length))


def test_what_can_spell_the_rest_of_a_prompt():
    """Reference: each token asked by itself; 500 such questions, which a long last word asks, take seconds."""
    spellings = [encoding().decode_single_token_bytes(token) for token in range(50256)]
    for pending in (b" ", b" ki", b"x", "日".encode()[:2], b"\xff\xff", b"-" * 300, b"the quick"):
        can = [token for token, s in enumerate(spellings) if s.startswith(pending) or pending.startswith(s)]
        assert _can_spell(pending).nonzero().flatten().tolist() == can
    started = time.process_time()
    for length in range(500, 1000):
        _can_spell(b"ab" * length)
    assert time.process_time() - started < 10


def test_the_shortest_prompt_of_a_line(memory):
    """Reference: decoding after 1, 2, 3, ... tokens before it; words that are not there have no place."""
    model, windows, config = memory
    ids = windows.ids.tolist()
    words = "You are all resolved"
    start, end = locate(ids, words)
    assert decode(ids[start:end]) == words
    found = shortest_prompt(model, ids, start, end, context_length=config.context_length)
    hits = [
        count
        for count in range(1, start + 1)
        if greedy(model, ids[start - count : start], end - start, config.context_length) == ids[start:end]
    ]
    assert found == hits[0]
    assert decode(ids[slice(*locate(ids, "esolved rat"))]) == " resolved rather", "whole tokens"
    assert locate(ids, "Lo, a zebra") is None
    strange = [*ids[:start], *range(20_000, 20_000 + end - start)]
    assert shortest_prompt(model, strange, start, end, context_length=config.context_length) is None


def test_longest_run():
    """Reference: counted by hand."""
    for pattern, expected in (("", 0), ("0", 0), ("1", 1), ("1101110", 3), ("0111", 3), ("1111", 4)):
        assert longest_run(torch.tensor([c == "1" for c in pattern], dtype=torch.bool)) == expected, pattern


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b" and the dog", "[word for word as in the memorised text: 12 characters]"),
        (b" and the cat", "as in the memorised text for 9 characters; then the model says 'cat', the text 'dog and"),
        (
            b" and the dog and the fox ran on",
            "for 24 characters, to its end; then the model says ' ran on', the text begins 'the cat or the cat and",
        ),
        (
            b" and the dog and the foxthe cat or a cat",
            "for 24 characters, to its end; word for word from its beginning for 11 "
            "characters; then the model says 'a cat', the text 'the cat and the dog",
        ),
        (
            b" and the dog and the fox" + 2 * b"the cat or the cat and the dog and the fox" + b"the",
            "for 24 characters, to its end; word for word from its beginning for 87 characters]",
        ),
    ],
)
def test_the_verdict(said, expected):
    """Reference: read by eye; of several places the one that agrees longest counts."""
    assert expected in verdict(b"the cat", said, b"the cat or the cat and the dog and the fox", goes_round=True)
    assert "does not hold" in verdict(b"a zebra", said, b"the cat", goes_round=True)


def test_the_verdict_counts_whole_characters():
    """Reference: counted by hand; a recitation may end, or part from the text, within a character."""
    text = "là-bas, où".encode()
    said = verdict(b"l", text[1:-1], text, goes_round=True)
    assert said == "[word for word as in the memorised text: 8 characters]"
    assert "for 8 characters; then" in verdict(b"l", text[1:-1] + b"\xa0", text, goes_round=True)


def test_the_verdict_at_the_end_of_the_text():
    """Invariant: after a prompt that ends the text its beginning is expected, where training went round."""
    ends = "[the prompt ends the memorised text; "
    for said, goes_round, expected in (
        (b" runs", True, "then the model says ' runs', the text begins 'the fox']"),
        (b" runs", False, "then the model says ' runs']"),
        (b"the fo", True, "word for word from its beginning for 6 characters]"),
        (b"the fo", False, "then the model says 'the fo']"),
    ):
        assert verdict(b"fox", said, b"the fox", goes_round=goes_round) == ends + expected


def test_what_recall_is_possible_at_all():
    """Reference: written out. Of windows that begin alike only those count whose end is the most frequent."""
    ids = torch.tensor([1, 2, 3, 4, 9, 1, 2, 3, 4, 9, 1, 2, 5, 6, 9])  # 1 2 goes on with 3 4, 3 4 and 5 6
    windows = Windows(ids, context_length=4, stride=4, phase="fixed", seed=0)
    assert possible_recall(windows, torch.tensor([0, 5, 10])) == pytest.approx(2 / 3)
    assert possible_recall(windows, torch.tensor([0, 5, 1])) == 1
