"""A signature of acceptance.json, made and checked by ssh-keygen: who signed these bytes, not that a cluster was there.

sign(Path("acceptance/acceptance.json"), Path("~/.ssh/id_ed25519").expanduser())     # acceptance.json.sig beside it
"""

import shutil
import subprocess
from pathlib import Path

from nanogpt.config.errors import ConfigError, RunError
from nanogpt.config.files import user_path

NAMESPACE = "nanogpt-acceptance"  # a signature of another purpose is none of this
TIMEOUT_S = 30.0


def find_key(given: str) -> Path:
    """The private key that --sign names. Raises ConfigError where it, or ssh-keygen, is not there."""
    path = user_path(given, f"--sign={given}")
    if not path.is_file():
        raise ConfigError(f"--sign={given}: no such file")
    if shutil.which("ssh-keygen") is None:
        raise ConfigError("--sign needs ssh-keygen, of OpenSSH: install it, or leave --sign out")
    done = _keygen("-y", "-P", "", "-f", str(path))
    if done.returncode:
        raise ConfigError(f"--sign={given} is no private key without a passphrase ({_line(done)})")
    return path


def sign(file: Path, key: Path) -> None:
    """Write the signature of file beside it, as FILE.sig. Raises RunError."""
    done = _keygen("-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(file))
    if done.returncode:
        raise RunError(f"{file} could not be signed: {_line(done)}")


def checked_signature(file: Path, signature: Path) -> tuple[bool, str]:
    """(whether signature is one of file, what ssh-keygen says of it, with the key)."""
    if shutil.which("ssh-keygen") is None:
        raise ConfigError(f"{signature} cannot be checked: ssh-keygen, of OpenSSH, is not installed")
    with file.open("rb") as content:
        done = _keygen("-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(signature), stdin=content.fileno())
    return done.returncode == 0, _line(done)


def _keygen(*words: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ssh-keygen", *words], stdin=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )  # fmt: skip


def _line(done: subprocess.CompletedProcess[str]) -> str:
    """What it said first."""
    return next(iter((done.stderr + done.stdout).strip().splitlines()), f"status {done.returncode}")
