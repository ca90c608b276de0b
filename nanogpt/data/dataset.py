"""What a run memorised, found again.

ids, why_not = memorised_ids(run.config, run.report)
"""

from typing import Any

from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.data.corpus import read_corpus
from nanogpt.data.tokenizer import encode


def memorised_ids(config: TrainConfig, report: dict[str, Any]) -> tuple[list[int], str]:
    """The token ids that a run memorised and '', or none and why they cannot be had any more."""
    try:
        corpus = read_corpus(config.data)
    except ConfigError as error:
        return [], str(error)
    if corpus.sha256 != report.get("corpus_sha256"):
        return [], f"{config.data} has changed since the run"
    return encode(corpus.text)[: config.subset_tokens], ""
