"""What a user would take instead of ours: transformers' GPT-2 in a plain loop, or in transformers' Trainer.

train_on = plain_steps(gpt2(shape, device, seed=0), windows, batch_size=16, bf16=False)
loss = train_on(0)
"""

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from nanogpt.config.train_config import TrainConfig
from nanogpt.data.windows import Windows
from nanogpt.distributed.world import World
from nanogpt.optim.optimizer import BETAS
from nanogpt.optim.recipe import ADAMW
from nanogpt.plan.plan import make_plan
from parts.turns import Turns

ENDLESS = 2**31  # items: a hook, or the end of a worker's input, ends the Trainer before


def gpt2(shape: dict[str, int], device: torch.device, *, seed: int) -> GPT2LMHeadModel:
    """A new model without dropout, in training mode. shape: n_layer, n_head and n_embd."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)).train().to(device)


def gpt2_of(config: TrainConfig, world: World) -> GPT2LMHeadModel:
    """The same with the shape and the seed of config, on world's device."""
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    return gpt2(shape, world.device, seed=config.seed)


def loss_sum(model: GPT2LMHeadModel, idx: Tensor, targets: Tensor, *, bf16: bool) -> Tensor:
    """Summed cross-entropy of targets (B, T), nats."""
    with torch.autocast(idx.device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = model(idx).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def plain_steps(model: GPT2LMHeadModel, windows: Windows, *, batch_size: int, bf16: bool) -> Callable[[int], float]:
    """torch's AdamW as its introduction shows it -> train on a step's global batch -> its mean loss, nats/token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=ADAMW.base_learning_rate, betas=BETAS, weight_decay=0.0)

    def train_on(step: int) -> float:
        idx, targets = (part.to(model.device) for part in windows.take(windows.global_batch(step, batch_size)))
        loss = loss_sum(model, idx, targets, bf16=bf16) / targets.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return train_on


class Items(torch.utils.data.Dataset):
    """Windows as the Trainer wants them: it shifts the labels itself, so they are one longer."""

    def __init__(self, windows: Windows, batch_size: int) -> None:
        self._windows, self._batch_size = windows, batch_size

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, row = divmod(index, self._batch_size)
        idx, targets = self._windows.take(self._windows.global_batch(step, self._batch_size)[row : row + 1])
        window = torch.cat([idx[0], targets[0, -1:]])
        return {"input_ids": window, "labels": window}


class InOrder(Trainer):
    """The Trainer on its items one after the other: their order is the windows' own."""

    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(range(ENDLESS))


def train_in_trainer(
    model: GPT2LMHeadModel,
    windows: Windows,
    batch_size: int,
    *,
    before_step: Callable[[], None] = lambda: None,
    after_step: Callable[[], None] = lambda: None,
    after_loss: Callable[[int, float], bool] | None = None,
) -> None:
    """transformers' Trainer, fp32, with what slows it and changes nothing here turned off: saves, reports, bars.

    after_loss: hears of each step's number and loss, and says whether that was the last; None: losses are not logged.
    """

    class Hooks(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            before_step()

        def on_step_end(self, *_: object, **__: object) -> None:
            after_step()

        def on_log(self, _args: object, state: object, control: object, logs: dict[str, float], **__: object) -> None:
            if "loss" in logs:
                control.should_training_stop = after_loss(state.global_step, logs["loss"])

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory, per_device_train_batch_size=batch_size, max_steps=ENDLESS - 1,
            use_cpu=model.device.type == "cpu",
            learning_rate=ADAMW.base_learning_rate, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
            weight_decay=0.0, max_grad_norm=0.0,
            lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="steps" if after_loss else "no", logging_steps=1,
        )  # fmt: skip
        trainer = InOrder(model, arguments, train_dataset=Items(windows, batch_size), callbacks=[Hooks()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def train_plainly(config: TrainConfig, turns: Turns, *, bf16: bool = False) -> None:
    """transformers' GPT-2 and torch's AdamW as their introductions show them."""
    windows = make_plan(config, turns.world).dataset.windows
    turns.take(plain_steps(gpt2_of(config, turns.world), windows, batch_size=config.batch_size, bf16=bf16))


def train_by_trainer(config: TrainConfig, turns: Turns) -> None:
    """transformers' Trainer."""
    windows = make_plan(config, turns.world).dataset.windows
    model = gpt2_of(config, turns.world)
    train_in_trainer(model, windows, config.batch_size, before_step=turns.wait, after_step=turns.end_step)
