"""The GPT-2 vocabulary, without a network."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata

import pytest

from harness.runs import REPOSITORY
from nanogpt.data import tokenizer
from nanogpt.data.tokenizer import decode, encode, encoding, stable_prefix

SEVERAL = 2 * tokenizer.PART + 1  # parts
# Letters of one and of several code points, digits, contractions, signs, blanks, and what Python alone calls one.
LETTERS = ("a", "the", "é", "e\u0301", "ª", "ʰ", "日", "本", "ـ", "1", "٣", "Ⅷ", "½", "'", "'s", "'ll", "'v", "'r", "_")
SIGNS = ("-", "!", "\x00", "\u0301", "🙂", "👩\u200d👩", "\u200b", "\u180e", "\ufeff", "\x1c", "\x1f")
BLANKS = (" ", "  ", "\n", "\r", "\t", "\x0b", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u202f", "\u3000")
ALPHABET = (*LETTERS, *SIGNS, *BLANKS)


def assert_same_tokens_in_parts(text, monkeypatch):
    """encode() in parts of any length gives what the regular expression does on the whole."""
    whole = encoding().encode_ordinary(text)
    for part in (1, 2, 5, 64, tokenizer.PART):
        monkeypatch.setattr(tokenizer, "PART", part)
        assert encode(text) == whole, (part, text[:99])


def test_known_ids():
    """Reference: GPT-2's published ids."""
    assert encode("hello world") == [31373, 995]
    assert decode([15496, 11, 995]) == "Hello, world"


@pytest.mark.parametrize("text", ["", " ", "naïve café\n\n\t x", "日本語 🙂", "<|endoftext|>", "a\r\nb\x00c"])
def test_round_trip(text):
    """Invariant: decode(encode(text)) == text, byte for byte."""
    assert decode(encode(text)) == text


def test_the_special_token_is_only_text():
    """Invariant: no text can smuggle in id 50256."""
    assert 50256 not in encode("<|endoftext|>")


def test_the_real_corpus(tiny_shakespeare):
    """Reference: 338,025 tokens and an exact round trip."""
    text = tiny_shakespeare.read_text()
    ids = encode(text)
    assert len(ids) == 338_025
    assert decode(ids) == text


def test_parts_of_the_real_corpus(tiny_shakespeare, monkeypatch):
    """Reference: the regular expression on the whole of it."""
    assert_same_tokens_in_parts(tiny_shakespeare.read_text(), monkeypatch)


def test_parts_of_random_texts(monkeypatch):
    """Reference: the regular expression on the whole, of 1,000 texts of letters, digits, signs and blanks."""
    draw = random.Random(0)
    for _ in range(1000):
        text = "".join(draw.choices(ALPHABET, k=draw.randrange(40)))
        with monkeypatch.context() as patch:
            assert_same_tokens_in_parts(text, patch)


@pytest.mark.parametrize("form", ["a{0}{0}b{0}", "{0} {0}\n\n{0}'ll{0}", " {0}1{0} x"])
def test_parts_beside_every_kind_of_character(form, monkeypatch):
    """Reference: the regular expression on the whole, with Unicode's blanks and format characters, and others."""
    characters = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) != "Cs"]
    odd = [c for c in characters if c.isspace() or unicodedata.category(c)[0] == "Z" or unicodedata.category(c) == "Cf"]
    text = "".join(form.format(c) for c in [*odd, *characters[::199]])
    assert_same_tokens_in_parts(text, monkeypatch)


@pytest.mark.parametrize("blank", [" ", "\n", "\t", "\u3000", " \t"])
@pytest.mark.parametrize("end", ["", "x", "\nx"])
def test_runs_of_white_space(blank, end):
    """Reference: the regular expression on the whole; for more than a million it panics, and an exact round trip."""
    run = blank * (SEVERAL // len(blank))
    text = f"the{run}{end} {run}{end}"
    assert encode(text) == encoding().encode_ordinary(text)
    assert decode(encode("a" + " " * 1_200_000 + end)) == "a" + " " * 1_200_000 + end


@pytest.mark.parametrize("piece", ["a", "-", "1", "🙂", "日本"])
def test_a_long_piece_takes_no_longer_for_its_length(piece):
    """Invariant: a piece of 128,000 bytes takes at most four times what 16 parts of it do: no square."""

    def time_s(text, times=1):
        started = time.process_time()
        for _ in range(times):
            encode(text)
        return time.process_time() - started

    size = 128_000 // len(piece.encode())
    assert time_s(piece * size) < 4 * time_s(piece * (size // 16), 16) + 0.5


def test_signals_are_heard_between_the_parts():
    """Invariant: what a signal raises comes out long before the end of a text that takes seconds."""
    text = "Let us kill him, and we'll have corn at our own price.\n" * 400_000

    def stop(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        started = time.process_time()
        with pytest.raises(TimeoutError):
            encode(text)
        assert time.process_time() - started < 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("prompt", "stable", "pending"),
    [
        ("Let us kill him, ", "Let us kill him,", b" "),
        ("Let us ki", "Let us", b" ki"),
        ("him,  ", "him,", b"  "),
        ("him,  a", "him, ", b" a"),
        ("him,\n\na", "him,\n\n", b"a"),
        ("Let", "", b"Let"),
        ("", "", b""),
    ],
)
def test_what_may_change_when_a_prompt_goes_on(prompt, stable, pending):
    """Invariant: stable tokens and pending bytes make up the prompt, split before its last piece."""
    tokens, rest = stable_prefix(prompt)
    assert (decode(tokens), rest) == (stable, pending)


def test_stable_tokens_stay_whatever_follows():
    """Invariant: at every cut of a text, the stable tokens are a prefix of the whole text's tokens."""
    text = "Let us kill him, and we'll have corn at our own price.\n\nAll:\nNo more  talking on't; O'er"
    whole = encode(text)
    for cut in range(len(text)):
        tokens, _ = stable_prefix(text[:cut])
        assert tokens == whole[: len(tokens)], text[:cut]


def test_stable_tokens_of_random_texts_stay():
    """Invariant: the same of 300 texts of all kinds of characters."""
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choices(ALPHABET, k=20))
        whole = encode(text)
        for cut in range(len(text)):
            tokens, pending = stable_prefix(text[:cut])
            assert tokens == whole[: len(tokens)], ascii(text[:cut])
            assert encoding().decode_bytes(tokens) + pending == text[:cut].encode()


@pytest.mark.parametrize("prompt", ["ab" * 60_000, " " * 1_200_000 + "x", "日本" * 20_000])
def test_a_long_last_piece_is_no_wait(prompt):
    """Invariant: what may yet change of a prompt of one piece is known in a second, not in minutes."""
    stable_prefix("the table of tokens")
    started = time.process_time()
    tokens, pending = stable_prefix(prompt)
    assert encoding().decode_bytes(tokens) + pending == prompt.encode()
    assert time.process_time() - started < 10


def test_a_damaged_table_is_refused(monkeypatch):
    """Invariant: a table whose SHA-256 differs is never used."""
    monkeypatch.setattr(tokenizer, "RANKS_SHA256", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(RuntimeError, match="damaged"):
        tokenizer.encoding.__wrapped__()


def test_no_network_no_environment():
    """Invariant: loading and encoding opens no socket and leaves os.environ as it was."""
    program = (
        "import os, socket\n"
        "def refuse(*a, **k): raise AssertionError('a socket')\n"
        "socket.socket = refuse; before = dict(os.environ)\n"
        "from nanogpt.data.tokenizer import encode\n"
        "assert encode('hello world') == [31373, 995] and dict(os.environ) == before\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", program], check=True, env=env, timeout=60)
