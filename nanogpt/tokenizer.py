"""The GPT-2 vocabulary, offline: a rank table shipped with the package, never a download.

>>> encode("hello world")
[31373, 995]
>>> decode([31373, 995])
'hello world'
"""

import base64
import hashlib
from functools import cache
from importlib.resources import files

import tiktoken

RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
VOCAB_SIZE = 50257

# GPT-2's pre-tokenisation: contractions, words, numbers and punctuation with their leading space, runs of white space.
# Possessive quantifiers keep the match linear. Byte pairs are merged within one such piece only.
PIECE_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


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
    return encoding().encode_ordinary(text)


def decode(ids: list[int]) -> str:
    """The text of token ids; bytes that are not UTF-8 by themselves become U+FFFD."""
    return encoding().decode(ids)


def stable_prefix(text: str) -> tuple[list[int], bytes]:
    """The tokens of text that stay whatever follows it, and the bytes after them whose tokens may yet change.

    >>> stable_prefix("Let us kill him, ")  # in the running text the last blank is part of " and"
    ([5756, 514, 1494, 683, 11], b' ')
    """
    tokens, _ = encoding().encode_with_unstable(text, allowed_special=set(), disallowed_special=())
    if text[-2:] in ("'l", "'v", "'r"):  # two pieces now, one when "'ll", "'ve" or "'re" is complete
        tokens.pop()
    return tokens, text.encode()[len(encoding().decode_bytes(tokens)) :]
