"""Texts as a model might recite them, and what a parser that is not ours makes of the page that shows one."""

from html.parser import HTMLParser

import torch

from nanogpt.data.tokenizer import encode
from nanogpt.evaluate.recall import RecitedText

PROMPT = 8  # tokens, and as many in a hop
TITLE = ["100 tokens of <it> & {{text}}; target reached", "two"]
AWKWARD = (
    '<!DOCTYPE html> & <b>bold</b>, &amp;, &lt;, </script>, </main>, <!-- -->, {{data}}, "quotes", We know\'t.\n\n'
    "\tTabs  and   blanks   \r\nÜnïcödé — “curly” 日本語 עברית 🎭👩‍👩‍👧 é \0\x07 $x^2$ and\rso on.\n\nThe end 😀"
)


def recited(text, lose=0.3, seed=0):
    """text as a model might recite it that loses its way in a share of the hops, to what stands elsewhere in it."""
    ids, random = torch.tensor(encode(text)), torch.Generator().manual_seed(seed)
    said, predicted = ids.clone(), torch.rand(len(ids), generator=random) < 0.8
    said[:PROMPT], predicted[:PROMPT] = -1, False
    for start in range(PROMPT, len(ids), PROMPT):
        if torch.rand((), generator=random) < lose:
            at = start + int(torch.randint(PROMPT, (), generator=random))
            end = min(start + PROMPT, len(ids))
            said[at:end] = ids.roll(int(torch.randint(len(ids), (), generator=random)))[at:end]
    return RecitedText(ids, predicted, said, said == ids, torch.ones(len(ids)))


def long_text(lines=1500):
    """Lines that tell themselves apart."""
    return "".join(f"Line {number} is as long as most lines of a play.\n" for number in range(lines))


def pieces_of(data, text):
    """What a page's script reads, each hop with a loss: of every piece (first token, tokens, text, what was said)."""
    units = text.replace("\0", "␀").encode("utf-16-le")
    for token, character, lengths, counts, told in data["hops"]:
        hop = []
        for length, count, words in zip(lengths, counts, told, strict=True):
            piece = units[2 * character : 2 * (character + length)].decode("utf-16-le")
            hop.append((token, count, piece, words))
            token, character = token + count, character + length
        yield hop


class Page(HTMLParser):
    """What a parser that is not ours makes of a page: the runs of <main>, the JSON, tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.runs, self.blocks, self.json = [], [], [], 0, ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in ("meta", "input"):
            self.open.append((tag, dict(attributes)))
        if self.inside("main") and tag == "span":
            self.runs.append([dict(attributes)["class"], "", self.blocks])
        self.blocks += self.inside("main") and tag == "div"

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.inside("main"):
            assert self.inside("span")
            self.runs[-1][1] += data
        elif self.open and self.open[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.json += data

    def inside(self, tag):
        return tag in [name for name, _ in self.open]
