"""Which tokens of a text stand verbatim in the memorised one, decided while the text is still being made.

seen = Verbatim(memorised)
for piece, stretch in seen.mark(pieces): ...     # bytes of a token, and in which stretch they are; 0: in none
summary(seen)
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from nanogpt.utils.format import counted, percent

# Tokens in a row that chance and idiom do not bring. Of the 2,048 tokens of Coriolanus that follow the first 2,048, 3%
# stand in these in stretches of 8, the name that heads a speech among them; none in stretches of 12.
SHORTEST = 12


class Verbatim:
    """Marks tokens that are verbatim: within `shortest` or more in a row whose bytes stand so in text.

    Bytes, because the same words may be cut into other tokens.
    """

    def __init__(self, text: bytes, shortest: int = SHORTEST) -> None:
        self.tokens = self.verbatim = 0  # how many were marked, and how many of them as verbatim
        self.longest = 0  # tokens of the longest stretch that stands in text, however short
        self._text, self._shortest = text, shortest

    def mark(self, pieces: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
        """Each piece, a token's bytes, with the number of its stretch, from 1 on; 0: it is not verbatim.

        The pieces of a stretch, one after another, stand in text. A piece waits while it may yet be verbatim, for
        fewer than `shortest` more.
        """
        latest: list[bytes] = []  # the last pieces, as many as stand together in text
        waiting = stretch = 0
        goes_on = False  # latest has grown only, since a piece of it was marked
        for piece in pieces:
            latest.append(piece)
            waiting += 1
            # What stands in text does so without its first piece: the least cut that helps is found by halving.
            cut = bisect_left(range(len(latest)), True, key=lambda i: b"".join(latest[i:]) in self._text)
            alone = latest[len(latest) - waiting : cut]
            latest = latest[cut:]
            waiting -= len(alone)
            goes_on = goes_on and not cut
            self.longest = max(self.longest, len(latest))
            yield from self._counted(alone, 0)
            if len(latest) >= self._shortest:
                stretch += not goes_on
                goes_on = True
                yield from self._counted(latest[len(latest) - waiting :], stretch)
                waiting = 0
        yield from self._counted(latest[len(latest) - waiting :], 0)

    def _counted(self, pieces: list[bytes], stretch: int) -> Iterator[tuple[bytes, int]]:
        self.tokens += len(pieces)
        self.verbatim += len(pieces) * bool(stretch)
        return ((piece, stretch) for piece in pieces)


def summary(*samples: Verbatim) -> str:
    """The share of verbatim tokens in samples and their longest stretch, in words."""
    tokens = sum(each.tokens for each in samples)
    share = percent(sum(each.verbatim for each in samples) / tokens)
    longest = counted(max(each.longest for each in samples), "token")
    return f"{share} of {counted(tokens, 'token')} verbatim, in stretches of {SHORTEST} or more; the longest: {longest}"
