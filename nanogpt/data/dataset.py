"""A text as a run sees it: what is memorised, what full passes read, what is never trained on.

dataset = make_dataset(corpus, ids, plan.config)
dataset.windows.global_batch(step=0, batch_size=16)
dataset.floor                                               # nats/token
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import DEFAULT_SUBSET_TOKENS, ResolvedConfig, TrainConfig
from nanogpt.data.corpus import Corpus, absolute_data, differing_files, read_corpus
from nanogpt.data.entropy_floor import Floors
from nanogpt.data.tokenizer import encode
from nanogpt.data.windows import JUDGED_GRIDS, Windows, control_windows, memorised_windows
from nanogpt.utils.format import counted


@dataclass(frozen=True)
class Dataset:
    """One text, cut as the options of a run ask."""

    corpus: Corpus
    ids: list[int]  # of the whole text
    windows: Windows  # of its beginning, which is memorised
    judged: Tensor  # starts of the windows that a full pass reads, (W,)
    control: Windows | None  # of what follows, which is not trained on; None: too little is left

    @cached_property
    def floors(self) -> Floors:
        """The entropy floors of what is memorised, on whatever windows."""
        return Floors(self.windows.ids.numpy())

    @cached_property
    def floor(self) -> float:
        """Nats per token that no model can get below on the windows inside the text, of all grids."""
        return self.floors.floor(self.windows.whole_starts().numpy(), self.windows.context_length)


def load_text(config: TrainConfig) -> tuple[Corpus, list[int], TrainConfig]:
    """The text that config names, its token ids, and config with what it leaves to the text filled in.

    That is data, subset_tokens and stride. Raises ConfigError where the text cannot be read or is too short.
    """
    corpus = read_corpus(config.data)
    ids = encode(corpus.text)
    if len(ids) <= config.context_length:
        raise ConfigError(
            f"--data={config.data} has {len(ids)} tokens, one window of --context_length={config.context_length} needs "
            f"{config.context_length + 1}: give more text or a shorter context"
        )
    if config.subset_tokens is not None and config.subset_tokens > len(ids):
        raise ConfigError(
            f"--subset_tokens={config.subset_tokens} is more than the {len(ids)} tokens of {config.data}: at most "
            f"{len(ids)}, or none for all of it"
        )
    config = replace(
        config,
        data=absolute_data(config.data),
        subset_tokens=config.subset_tokens or min(max(DEFAULT_SUBSET_TOKENS, config.context_length + 1), len(ids)),
        stride=config.stride or config.context_length,
    )
    return corpus, ids, config


def make_dataset(corpus: Corpus, ids: list[int], config: ResolvedConfig) -> Dataset:
    """corpus, whose whole text has the token ids, as a run with config sees it."""
    windows = memorised_windows(ids, config)
    return Dataset(corpus, ids, windows, windows.judged_starts(JUDGED_GRIDS), control_windows(ids, config))


def memorised_dataset(config: ResolvedConfig, corpus_sha256: str, files: Mapping[str, str]) -> Dataset:
    """What a run with config memorised, found again. Raises ConfigError where that cannot be.

    corpus_sha256: as its report has it. files: the SHA-256 of each, as its config.json has them, or empty.
    """
    corpus = read_corpus(config.data)
    if corpus.sha256 != corpus_sha256:
        path, *more = differing_files(files, corpus.files) or [config.data]
        how = "changed"
        if (path in files) != (path in corpus.files):
            how = "been removed" if path in files else "been added"
        others = f" (and {counted(len(more), 'file')} more)" if more else ""
        raise ConfigError(f"{path} has {how} since the run{others}")
    return make_dataset(corpus, encode(corpus.text), config)
