"""A model as transformers keeps it: a directory that its Auto classes load offline, and that a run can begin from.

write_hf(run.model, Path("exported"))
config = read_hf_shape(Path("exported"))
load_hf(GPT(config), Path("exported"))

The weights have the same names on both sides; transformers keeps four matrices of each block transposed (its Conv1D).
"""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import require_regular
from nanogpt.data.tokenizer import VOCAB_SIZE, encoding
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.storage.json_file import read_json, write_json
from nanogpt.storage.tensor_file import save_tensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
END_OF_TEXT = VOCAB_SIZE - 1
LAYER_NORM_EPSILON = 1e-5
UNFINISHED = ".unfinished"
DTYPES = ("F64", "F32", "F16", "BF16")  # of weights that are numbers as they stand; integers and F8 have scales beside


def write_hf(model: GPT, directory: Path) -> None:
    """The model with GPT-2's tokenizer into directory, which may be there but must not hold files.

    However it ends, directory holds a whole model, or UNFINISHED, and then the next call begins again, or nothing.
    Raises OSError or SafetensorError when there is no room, and ConfigError where files are in the way.
    """
    unfinished = directory / UNFINISHED
    if not unfinished.exists() and directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty: name another directory")
    begun_before = unfinished.exists()  # some of it may be in place already
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write_parts(model, unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        if begun_before:
            unfinished.mkdir()
        raise
    for name in sorted(os.listdir(unfinished), key=lambda name: name == CONFIG):  # it makes a model of the rest: last
        os.replace(unfinished / name, directory / name)
    unfinished.rmdir()


def _write_parts(model: GPT, directory: Path) -> None:
    save_tensors(
        {n: p.detach().t().contiguous() if n.endswith(CONV1D) else p.detach() for n, p in model.named_parameters()},
        directory / WEIGHTS,
    )
    shape, ends = model.config, {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    write_json(
        directory / CONFIG,
        ends
        | {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": shape.vocab_size,
            "n_positions": shape.block_size, "n_embd": shape.n_embd, "n_layer": shape.n_layer, "n_head": shape.n_head,
            "activation_function": "gelu_new", "layer_norm_epsilon": LAYER_NORM_EPSILON, "attn_pdrop": 0.0,
            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True, "dtype": "float32",
        },
    )  # fmt: skip
    write_json(directory / "generation_config.json", ends | {"do_sample": False})  # recall is greedy
    _write_tokenizer(directory, shape.block_size)


def read_hf_shape(directory: Path) -> GPTConfig:
    """The shape of the GPT-2 in directory, whose weights are there and fit; they are not read yet.

    Raises ConfigError where it is none, is damaged, or computes otherwise than ours.
    """
    stored = read_json(directory / CONFIG, of="a GPT-2 as transformers saves it")
    must_be = {
        "model_type": "gpt2", "vocab_size": VOCAB_SIZE, "activation_function": "gelu_new",
        "layer_norm_epsilon": LAYER_NORM_EPSILON, "tie_word_embeddings": True, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "n_inner": None, "add_cross_attention": False,
    }  # fmt: skip
    for name, wanted in must_be.items():
        if stored.get(name, wanted) != wanted:
            raise ConfigError(f"{directory / CONFIG} has {name} {stored[name]}, this program computes with {wanted}")
    try:
        shape = GPTConfig(
            block_size=int(stored["n_positions"]), n_layer=int(stored["n_layer"]), n_head=int(stored["n_head"]),
            n_embd=int(stored["n_embd"]),
        )  # fmt: skip
        weights = _Weights(directory)
        weights.require_layers(shape.n_layer)  # before a model is built of what config.json says
        with torch.device("meta"):
            model = GPT(shape)
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        raise ConfigError(f"{directory / CONFIG} does not say the model's shape: {error!r}") from None
    weights.check(model)
    return shape


def load_hf(model: GPT, directory: Path) -> None:
    """The weights in directory, of the shape that read_hf_shape told, into model."""
    weights = _Weights(directory)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))


class _Weights:
    """model.safetensors of a directory, under our names; GPT-2 was first published without the prefix."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / WEIGHTS
        try:
            require_regular(self._path)
            self._file = safe_open(self._path, framework="pt")
        except FileNotFoundError:
            raise ConfigError(f"{self._path}: no such file") from None
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self._path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        self._stored = {name.removeprefix("transformer."): name for name in self._file.keys()}  # noqa: SIM118

    def require_layers(self, count: int) -> None:
        """Raise ConfigError where there are not even as many weights."""
        if count > len(self._stored):
            raise ConfigError(f"{self._path} has no weight for most of the {count:,} layers of {CONFIG}")

    def check(self, model: GPT) -> None:
        """Raise ConfigError for the first parameter of model that is missing, or of another shape or kind."""
        for name, parameter in model.named_parameters():
            if (short := name.removeprefix("transformer.")) not in self._stored:
                raise ConfigError(f"{self._path} has no weight {short}")
            stored = self._file.get_slice(self._stored[short])
            if (dtype := stored.get_dtype()) not in DTYPES:
                raise ConfigError(
                    f"{self._path} has {short} in {dtype}, as if quantised: save it in {', '.join(DTYPES)}"
                )
            found = stored.get_shape()
            if found != list(parameter.t().shape if name.endswith(CONV1D) else parameter.shape):
                raise ConfigError(f"{self._path} has {short} of shape {tuple(found)}: of another model than {CONFIG}")

    def read(self, name: str) -> Tensor:
        """The parameter called name, laid out as ours."""
        tensor: Tensor = self._file.get_tensor(self._stored[name.removeprefix("transformer.")])
        return tensor.t() if name.endswith(CONV1D) else tensor


def _write_tokenizer(directory: Path, block_size: int) -> None:
    """vocab.json and merges.txt, the form in which GPT-2's tokenizer was published."""
    byte_characters = _byte_characters()
    spelled = {token: "".join(byte_characters[b] for b in token) for token in encoding().token_byte_values()}
    ranks = {token: encoding().encode_single_token(token) for token in spelled}
    by_rank = sorted(ranks, key=ranks.__getitem__)
    vocab = {spelled[token]: ranks[token] for token in by_rank} | {"<|endoftext|>": END_OF_TEXT}
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    merges = [" ".join(spelled[part] for part in _last_merge(token, ranks)) for token in by_rank if len(token) > 1]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False}
        | dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    )


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that byte-pair encoding joined to make token: merge its bytes with all pairs learned before it."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it is one, else the next character from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (chr(0x100 + i) for i in range(256))
    return [chr(b) if b in printable else next(others) for b in range(256)]
