"""A model that says the last token once more, and texts of which it therefore knows some windows and not others.

It is a real GPT whose blocks add nothing: what it says, and how sure it is of it, needs no training.
"""

import torch

from harness.runs import ALONE
from nanogpt.config.train_config import TrainConfig
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.plan.plan import make_plan

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 8}
TOKENS = 60  # that are memorised; as many follow
OPTIONS = SHAPE | {
    "subset_tokens": TOKENS, "context_length": 8, "stride": 2, "phase": "fixed", "batch_size": 8, "dtype": "fp32",
}  # fmt: skip


def plan_of(directory, *, odd=(), **options):
    """The plan of a run on a text " a a a ...", in which the tokens at `odd` are " b"."""
    text = directory / "text.txt"
    text.write_text("".join(" b" if at in odd else " a" for at in range(2 * TOKENS)))
    return make_plan(TrainConfig(data=str(text), out_dir=str(directory / "out"), **OPTIONS | options), ALONE)


def copier(sure=20.0):
    """A GPT whose next token is the last one: its logit beats the best other by 2 to 5 times sure."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "c_proj" in name or "wpe" in name:
                values.zero_()
        model.transformer.ln_f.weight.fill_(sure)
    return model
