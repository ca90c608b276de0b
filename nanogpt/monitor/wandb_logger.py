"""Weights & Biases as a mirror of metrics.jsonl, in a thread of its own: it can neither delay a run nor end it.

logger = open_wandb(config, out_dir, run_id="3f1c09aa", say=console.say)

What is logged is queued; the thread imports wandb, connects and sends. When anything there fails there is one warning,
and the run goes on without. WANDB_* variables keep their meaning where no option says otherwise.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from http.client import HTTPException
from pathlib import Path
from queue import SimpleQueue
from ssl import SSLError
from threading import Thread
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from nanogpt.config.errors import ConfigError, one_line
from nanogpt.config.train_config import TrainConfig
from nanogpt.monitor.loggers import Logger, NullLogger, Recitation, Row
from nanogpt.storage.json_file import finite
from nanogpt.storage.provenance import RunInfo
from nanogpt.storage.report import Report
from nanogpt.storage.run_dir import CONFIG, MEMORY_PNG, RECALL_PNG, WEIGHTS
from nanogpt.utils.format import counted

PROJECT = "nanogpt-overfit"
PICTURES = ("loss.png", RECALL_PNG, MEMORY_PNG)  # of the run directory
CONNECT_S = 15.0  # in which the server must answer, to which W&B adds some 10 s; the run trains meanwhile
FINISH_S = 45.0  # that the run waits at its end, for the connection too if it was so short
LEAVE_S = 8.0  # that it waits when it was asked to stop: torchrun kills 30 s after the signal, and the save is to fit
AXES = {"step": "trainer/step", "tokens": "trainer/tokens", "wall_s": "trainer/wall_s"}
SECTIONS = {
    "train": ("loss", "lr", "grad_norm"),
    "eta": ("eta_s", "eta_low_s", "eta_high_s"),
    "eval": ("full_pass_loss", "full_pass_recall"),
}


def check_wandb(config: TrainConfig) -> None:
    """Refuse what W&B would refuse, and --wandb=online where it cannot be, before the run leaves a trace.

    Raises ConfigError.
    """
    if _mode(config) == "disabled":
        return
    options = _settings_of(config)
    variables = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    if config.wandb != "online" and not options and not variables:
        return  # importing it takes a second
    try:
        import wandb

        settings = wandb.Settings()
    except Exception as error:  # none installed, a broken one, a directory of that name: they have no common base
        if config.wandb == "online":
            raise ConfigError(
                f"--wandb=online needs W&B, which cannot be imported ({one_line(error)}): pip install "
                f"wandb, or --wandb=disabled"
            ) from None
        return  # the thread will say so, and the run goes on without
    for name, value in variables.items():
        with _refusing(wandb, name):
            settings.update_from_env_vars({name: value})
    for name, value in options.items():
        with _refusing(wandb, f"--wandb_{name.removeprefix('run_')}"):
            settings.update_from_dict({name: value})
    with _refusing(wandb, "WANDB_FORK_FROM and WANDB_RESUME_FROM of a run that may be resumed"):
        settings.update_from_dict({"resume": "allow"})
    if config.wandb == "online":
        _require_key(wandb)


@contextmanager
def _refusing(wandb: Any, what: str) -> Iterator[None]:
    """Raise ConfigError for what W&B does not take."""
    try:
        yield
    except (ValueError, TypeError, wandb.Error) as error:
        raise ConfigError(f"W&B rejects {what}: {one_line(error)}") from None


def _require_key(wandb: Any) -> None:
    wandb.setup(settings=wandb.Settings(silent=True, mode="online"))  # whatever WANDB_MODE says
    try:
        if not _has_key(wandb):
            raise ConfigError("--wandb=online needs a key: `wandb login`, WANDB_API_KEY, or --wandb=offline")
    except wandb.errors.AuthenticationError as error:
        raise ConfigError(
            f"--wandb=online needs another key ({one_line(error)}): `wandb login`, or --wandb=offline"
        ) from None
    except (wandb.Error, OSError, HTTPException):
        pass  # a server that cannot be reached is no mistake: the run goes on offline


def _mode(config: TrainConfig) -> str:
    return os.environ.get("WANDB_MODE", "auto") if config.wandb == "auto" else config.wandb


def _settings_of(config: TrainConfig) -> dict[str, Any]:
    """What the options say, under W&B's names."""
    asked = {
        "project": config.wandb_project, "run_name": config.wandb_name, "run_group": config.wandb_group,
        "run_notes": config.wandb_notes, "run_tags": config.wandb_tags.split(",") if config.wandb_tags else None,
    }  # fmt: skip
    return {name: value for name, value in asked.items() if value is not None}


def open_wandb(config: TrainConfig, out_dir: Path, run_id: str, say: Callable[[str], None]) -> Logger:
    """The mirror that config asks for, or none. say: how to tell a person where it is, or what failed."""
    mode = _mode(config)
    if mode == "disabled":
        return NullLogger()
    return WandbLogger(config, out_dir, run_id, mode, say)


class WandbLogger(Logger):
    """One W&B run, over all attempts."""

    def __init__(self, config: TrainConfig, out_dir: Path, run_id: str, mode: str, say: Callable[[str], None]) -> None:
        self._config, self._out_dir, self._run_id, self._mode, self._say = config, out_dir, run_id, mode, say
        self._jobs: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()
        self._exit_code = 1  # unless a result says otherwise
        self._patience_s = FINISH_S
        self._place = f"{out_dir}/wandb"
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def row(self, row: Row) -> None:
        content = finite(asdict(row))
        shares = {f"time_share/{phase}": share for phase, share in content.pop("time_share").items()}
        figures = {_key(name): value for name, value in content.items()} | shares
        figures = {name: value for name, value in figures.items() if value is not None}
        self._jobs.put(lambda run: run.log(figures))

    def say(self, text: str) -> None:
        pass

    def result(self, report: Report, recitation: Recitation | None) -> None:
        reason = report.exit_reason
        self._exit_code = 0 if reason in ("target_reached", "max_steps", "max_minutes") else 1
        if reason == "stopped":
            self._patience_s = LEAVE_S

        def job(run: Any) -> None:
            import wandb

            run.summary.update(report.to_json())
            pictures: dict[str, Any] = {
                path.stem: wandb.Image(str(path)) for n in PICTURES if (path := self._out_dir / n).exists()
            }
            if recitation:
                said = asdict(recitation)
                pictures["recitation"] = wandb.Table(columns=[*said], data=[[*said.values()]])
            if pictures:
                run.log(pictures)
            if self._config.wandb_artifact == "true" and (self._out_dir / WEIGHTS).exists():
                artifact = wandb.Artifact(f"weights-{self._run_id}", type="model", metadata=report.to_json())
                artifact.add_file(str(self._out_dir / WEIGHTS))
                run.log_artifact(artifact)
            if reason == "target_reached":
                run.alert("Target reached", f"full-pass loss {report.loss:.4f} after {counted(report.steps, 'step')}")
            elif reason == "stopped":
                run.mark_preempting()
            elif reason == "non_finite":
                run.alert("Run failed", "too many non-finite steps in a row", level="ERROR")

        self._jobs.put(job)

    def died(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):  # a person who will not wait
            self._patience_s = 0.0
            return
        text = f"{type(error).__name__}: {error}"

        def job(run: Any) -> None:

            run.alert("Run died", text, level="ERROR")

        self._jobs.put(job)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(self._patience_s)
        if self._thread.is_alive():
            self._say(f"warning: W&B has not received everything yet; `wandb sync` sends what is in {self._place}")

    def _work(self) -> None:
        """In the thread: connect, then one job after the other until None comes or something fails."""
        try:
            import wandb

            run = self._connect(wandb)
            while job := self._jobs.get():
                job(run)
            run.finish(exit_code=self._exit_code)
        except Exception as error:  # whatever it is, the run is worth more
            self._say(
                f"warning: W&B is off from here on ({one_line(error)}); {self._out_dir}/metrics.jsonl has every row"
            )
            with suppress(Exception):
                wandb.teardown(exit_code=1)

    def _connect(self, wandb: Any) -> Any:
        mode = "offline" if self._mode in ("offline", "dryrun") else "online"
        wandb.setup(settings=wandb.Settings(silent=True, mode=mode))
        try:
            if mode == "online" and not _has_key(wandb):
                if self._mode != "auto":
                    self._say(f"warning: WANDB_MODE={self._mode} needs a key (`wandb login`): W&B logs offline")
                mode = "offline"
            run = self._init(wandb, mode)
        except Exception as error:
            if mode == "offline":
                raise
            self._say(f"warning: W&B cannot be reached ({one_line(error)}): it logs offline")
            with suppress(Exception):
                wandb.teardown(exit_code=0)  # else the next init waits for the first
            run = self._init(wandb, "offline")
        self._place = run.settings.sync_dir
        place = run.url if not run.offline else f"offline; `wandb sync {self._place}` sends it"
        self._say(f"W&B: {place}")
        run.define_metric("*", step_metric=AXES["step"])
        for axis in AXES.values():
            run.define_metric(axis)
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        env = os.environ
        facts = RunInfo.read(self._out_dir / CONFIG, of="a run").to_json()
        settings = wandb.Settings(
            init_timeout=CONNECT_S, login_timeout=CONNECT_S, finish_timeout=FINISH_S - 5, finish_timeout_raises=True,
            silent=True, console="off", **_settings_of(self._config),
        )  # fmt: skip
        return wandb.init(
            mode=mode, id=self._run_id, resume="allow", settings=settings,
            dir=env.get("WANDB_DIR") or str(self._out_dir),
            project=settings.project or env.get("WANDB_PROJECT", PROJECT),
            config=facts.pop("config") | facts, allow_val_change=True,
        )  # fmt: skip


def _has_key(wandb: Any) -> bool:
    """Whether W&B knows a key, without asking a person for one.

    Raises what W&B raises when the server refuses it, and what _ask raises.
    """
    if not wandb.login(prompt=False, verify=False):
        return False
    _ask(wandb.setup().settings.base_url)
    return bool(wandb.login(prompt=False))


def _ask(url: str) -> None:
    """Raises OSError or HTTPException where nothing answers at url in CONNECT_S; W&B itself would try for 25 s.

    What answers, and whether its certificate will do, is for W&B to judge.
    """
    try:
        with urlopen(Request(f"{url}/graphql", method="HEAD"), timeout=CONNECT_S):
            pass
    except HTTPError:
        pass
    except URLError as error:
        if not isinstance(error.reason, SSLError):
            raise


def _key(name: str) -> str:
    section = next((section for section, names in SECTIONS.items() if name in names), "perf")
    return AXES.get(name, f"{section}/{name}")
