"""GPT-2 in plain PyTorch: knows torch and nothing of ranks, logging or optimizers.

    >>> model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32))
    >>> idx = torch.randint(50257, (1, 8))
    >>> model(idx).shape
    torch.Size([1, 8, 50257])

Shapes in the comments: B sequences, T positions, C = n_embd, nh heads of hs = C / nh channels, V vocabulary.
Architecture: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROWS = 64  # a multiple that suits a GPU's matrix kernels
CHUNK = 2**21  # logits whose loss is computed at once: they stay in a CPU's caches


class ModelOptions(Protocol):
    """Whatever says how large a GPT shall be, such as a TrainConfig."""

    @property
    def block_size(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_embd(self) -> int: ...


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults have 152,791,296 parameters."""

    block_size: int = 1024  # longest sequence that the learned positions reach
    vocab_size: int = 50257  # GPT-2's 50,000 merges, 256 bytes and <|endoftext|>
    n_layer: int = 16
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # memorising wants none

    @classmethod
    def from_options(cls, options: ModelOptions) -> "GPTConfig":
        """The shape that options with these four names ask for."""
        return cls(block_size=options.block_size, n_layer=options.n_layer, n_head=options.n_head, n_embd=options.n_embd)

    @property
    def block_matrices(self) -> int:
        """Parameters of the matrices of one block."""
        return 12 * self.n_embd**2  # c_attn 3, attention's c_proj 1, c_fc 4, the MLP's c_proj 4

    @property
    def num_parameters(self) -> int:
        """What GPT.num_parameters counts, before there is a model."""
        block = self.block_matrices + 13 * self.n_embd  # the matrices' biases 9, two norms 4
        return (self.vocab_size + self.block_size + 2) * self.n_embd + self.n_layer * block


class KVCache:
    """Keys and values of the positions that a model has already read, for decoding one token at a time.

    Room for `batch` sequences of `length` tokens, in the dtype that the attention computes in.
    """

    def __init__(self, config: GPTConfig, batch: int, length: int, *, device: torch.device, dtype: torch.dtype) -> None:
        if not 0 < length <= config.block_size:
            raise ValueError(f"a cache holds 1 to block_size ({config.block_size}) positions, not {length}")
        shape = (config.n_layer, batch, config.n_head, length, config.n_embd // config.n_head)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (n_layer, B, nh, length, hs)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.used = 0  # positions filled so far, the same in every layer

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, nh, T, hs) for one layer -> everything seen so far, (B, nh, used + T, hs)."""
        end = self.used + k.size(2)
        self.keys[layer, :, :, self.used : end] = k
        self.values[layer, :, :, self.used : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.layer = layer  # which slice of a KVCache is this layer's

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C); each position sees itself and those before it, with a cache the cached ones too."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = self._attend(q, k, v)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T, S = q.size(2), k.size(2)  # S > T when a cache holds earlier positions
        if T == S and len(q) and (T > 512 or q.device.type != "cpu"):  # the fused kernels want at least one row
            p = self.attn_dropout.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        # Short windows on a CPU: the fused kernel's backward costs more than it saves (benchmarks/LOG.md).
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # row i sees columns up to S - T + i
        att = (q @ k.transpose(-2, -1)) / sqrt(q.size(-1))  # (B, nh, T, S)
        att = att.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        y: Tensor = self.attn_dropout(att).to(v.dtype) @ v
        return y


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(x))))
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class LMHead(nn.Linear):
    """The output layer, (..., C) -> (..., V); on a GPU with as many rows as its matrix kernels like, then cut."""

    training_product: Callable[[Tensor, Tensor], Tensor] | None = None  # of x and weight while it trains, not F.linear

    def forward(self, x: Tensor) -> Tensor:
        product = self.training_product if self.training else None
        if x.device.type != "cuda" and product is None:
            return super().forward(x)
        # Rows of 50,257 logits begin at odd addresses, which keeps the fast kernels away (benchmarks/LOG.md).
        padded = F.pad(self.weight, (0, 0, 0, -self.out_features % ROWS))
        return (product or F.linear)(x, padded)[..., : self.out_features]


class TokenCrossEntropy(torch.autograd.Function):
    """Logits (N, V) and targets (N,) -> their cross-entropies, nats, (N,), in fp32.

    Where a gradient is wanted it is made at once and written over the logits, some rows at a time: nothing else of
    their size is ever there. Torch's own holds three, in fp32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.detach()  # the layer that made them does not need them again
        losses = torch.empty(len(logits), device=logits.device)
        rows = max(1, CHUNK // logits.size(1))
        for part, wanted, loss in zip(*(each.split(rows) for each in (logits, targets[:, None], losses)), strict=True):
            log_p = part.log_softmax(dim=-1, dtype=torch.float32)
            torch.neg(log_p.gather(-1, wanted)[:, 0], out=loss)
            if ctx.needs_input_grad[0]:
                part.copy_(log_p.exp_().scatter_add_(-1, wanted, torch.full_like(log_p[:, :1], -1)))
        ctx.gradient = logits
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("backward a second time: the gradient was written over the logits, and scaled there")
        # Of a sum it is one number, by which a bf16 gradient is scaled without a copy of all of it in fp32.
        return gradient.mul_(scale[0] if scale.stride() == (0,) else scale[:, None]), None


class Transformer(nn.Module):
    """The layers of a GPT below its output layer; GPT.forward goes through them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)


class GPT(nn.Module):
    """A GPT-2 language model whose output layer shares the token embedding's weights."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd ({config.n_embd}) must be a multiple of n_head ({config.n_head})")
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = LMHead(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self._init_weights()

    def _init_weights(self) -> None:
        """GPT-2's initialisation where a branch writes to the residual stream, a louder one where tokens enter it.

        With GPT-2's 0.02 everywhere the loss stands for 100 steps at the entropy of single tokens. Louder tokens,
        quieter positions and layers that keep their input's variance leave that plateau 60 steps sooner
        (docs/explanation/memorising.md).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):
                # Each of the 2 n_layer residual branches adds variance: GPT-2 scales them, so that the sum stays.
                nn.init.normal_(parameter, std=0.02 / sqrt(2 * self.config.n_layer))
            elif name.endswith(("c_attn.weight", "c_fc.weight")):
                nn.init.normal_(parameter, std=1 / sqrt(self.config.n_embd))
        nn.init.normal_(self.transformer.wte.weight, std=0.06)
        nn.init.normal_(self.transformer.wpe.weight, std=0.01)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        """Token ids idx (B, T) -> logits (B, T, V), or with targets (B, T) the *sum* of their cross-entropies, in nats.

        The sum, not the mean: batches of different sizes then add up to one honest token-weighted mean. With
        reduction="none" each of them, (B, T). With a cache, idx continues the positions that it already holds. Raises
        ValueError past block_size.
        """
        start = 0 if cache is None else cache.used
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"position {end} is past block_size ({self.config.block_size})")
        pos = torch.arange(start, end, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.used = end
        logits: Tensor = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits
        rows, wanted = logits.flatten(0, 1), targets.flatten()
        # Compiled it is fused; alone on a GPU the chunks have not been measured.
        losses: Tensor = (
            F.cross_entropy(rows.float(), wanted, reduction="none")
            if rows.device.type != "cpu" or torch.compiler.is_compiling()
            else TokenCrossEntropy.apply(rows, wanted)  # type: ignore[no-untyped-call]  # torch's
        )
        return losses.sum() if reduction == "sum" else losses.view_as(targets)

    def num_parameters(self) -> int:
        """Number of trained values; the weight that wte and lm_head share counts once."""
        return sum(p.numel() for p in self.parameters())


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Evaluation mode without gradients inside, the mode that it was in after."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def flops_per_token(config: GPTConfig, *, context_length: int) -> int:
    """Floating-point operations that one trained token costs, forward and backward; a multiply-add counts as two.

    6 for each weight that takes part in a matrix product (the token embedding as output layer, positions not), and
    12 n_layer n_embd context_length for attention's two products, as in Chowdhery et al., "PaLM" (2022), appendix B.
    Attention is counted as if none of it were masked; recomputation, norms and the optimizer are not counted.
    """
    weights = config.n_layer * config.block_matrices + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * context_length
