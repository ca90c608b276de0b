"""What is marked as verbatim is so, all of it is marked, and soon."""

import random

from nanogpt.evaluate.verbatim import Verbatim, summary


def brute_force(pieces, text, shortest):
    """By definition: (which pieces are verbatim, the longest stretch)."""
    ranges = [(i, j) for i in range(len(pieces)) for j in range(i + 1, len(pieces) + 1)]
    known = [(i, j) for i, j in ranges if b"".join(pieces[i:j]) in text]
    marked = {at for i, j in known if j - i >= shortest for at in range(i, j)}
    return [at in marked for at in range(len(pieces))], max((j - i for i, j in known), default=0)


def test_the_marks_are_those_of_the_definition():
    """Reference: every stretch of the pieces, looked for in the text; pieces may be cut otherwise than the text."""
    chance, marks = random.Random(0), 0
    for _ in range(400):
        text = bytes(chance.choices(b"abc", k=40))
        pieces = []
        for _ in range(chance.randrange(6)):  # leaps about in the text
            at = chance.randrange(40)
            pieces += [text[i : i + 1 + i % 2] for i in range(at, at + chance.randrange(20), 1 + at % 2)]
        pieces = [piece for piece in pieces if piece]
        for shortest in (1, 3, 6):
            seen = Verbatim(text, shortest)
            parts = list(seen.mark(pieces))
            expected, longest = brute_force(pieces, text, shortest)
            assert [piece for piece, _ in parts] == pieces
            assert [stretch > 0 for _, stretch in parts] == expected
            assert (seen.tokens, seen.verbatim, seen.longest) == (len(pieces), sum(expected), longest)
            numbers = [stretch for _, stretch in parts if stretch]
            assert numbers == sorted(numbers)
            assert set(numbers) == set(range(1, max(numbers, default=0) + 1))
            for number in set(numbers):
                assert b"".join(piece for piece, stretch in parts if stretch == number) in text
            marks += len(set(numbers))
    assert marks > 1000


def test_a_piece_waits_for_a_few_only():
    """Invariant: what cannot be verbatim any more comes at once, what may be after `shortest` - 1 more at most.

    Within a stretch nothing waits.
    """
    asked, parts = 0, []

    def pieces():
        nonlocal asked
        for piece in (b"?", *(b"%d" % i for i in range(8)), b"!", b"2", b"3"):
            asked += 1
            yield piece

    for piece, stretch in Verbatim(b"012345678", 4).mark(pieces()):
        parts.append((piece.decode(), stretch > 0, asked))
    first = [("?", False, 1), *((str(i), True, max(5, i + 2)) for i in range(8))]
    assert parts == [*first, ("!", False, 10), ("2", False, 12), ("3", False, 12)]


def test_where_the_text_goes_on_elsewhere():
    """Reference: read by eye; a stretch ends where what follows it in the text is not what was said."""
    said = [b"a", b"b", b"c", b"h", b"i", b"j", b"k", b"x"]
    parts = [stretch for _, stretch in Verbatim(b"abcdefghijk", 3).mark(said)]
    assert parts == [1, 1, 1, 2, 2, 2, 2, 0]
    overlapping = [stretch for _, stretch in Verbatim(b"abcde..deab", 3).mark([b"%c" % c for c in b"abcdeab"])]
    assert overlapping == [1, 1, 1, 1, 1, 2, 2]


def test_without_a_text_nothing_is_marked():
    """Invariant: all comes at once and bare."""
    assert list(Verbatim(b"").mark([b"a", b"b"])) == [(b"a", 0), (b"b", 0)]


def test_the_summary():
    """Reference: counted by hand, of two samples together."""
    text, samples = b"abcdefghijklmnopqrstuvwxyz", []
    for said in (b"cdefghijklmnop.", b"......"):
        samples.append(Verbatim(text))
        assert len(list(samples[-1].mark([b"%c" % c for c in said]))) == len(said)
    expected = "93.3% of 15 tokens verbatim, in stretches of 12 or more; the longest: 14 tokens"
    assert summary(samples[0]) == expected
    assert summary(*samples).startswith("66.7% of 21 tokens verbatim")
