"""The GPT-2 vocabulary, offline: a rank table shipped with the package, never a download.

>>> encode("hello world")
[31373, 995]
>>> decode([31373, 995])
'hello world'
"""

import base64
import hashlib
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

import tiktoken

RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
VOCAB_SIZE = 50257

# GPT-2's pre-tokenisation: contractions, words, numbers and punctuation with their leading space, runs of white space.
# Possessive quantifiers keep the match linear. Byte pairs are merged within one such piece only.
PIECE_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Unicode's White_Space, which is what \s means there; Python's \s has four control characters besides.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LAST_SPACE = re.compile(rf"[{SPACE}](?=[^{SPACE}])")
PART = 2**16  # characters; \s+(?!\S) remembers each blank of a run, and tiktoken panics at a million of them


@cache
def encoding() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding. Raises RuntimeError when the shipped table is damaged."""
    table = (files("nanogpt") / "assets" / "gpt2.tiktoken").read_bytes()
    if (found := hashlib.sha256(table).hexdigest()) != RANKS_SHA256:
        raise RuntimeError(f"nanogpt/assets/gpt2.tiktoken is damaged (SHA-256 {found}); install the package again")
    lines = (line.split() for line in table.splitlines())
    # Not tiktoken.get_encoding("gpt2"): that downloads at first use and has no time-out.
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=PIECE_PATTERN,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens={"<|endoftext|>": VOCAB_SIZE - 1},
        explicit_n_vocab=VOCAB_SIZE,
    )


def encode(text: str) -> list[int]:
    """Token ids of text. "<|endoftext|>" in it is read as those thirteen characters, not as the special token."""
    return [token for part in _parts(text) for token in encoding().encode_ordinary(part)]


def _parts(text: str) -> Iterator[str]:
    """text, cut where its pieces end whatever else is in it: before the last white space of a run.

    There a piece ends in any case: no piece has white space after another character, and of a run that goes on with
    another character \\s+(?!\\S) leaves the last. At its own end a part has such a run without the last: \\s++$ is
    the same piece, and remembers nothing.
    """
    start = 0
    while cut := LAST_SPACE.search(text, start + PART):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def decode(ids: list[int]) -> str:
    """The text of token ids; bytes that are not UTF-8 by themselves become U+FFFD."""
    return encoding().decode(ids)


def stable_prefix(text: str) -> tuple[list[int], bytes]:
    """The tokens of text that stay whatever follows it, and the bytes after them whose tokens may yet change.

    >>> stable_prefix("Let us kill him, ")  # in the running text the last blank is part of " and"
    ([5756, 514, 1494, 683, 11], b' ')
    """
    *_, tail = _parts(text)
    before_last_piece, _ = _one_token_a_byte().encode_with_unstable(tail, disallowed_special=())
    pending = tail[len(bytes(before_last_piece).decode()) :]
    if space := LAST_SPACE.search(pending):  # tiktoken counts all white space before it to the last piece
        pending = pending[space.start() :]
    tokens = encode(text)
    tokens = tokens[: len(tokens) - len(encode(pending))]
    if text[-2:] in ("'l", "'v", "'r"):  # two pieces now, one when "'ll", "'ve" or "'re" is complete
        tokens.pop()
    return tokens, text.encode()[len(encoding().decode_bytes(tokens)) :]


@cache
def _one_token_a_byte() -> tiktoken.Encoding:
    """The same pieces without merges: with GPT-2's, tiktoken tries thousands of ways in which a last piece may end."""
    return tiktoken.Encoding(
        name="bytes",
        pat_str=PIECE_PATTERN,
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={},
        explicit_n_vocab=256,
    )
