"""The model: a GPT-2, which knows torch only."""

from nanogpt.model.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
