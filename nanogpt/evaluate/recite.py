"""Recitation: what the model says by itself, greedily or drawn, past its context length, with a KV cache.

b"".join(islice(continue_text(model, "Let us kill him, ", context_length=64), 20))
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from nanogpt.config.errors import ConfigError
from nanogpt.data.dataset import memorised_dataset
from nanogpt.data.tokenizer import encoding, stable_prefix
from nanogpt.model.generate import Decoder, hop_length
from nanogpt.model.gpt import GPT
from nanogpt.storage.run_dir import Run
from nanogpt.utils.format import counted


def prompt_and_text(run: Run, prompt: str | None) -> tuple[str, bytes, str]:
    """(prompt, the memorised text, ""), or (prompt, b"", why the text cannot be had).

    For None the prompt is the text's beginning, half a context of it. Raises ConfigError where that cannot be had.
    """
    try:
        ids = memorised_dataset(run.config, run.report.corpus_sha256, run.text_files).windows.ids.tolist()
    except ConfigError as error:
        if prompt is None:
            raise ConfigError(f"--prompt is needed: {error}") from None
        return prompt, b"", str(error)
    if prompt is None:
        first = encoding().decode_bytes(ids[: hop_length(run.config.context_length)])
        prompt = first.decode(errors="ignore")  # without the part of a last character
    return prompt, encoding().decode_bytes(ids), ""


def verdict(prompt: bytes, said: bytes, text: bytes, *, goes_round: bool) -> str:
    """How what was said after prompt compares with the memorised text, in one line.

    Where the prompt stands several times in text, the place that said agrees with longest counts. goes_round: after the
    text's end its beginning is expected, as training has it there; else nothing is.
    """
    places = [at + len(prompt) for at in range(len(text)) if text.startswith(prompt, at)]
    if not places:
        return "[the memorised text does not hold this prompt]"
    rounds = text * (2 + len(said) // len(text)) if goes_round else text
    same, place = max((_common_prefix(said, rounds[place:]), -place) for place in places)
    left = len(text) + place  # bytes up to the end of the text

    def alike(start: int, end: int) -> str:
        return counted(len(said[start:end].decode(errors="ignore")), "character")  # without the part of a last one

    if same == len(said) <= left:
        return f"[word for word as in the memorised text: {alike(0, same)}]"
    found = (
        f"as in the memorised text for {alike(0, min(same, left))}" if left else "the prompt ends the memorised text"
    )
    if same >= left:
        found += ", to its end" * bool(left) + f"; word for word from its beginning for {alike(left, same)}" * (
            same > left
        )
    if same < len(said):
        truth = rounds[-place:][:left] if same < left else rounds[-place:]
        wrong, right = (x[same : same + 40].decode(errors="replace") for x in (said, truth))
        found += f"; then the model says {wrong!r}"
        found += f", the text{' begins' * (same == left)} {right!r}" if right else ""
    return f"[{found}]"


def _common_prefix(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def likeliest(logits: Tensor) -> Tensor:
    """The greedy choice, (B, V) -> (B,)."""
    return logits.argmax(dim=-1)


def generate(
    model: GPT,
    prompt: list[int],
    *,
    context_length: int,
    pending: bytes = b"",
    choose: Callable[[Tensor], Tensor] = likeliest,
) -> Iterator[int]:
    """Continuation of the token ids in prompt, without end, one id at a time, with a KV cache.

    Past context_length it hops, as Decoder says. The first ids spell `pending`, the bytes of a prompt whose tokens
    depend on what follows. choose: logits (1, V) -> the token (1,). Raises ValueError for an empty prompt.
    """
    device = model.lm_head.weight.device
    decoder = Decoder(model, torch.tensor([prompt], device=device, dtype=torch.long), context_length=context_length)
    while True:
        logits = decoder.logits()  # (1, V)
        if pending:
            logits = logits.masked_fill(~_can_spell(pending).to(device), float("-inf"))
        token = choose(logits)
        decoder.append(token)
        pending = pending[len(encoding().decode_single_token_bytes(int(token))) :] if pending else b""
        yield int(token)


def locate(ids: list[int], words: str) -> tuple[int, int] | None:
    """(start, end): the tokens ids[start:end] hold the first place after the first token where words stand, if any."""
    pieces = encoding().decode_tokens_bytes(ids)
    at = b"".join(pieces).find(words.encode(), len(pieces[0]))
    if at < 0:
        return None
    ends = list(accumulate(map(len, pieces)))  # after each token, in bytes
    return bisect_right(ends, at), bisect_left(ends, at + len(words.encode())) + 1


def shortest_prompt(model: GPT, ids: list[int], start: int, end: int, *, context_length: int) -> int | None:
    """How few of the tokens before ids[start:end] bring these back greedily, all of them; at most a context is tried.

    None where no prompt does.
    """
    for count in range(1, min(start, context_length) + 1):
        said = generate(model, ids[start - count : start], context_length=context_length)
        if all(a == b for a, b in zip(ids[start:end], said, strict=False)):  # leaves at the first that differs
            return count
    return None


def continue_text(
    model: GPT, prompt: str, *, context_length: int, choose: Callable[[Tensor], Tensor] = likeliest
) -> Iterator[bytes]:
    """The UTF-8 bytes that follow prompt, without end, a token at a time, as choose has it of their logits (1, V).

    The prompt's last token is healed: "Let us kill him, " ends in a blank that the text had inside " and", a token
    boundary that the model never saw. So the prompt gives way to its stable tokens, and the first tokens of the answer
    must spell the rest of it. Raises ValueError for an empty prompt.
    """
    tokens, pending = stable_prefix(prompt)
    if not tokens:  # nothing stable to stand on: the prompt is one piece
        tokens, pending = encoding().encode_ordinary(prompt), b""
    healed = 0
    for token in generate(model, tokens, context_length=context_length, pending=pending, choose=choose):
        piece = encoding().decode_single_token_bytes(token)
        repeated = min(len(piece), len(pending) - healed)  # what the reader has typed is not said again
        healed += repeated
        yield piece[repeated:]


def _can_spell(pending: bytes) -> Tensor:
    """(V,) bool: the tokens that begin with pending or are themselves a beginning of it."""
    spellings, tokens = _by_spelling()
    fits = torch.zeros(encoding().n_vocab, dtype=torch.bool)
    at = bisect_left(spellings, pending)
    while at < len(spellings) and spellings[at].startswith(pending):
        fits[tokens[at]] = True
        at += 1
    for length in range(1, min(len(pending), max(map(len, spellings))) + 1):
        at = bisect_left(spellings, pending[:length])
        if spellings[at : at + 1] == [pending[:length]]:
            fits[tokens[at]] = True
    return fits


@cache
def _by_spelling() -> tuple[list[bytes], list[int]]:
    """The tokens' bytes in order, and the tokens; without the last, <|endoftext|>, which spells nothing."""
    spellings = encoding().token_byte_values()
    return spellings, [encoding().encode_single_token(spelling) for spelling in spellings]
