"""transformers loads what is exported, offline, and gives the same numbers; a run begins from such a directory."""

import json
import os
import shlex
import shutil
import sys
from itertools import islice
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.forks import forked, train
from harness.runs import TINY, TRAIN, flags, metrics, report, run, wait_for
from nanogpt.config.errors import ConfigError
from nanogpt.data.corpus import read_corpus
from nanogpt.data.tokenizer import encode
from nanogpt.data.windows import Windows
from nanogpt.evaluate.recite import generate
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.model.sampler import filter_logits
from nanogpt.storage.hf import UNFINISHED, load_hf, read_hf_shape, write_hf
from nanogpt.storage.run_dir import load_run

transformers = pytest.importorskip("transformers")
SHAPE = GPTConfig(block_size=48, n_layer=2, n_head=4, n_embd=64)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(a model with noise in every weight, the directory that it was exported to)."""
    torch.manual_seed(0)
    model = GPT(SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    directory = tmp_path_factory.mktemp("exported")
    write_hf(model, directory)
    return model, directory


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_transformers_gives_the_same_logits(exported, dtype):
    """Reference: AutoModelForCausalLM on the exported directory, fp32, to 1e-4."""
    model, directory = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=dtype).eval()
    idx = torch.randint(SHAPE.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(idx), theirs(idx).logits, atol=1e-4, rtol=0)


def test_transformers_has_the_same_tokens(exported):
    """Reference: our tokenizer on text with quotes, digits, blanks, line ends, accents, emoji and odd bytes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[1], local_files_only=True)
    text = "First Citizen:\n\nWe know't, we know't.  It's 1608;\tçà, 日本語 🙂   \n don't 'tis'll \x00\x7f\u00ad"
    assert tokenizer.encode(text, add_special_tokens=False) == encode(text)
    assert tokenizer.decode(encode(text), clean_up_tokenization_spaces=False) == text
    assert (len(tokenizer), tokenizer.eos_token_id) == (50257, 50256)


def test_transformers_samples_from_the_same_distribution(exported):
    """Reference: what its generate draws from, token by token, in 12 continuations: the same tokens, logits to 1e-4."""
    model, directory = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    prompt, setting = torch.tensor([[11, 22, 33]]), {"temperature": 0.8, "top_k": 30, "top_p": 0.9}
    torch.manual_seed(0)
    drawn = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, **setting, max_new_tokens=8, pad_token_id=50256,
        num_return_sequences=12, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert len(drawn.sequences.unique(dim=0)) == 12
    for row, said in enumerate(drawn.sequences[:, 3:]):
        ours, tokens = [], iter(said)

        def choose(logits, ours=ours, tokens=tokens):
            ours.append(filter_logits(logits, **setting)[0])
            return next(tokens)[None]

        assert list(islice(generate(model, [11, 22, 33], context_length=48, choose=choose), 8)) == said.tolist()
        torch.testing.assert_close(torch.stack(ours), torch.stack(drawn.scores)[:, row], atol=1e-4, rtol=0)


def test_what_is_exported_can_be_loaded(exported):
    """Invariant: bit for bit the same weights; a directory that transformers itself saved loads as well."""
    model, directory = exported
    again = GPT(read_hf_shape(directory))
    load_hf(again, directory)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    transformers.AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory / "theirs")
    again = GPT(read_hf_shape(directory / "theirs"))
    load_hf(again, directory / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.int8, "I8"), (torch.int64, "I64"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_weights_that_are_no_numbers_as_they_stand_are_refused(exported, tmp_path, dtype, stored):
    """Invariant: one quantised matrix among the others is a ConfigError that names it; half precision is read."""
    shutil.copytree(exported[1], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file(weights | {name: weights[name].to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"has h.1.mlp.c_fc.weight in {stored}, as if quantised"):
        read_hf_shape(tmp_path)
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, tmp_path / "model.safetensors")
    load_hf(GPT(read_hf_shape(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "config.json").unlink(), "no such file"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 100), "cannot be read"),
        (lambda d: (d / "model.safetensors").unlink(), "no such file"),
        (lambda d: _edit(d, n_embd=32), "another model"),
        (lambda d: _edit(d, n_head=5), "shape"),
        (lambda d: _edit(d, n_layer=3), "has no weight"),
        (lambda d: _edit(d, model_type="llama"), "model_type llama"),
        (lambda d: _edit(d, activation_function="relu"), "activation_function relu"),
        (lambda d: _edit(d, n_head="four"), "shape"),
        (lambda d: _edit(d, n_layer=10**9), "has no weight for most"),
        (lambda d: _edit(d, n_layer=1e300), "has no weight for most"),
        (lambda d: _edit(d, n_embd=2**31), "shape"),
        (lambda d: _edit(d, n_positions=2**62), "shape"),
        (lambda d: _edit(d, n_layer=10**9, n_embd=0), "has no weight for most"),
    ],
)
def test_what_does_not_fit_is_refused(exported, tmp_path, damage, said):
    """Invariant: one ConfigError that says what is wrong."""
    directory = tmp_path / "copy"
    shutil.copytree(exported[1], directory)
    damage(directory)
    with pytest.raises(ConfigError, match=said):
        read_hf_shape(directory)


def test_a_run_is_exported_and_gone_on_from(finished, tmp_path):
    """Reference: the run: transformers recites greedily what it does, and a run that begins there verifies at once."""
    run_dir, _ = finished
    done = forked(tmp_path, "nanogpt", "export", run_dir, "hf")
    assert done.returncode == 0, done.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True).eval()
    text = read_corpus("builtin").text
    prompt = tokenizer(text, return_tensors="pt").input_ids[:, :16]
    said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, pad_token_id=50256)[0, 16:]
    ours = list(islice(generate(load_run(str(run_dir)).model, prompt[0].tolist(), context_length=32), 16))
    assert said.tolist() == ours
    options = {name: value for name, value in TINY.items() if name not in ("n_layer", "n_head", "n_embd")}
    options |= {"learning_rate": 1e-9, "max_steps": 1}  # a step that changes nothing, and a spent budget's pass
    done = train(*flags(**options, init_from="hf", dtype="fp32", out_dir="again"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert report(tmp_path / "again")["loss"] == pytest.approx(report(run_dir)["loss"], rel=1e-5)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["config"]["n_embd"] == TINY["n_embd"]


def test_a_full_disk_leaves_no_half_export(finished, tmp_path):
    """Invariant: one line and status 2; with room again the same command writes everything."""
    export = ("nanogpt", "export", finished[0], "hf")
    limited = f"ulimit -f 1000; exec {shlex.join(map(str, (sys.executable, '-m', *export)))}"
    done = run("bash", "-c", limited, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "hf cannot be written" in done.stderr
    assert forked(tmp_path, *export).returncode == 0


def test_an_export_that_is_cut_short_is_none(exported, tmp_path, monkeypatch):
    """Invariant: a kill while it writes, or while it puts into place, leaves no model; the next export is whole."""
    model, directory = exported
    out = tmp_path / "hf"
    child = get_context("fork").Process(target=write_hf, args=(model, out))
    child.start()
    wait_for((out / UNFINISHED / "model.safetensors").exists, seconds=60)
    child.kill()
    child.join()
    assert [path.name for path in out.iterdir()] == [UNFINISHED]
    puts = []

    def interrupted(source, target):
        if target.parent == out:
            puts.append(target)
        if len(puts) == 3:
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("nanogpt.storage.hf.os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_hf(model, out)
    assert {path.name for path in out.iterdir()} == {UNFINISHED, *(path.name for path in puts[:2])}
    assert not (out / "config.json").exists()
    write_hf(model, out)
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert written == {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="not empty"):
        write_hf(model, out)


def test_a_run_begins_with_a_gpt2_of_another_size(tmp_path):
    """Reference: transformers' own loss on the first batch, of a model that it made and saved, to 1e-4."""
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_head": 3, "n_embd": 48, "n_positions": 40}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    options = {"subset_tokens": 256, "context_length": 32, "dtype": "fp32", "max_steps": 1, "log_every": 1}
    done = train(*flags(**options, init_from="gpt2", out_dir="run"), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert [config[name] for name in ("n_layer", "n_head", "n_embd", "block_size")] == list(shape.values())
    windows = Windows(
        torch.tensor(encode(read_corpus("builtin").text)[:256]), context_length=32, stride=32, phase="random", seed=0
    )
    idx, targets = windows.take(windows.global_batch(0, 16))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten()).item()
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(loss, abs=1e-4)


def test_what_cannot_be_done_is_refused(finished, exported, tmp_path, forked):
    """Invariant: one line, exit status 2, nothing left behind."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for words in (["export", finished[0], "full"], ["export", tmp_path, "new"], ["export", finished[0]]):
        done = forked(tmp_path, "nanogpt", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    for words in ([f"--init_from={exported[1]}", "--n_layer=3"], ["--init_from=nowhere"]):
        done = forked(tmp_path, TRAIN, *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def _edit(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
