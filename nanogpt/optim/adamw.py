"""torch's optimizers without torch's compiler.

torch hides some of their methods from torch.compile, and to do so imports the compiler when one is first called: 2,000
modules, a second or more of every start. Nothing here compiles an optimizer, so the methods are taken as they are
beneath (torch 2.13's Optimizer.add_param_group and zero_grad, AdamW.step).
"""

from inspect import unwrap

import torch
from torch import optim


class Optimizer(optim.Optimizer):
    """The base of an optimizer of one's own."""

    add_param_group = unwrap(optim.Optimizer.add_param_group)
    zero_grad = unwrap(optim.Optimizer.zero_grad)


class AdamW(Optimizer, optim.AdamW):
    """torch.optim.AdamW."""

    step = torch.no_grad()(unwrap(optim.AdamW.step))
