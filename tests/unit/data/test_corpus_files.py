"""A text of several files: which are read, in which order, how they are joined, and what is refused by its name."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
from itertools import islice

import pytest

from harness.runs import REPOSITORY, SHORT, TRAIN, flags, report
from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.data import corpus
from nanogpt.data.corpus import absolute_data, read_corpus
from nanogpt.data.dataset import load_text, memorised_dataset
from nanogpt.evaluate.verify import verify_run
from nanogpt.storage.run_dir import load_run
from nanogpt.utils.format import last_names

TEXT = REPOSITORY / "nanogpt" / "assets" / "coriolanus.txt"
WORDS = "To be, or not to be: that is the question. "


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def room(tmp_path, monkeypatch):
    """The working directory, with a directory of texts and a text beside it; the latter has a comma in its name."""
    texts = tmp_path / "texts"
    (texts / "sub.txt").mkdir(parents=True)
    (texts / "sub.txt" / "d.txt").write_text("not read")
    for name in (".hidden.txt", "notes.md", "c.TXT"):
        (texts / name).write_text("not read")
    for name in ("é", "a", "B", "a b", "_", "10", "9", "a\nb", "~"):
        (texts / f"{name}.txt").write_bytes(f"{name}: {WORDS}".encode())
    (tmp_path / "one, two.txt").write_text("naïve café\r\n")
    (tmp_path / "three.txt").write_text("\ufeffthree")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_directory_is_what_cat_prints(room):
    """Reference: cat and sha256sum of the shell's *.txt in the C locale; the text, its hash and those of its files."""
    script = 'LC_ALL=C; for f in texts/*.txt; do [ -d "$f" ] || set -- "$@" "$f"; done; cat "$@"'
    joined = subprocess.run(["bash", "-c", script], cwd=room, capture_output=True, check=True).stdout
    read = read_corpus("texts")
    assert read.text.encode() == joined
    assert read.sha256 == sha256(joined)
    names = ["10", "9", "B", "_", "a\nb", "a b", "a", "~", "é"]
    assert read.files == {f"{room}/texts/{name}.txt": sha256(f"{name}: {WORDS}".encode()) for name in names}
    assert list(read.files) == [f"{room}/texts/{name}.txt" for name in names]


def test_a_list_is_read_in_its_order(room):
    """Invariant: files, directories and the package's text in any mix; nothing is put between, a mark stays."""
    read = read_corpus("three.txt,texts/,builtin,texts/sub.txt/d.txt")
    parts = ["three.txt", "texts", "builtin", "texts/sub.txt/d.txt"]
    assert read.text == "".join(read_corpus(part).text for part in parts)
    assert read.text.startswith("\ufeffthree10: To be")
    assert read.sha256 == sha256(read.text.encode())
    assert list(read.files)[0::10] == [f"{room}/three.txt", "builtin"]
    assert read.files["builtin"] == sha256(TEXT.read_bytes())


def test_a_path_that_exists_is_one(room):
    """Invariant: a comma in the name of a file or directory separates nothing."""
    assert read_corpus("one, two.txt").text == "naïve café\r\n"
    assert absolute_data("one, two.txt") == f"{room}/one, two.txt"
    (room / "texts").rename(room / "a,b")
    assert len(read_corpus("a,b").files) == 9
    (room / "a,three.txt").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"^--data=a,three.txt: no such file \(a link that leads nowhere\)$"):
        read_corpus("a,three.txt")
    (room / "a,three.txt").unlink()
    with pytest.raises(ConfigError, match=r"^--data=a: no such file \(a comma separates paths\)$"):
        read_corpus("a,three.txt")
    for gone, named in ((f"{room}/a,b.txt", f"{room}/a,b.txt"), (f"{room}/a.txt,{room}/b.txt", f"{room}/a.txt")):
        with pytest.raises(ConfigError, match=rf"^--data={named}: no such file \(a comma separates paths\)$"):
            read_corpus(gone)


def test_a_run_has_its_paths_in_full(room, monkeypatch):
    """Invariant: what is stored names the same files from any directory, also below home; else it is refused."""
    monkeypatch.setenv("HOME", str(room))
    corpus, _, config = load_text(TrainConfig(data="~/three.txt,./texts,builtin"))
    assert config.data == f"{room}/three.txt,{room}/texts,builtin"
    assert absolute_data(config.data) == config.data
    assert absolute_data("builtin") == "builtin"
    assert last_names(f"{room}/three.txt,{room}/texts") == "three.txt, texts"
    assert last_names(f"{room}/one, two.txt") == "one, two.txt"
    monkeypatch.chdir("/")
    assert read_corpus(config.data) == corpus
    (room / "a,b").mkdir()
    (room / "a,b" / "x.txt").touch()
    monkeypatch.chdir(room / "a,b")
    with pytest.raises(ConfigError, match=r"a,b/x\.txt has a comma in its path: name one file or directory alone$"):
        absolute_data("x.txt,y.txt")


REFUSED = {
    "three.txt,,texts": "names nothing beside a comma: write PATH,PATH",
    "three.txt,": "names nothing beside a comma",
    "three.txt, texts": r"^--data= texts: no such file \(a comma separates paths\)",
    "~nobody-of-that-name/x,three.txt": "is no user's home directory here",
    "three.txt,~nobody-of-that-name/x": "--data=~nobody-of-that-name/x: no such file",
    "three.txt,texts/../three.txt": "has one file twice, as three.txt and texts/../three.txt: name it once",
    "texts,texts/a.txt": "has one file twice, as texts/a.txt and texts/a.txt",
    "builtin,builtin": "has one file twice, as builtin and builtin",
    "three.txt,hollow": r"--data=hollow: no file \*.txt in this directory \(directories in it are not searched\)$",
    "three.txt,x\0": "cannot be read: embedded null byte",
}


@pytest.mark.parametrize("data", REFUSED)
def test_what_names_no_text_is_refused(room, data):
    """Invariant: one line that quotes the part which is wrong, and what was looked for."""
    (room / "hollow").mkdir()
    (room / "hollow" / "text.md").write_text(WORDS)
    with pytest.raises(ConfigError, match=REFUSED[data]):
        read_corpus(data)


def odd_name(path):
    os.close(os.open(os.fsencode(path.parent) + b"/caf\xe9.txt", os.O_CREAT))


def endless(path):
    path.touch()
    os.truncate(path, corpus.LARGEST_BYTES + 1)


DAMAGE = {
    "UTF-16": (lambda path: path.write_text(WORDS, "utf-16"), "p.txt is UTF-16 text, .*iconv -f UTF-16 -t UTF-8$"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x")), "p.txt is compressed by gzip, .* gunzip$"),
    "PDF": (lambda path: path.write_bytes(b"%PDF-1.4"), "p.txt is a PDF document, .* pdftotext$"),
    "Latin-1": (lambda path: path.write_text("café", "latin1"), r"p.txt is not UTF-8 text \(byte 0xe9 at offset 3\)"),
    "empty": (lambda path: path.touch(), "p.txt is empty: name a file with text in it$"),
    "pipe": (os.mkfifo, "p.txt is not a regular file$"),
    "link": (lambda path: path.symlink_to("nowhere"), r"p.txt: no such file \(a link that leads nowhere\)$"),
    "loop": (lambda path: path.symlink_to("p.txt"), "p.txt' cannot be read: Too many levels of symbolic links$"),
    "again": (lambda path: path.symlink_to("a.txt"), "has one file twice, as texts/a.txt and texts/p.txt: name it"),
    "name": (odd_name, r"--data=texts: the name of 'caf\\udce9.txt' in it is not UTF-8: rename it$"),
    "large": (endless, "p.txt' cannot be read: p.txt is larger than 2,147,483,648 bytes$"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_no_text_is_named(room, kind):
    """Invariant: of a directory or a list the very file is named, with what one file would be refused for."""
    damage, message = DAMAGE[kind]
    damage(room / "texts" / "p.txt")
    for data in ("texts", "three.txt,texts"):
        with pytest.raises(ConfigError, match=message) as refused:
            read_corpus(data)
        assert str(refused.value).isprintable()
    if kind != "name":
        with pytest.raises(ConfigError, match=message):
            read_corpus("texts/a.txt,texts/p.txt")


def test_together_they_are_no_larger_than_one_file(room, monkeypatch):
    """Invariant: the limit is of the sum."""
    size = sum(path.stat().st_size for path in (room / "texts").glob("[!.]*.txt") if path.is_file())
    monkeypatch.setattr(corpus, "LARGEST_BYTES", size)
    assert read_corpus("texts").text
    with pytest.raises(ConfigError, match=f"is larger than {size:,} bytes: with three.txt, {size + 8:,}$"):
        read_corpus("texts,three.txt")


@pytest.fixture
def copy(finished, tmp_path):
    """The tiny run's directory, as if its text had been read from two files of a directory."""
    for name in ("run", "texts"):
        (tmp_path / name).mkdir()
    text = TEXT.read_bytes()
    parts = {str(tmp_path / "texts" / name): part for name, part in (("a.txt", text[:99]), ("b.txt", text[99:]))}
    for path, part in parts.items():
        with open(path, "wb") as file:
            file.write(part)
    shutil.copy(finished[0] / "model.safetensors", tmp_path / "run")
    for name in ("config.json", "report.json"):
        content = json.loads((finished[0] / name).read_text())
        (content["config"] if name == "config.json" else content)["data"] = str(tmp_path / "texts")
        if name == "config.json":
            assert content["text_files"] == {"builtin": content["corpus_sha256"]}
            content["text_files"] = {path: sha256(part) for path, part in parts.items()}
        (tmp_path / "run" / name).write_text(json.dumps(content))
    return tmp_path / "run"


def facts(run_dir):
    """The checks that come before anything is computed and find a difference: {name: (stated, found)}."""
    run = load_run(str(run_dir))
    checks = islice(verify_run(run, run_dir), 12)
    return {check.name: (check.stated, check.found) for check in checks if not check.fits}


def why(run_dir):
    """What recite and score say of a text that is not the run's."""
    run = load_run(str(run_dir))
    with pytest.raises(ConfigError) as refused:
        memorised_dataset(run.config, run.report.corpus_sha256, run.text_files)
    return str(refused.value)


def test_the_file_that_has_changed_is_named(copy):
    """Invariant: changed, gone or added, each with both hashes; nothing where the joined text is the same."""
    texts = copy.parent / "texts"
    a, b, c = (str(texts / name) for name in ("a.txt", "b.txt", "c.txt"))
    hashes, joined = load_run(str(copy)).text_files, report(copy)["corpus_sha256"]
    assert facts(copy) == {}
    (texts / "b.txt").rename(texts / "c.txt")
    assert facts(copy) == {}, "the text is the same"
    (texts / "c.txt").rename(texts / "b.txt")

    (texts / "c.txt").write_text("new")
    changed = read_corpus(str(texts)).sha256
    assert facts(copy) == {"corpus_sha256": (joined, changed), f"text_files[{c!r}]": (None, sha256(b"new"))}
    assert why(copy) == f"{c} has been added since the run"
    (texts / "b.txt").write_text("other")
    assert why(copy) == f"{b} has changed since the run (and 1 file more)"
    (texts / "c.txt").unlink()
    (texts / "a.txt").unlink()
    assert why(copy) == f"{a} has been removed since the run (and 1 file more)"
    assert facts(copy)[f"text_files[{a!r}]"] == (hashes[a], None)
    assert facts(copy)[f"text_files[{b!r}]"] == (hashes[b], sha256(b"other"))


def test_a_run_of_before_still_serves(copy):
    """Invariant: where config.json has no text_files the text as a whole is compared."""
    content = json.loads((copy / "config.json").read_text())
    del content["text_files"]
    (copy / "config.json").write_text(json.dumps(content))
    assert facts(copy) == {}
    texts = copy.parent / "texts"
    (texts / "b.txt").write_text("other")
    assert list(facts(copy)) == ["corpus_sha256"]
    assert why(copy) == f"{texts} has changed since the run"


def test_a_run_of_several_files(room, forked):
    """Invariant: config.json has their paths in full and their hashes; recite names what is gone, in one line."""
    assert forked(room, TRAIN, *flags(**SHORT, max_steps=2), "--data=three.txt,texts").returncode == 3
    stored = json.loads((room / "out" / "config.json").read_text())
    read = read_corpus("three.txt,texts")
    assert stored["config"]["data"] == report(room / "out")["data"] == f"{room}/three.txt,{room}/texts"
    assert (stored["text_files"], stored["corpus_sha256"]) == (read.files, read.sha256)
    (room / "texts" / "a\nb.txt").unlink()
    for what in ("texts/a\\nb.txt has been removed since the run", "texts: no such file (a comma separates paths)"):
        done = forked("/", "nanogpt", "recite", room / "out", "--prompt=To be", "--max_tokens=2")
        assert (done.returncode, done.stderr.count("\n")) == (0, 1), done
        assert done.stderr.endswith(f"{what}]\n")
        shutil.rmtree(room / "texts", ignore_errors=True)
    done = forked("/", "nanogpt", "verify", room / "out")
    assert done.returncode == 2
    assert done.stderr == f"error: --data={room}/texts: no such file (a comma separates paths)\n"
