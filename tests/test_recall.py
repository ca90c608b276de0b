"""Scores read off forward passes against plain loops and real decoding, on a model that has memorised a little text."""

from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from nanogpt.data import Windows, hop_length
from nanogpt.model import GPT, GPTConfig
from nanogpt.recall import Forward, full_pass, longest_run, recall_at, recite_all
from nanogpt.recite import continue_text, generate, verdict
from nanogpt.run_dir import load_run
from nanogpt.tokenizer import decode, encode, encoding, stable_prefix
from nanogpt.world import World

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def memory(finished):
    """The tiny run's model, its windows and its configuration: nearly memorised, so there are some breaks."""
    run = load_run(finished[0])
    config = run.config
    from nanogpt.corpus import read_corpus

    ids = torch.tensor(encode(read_corpus("builtin").text)[: config.subset_tokens])
    windows = Windows(ids, context_length=config.context_length, stride=config.stride, phase=config.phase, seed=0)
    return run.model, windows, config


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


def test_exact_recall_is_greedy_decoding(memory):
    """Reference: decoding every prompt for real, token by token."""
    model, windows, config = memory
    starts = torch.arange(0, windows.last_start, 5)
    half = config.context_length // 2
    decoded = [
        greedy(model, windows.ids[s : s + half].tolist(), half, config.context_length)
        == windows.ids[s + half : s + 2 * half].tolist()
        for s in starts.tolist()
    ]
    share, loss = recall_at(model, windows, starts, Forward(ALONE, dtype="fp32", rows=6))
    assert 0 < share < 1, "the comparison needs hits and misses"
    assert share == sum(decoded) / len(decoded)
    assert loss == pytest.approx(full_pass(model, windows, starts, Forward(ALONE, dtype="fp32", rows=9)), rel=1e-5)


def test_recite_all_is_recitation_put_right_where_it_breaks(memory):
    """Reference: greedy decoding by hops, restarted with the true token after each mistake."""
    model, windows, config = memory
    ids, length = windows.ids.tolist(), config.context_length
    hop = hop_length(length)
    told = recite_all(model, windows, Forward(ALONE, dtype="fp32", rows=5))
    expected = []
    with torch.no_grad():
        for i in range(1, len(ids)):
            start = 0 if i <= length else -(-(i - length) // hop) * hop
            start = min(start, windows.last_start)
            expected.append(int(model(torch.tensor([ids[start:i]]))[0, -1].argmax()) == ids[i])
    assert told.correct.tolist() == expected
    assert not all(expected), "the comparison needs a break"


def test_generation_hops_where_recite_all_does(memory):
    """Invariant: a free recitation from the beginning first breaks where the score says."""
    model, windows, config = memory
    ids, half = windows.ids.tolist(), config.context_length // 2
    correct = recite_all(model, windows, Forward(ALONE, dtype="fp32", rows=64)).correct[half - 1 :].tolist()
    first_break = correct.index(False)
    said = greedy(model, ids[:half], first_break + 1, config.context_length)
    assert said[:first_break] == ids[half : half + first_break]
    assert said[first_break] != ids[half + first_break]


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
    told = recite_all(model, windows, Forward(ALONE, dtype="fp32", rows=64)).correct.tolist()
    text = decode(windows.ids.tolist())
    known = decode(windows.ids[: told.index(False, 12)].tolist())  # up to the first break after a few words
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


def test_longest_run():
    """Reference: counted by hand."""
    for pattern, expected in (("", 0), ("0", 0), ("1", 1), ("1101110", 3), ("0111", 3), ("1111", 4)):
        assert longest_run(torch.tensor([c == "1" for c in pattern], dtype=torch.bool)) == expected, pattern


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b" and the dog", "verbatim: all 12 bytes"),
        (b" and the cat", "diverges after 9 bytes: it says 'cat', the text 'dog and"),
        (b" and the dog and the fox ran on", "to the end of the memorised text"),
    ],
)
def test_the_verdict(said, expected):
    """Reference: read by eye; of several places the one that agrees longest counts."""
    assert expected in verdict(b"the cat", said, b"the cat or the cat and the dog and the fox")
    assert "does not hold" in verdict(b"a zebra", said, b"the cat")


def test_the_verdict_at_the_end_of_the_text():
    """Invariant: a prompt that ends the text has nothing to agree with."""
    assert "for 0 bytes, to the end of the memorised text" in verdict(b"fox", b" runs", b"the fox")
