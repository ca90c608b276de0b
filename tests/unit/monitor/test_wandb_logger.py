"""What W&B takes and refuses is known before the start."""

import pytest

from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.monitor.wandb_logger import check_wandb

KEY = "a" * 40


@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        ({}, {"WANDB_MODE": "onlin"}, "WANDB_MODE: Input should be 'online', 'offline'"),
        ({}, {"WANDB_MODE": ""}, "WANDB_MODE: Input should be 'online', 'offline'"),
        ({"wandb": "offline"}, {"WANDB_BASE_URL": "nonsense"}, "WANDB_BASE_URL: Input should be a valid URL"),
        ({}, {"WANDB_BASE_URL": "https://wandb.ai"}, "WANDB_BASE_URL: .* did you mean"),
        ({}, {"WANDB_PROJECT": "a/b"}, "WANDB_PROJECT: Invalid project name 'a/b'"),
        ({"wandb_project": "a/b"}, {}, "--wandb_project: Invalid project name 'a/b'"),
        ({"wandb_project": "x" * 129}, {}, "--wandb_project: .* exceeded 128"),
        ({"wandb_tags": "a,,b"}, {}, "--wandb_tags: Tag at index 1 is empty"),
        ({"wandb_tags": "x" * 65, "wandb": "offline"}, {}, "--wandb_tags: Tag .* is 65 characters"),
        ({}, {"WANDB_TAGS": "a,"}, "WANDB_TAGS: Tag at index 1 is empty"),
        ({}, {"WANDB_RUN_ID": "a/b"}, "WANDB_RUN_ID: Run ID cannot contain"),
        ({}, {"WANDB_API_KEY": f" {KEY}"}, "WANDB_API_KEY: API key cannot start"),
        ({}, {"WANDB_SILENT": "perhaps"}, "WANDB_SILENT: Input should be a valid boolean"),
        ({}, {"WANDB_FORK_FROM": "a?_step=1"}, "WANDB_FORK_FROM and WANDB_RESUME_FROM of a run that may be resumed"),
    ],
)
def test_what_wandb_refuses_is_refused_before_the_start(options, variables, message, no_wandb_settings, monkeypatch):
    """Invariant: a ConfigError of one line that names the option or variable, and W&B's reason; no key in it."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as raised:
        check_wandb(TrainConfig(**options))
    assert "\n" not in str(raised.value)
    assert KEY not in str(raised.value)
    check_wandb(TrainConfig(**(options | {"wandb": "disabled"})))


def test_what_wandb_takes_is_taken(no_wandb_settings, monkeypatch):
    """Invariant: longest names, all kinds of text and what W&B does not know of its variables."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_TAGS": "a,b",
        "WANDB_NAME": "x" * 300,
        "WANDB_NEW": "?",
    }.items():
        monkeypatch.setenv(name, value)
    check_wandb(TrainConfig(wandb_project="x" * 128, wandb_tags="x" * 64, wandb_group="a/b", wandb_notes="é\n#"))
