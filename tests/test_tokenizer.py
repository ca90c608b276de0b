"""The GPT-2 vocabulary, without a network."""

import hashlib
import os
import subprocess
import sys

import pytest

from conftest import REPOSITORY
from nanogpt import tokenizer
from nanogpt.tokenizer import decode, encode, stable_prefix


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


@pytest.mark.parametrize(
    ("prompt", "stable", "pending"),
    [
        ("Let us kill him, ", "Let us kill him,", b" "),
        ("Let us ki", "Let us", b" ki"),
        ("him,  ", "him,", b"  "),
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
        "from nanogpt.tokenizer import encode\n"
        "assert encode('hello world') == [31373, 995] and dict(os.environ) == before\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", program], check=True, env=env, timeout=60)
