"""The options of `headwater server`, by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import typer

from headwater.protos.errors import UsageError
from headwater.server import keywords
from headwater.server.config import ServerConfig
from headwater.server.keywords import read_keywords
from headwater.server.main import app


def test_every_option_is_a_field_of_the_servers_config() -> None:
    command: Any = typer.main.get_command(app)
    names = {p.name for p in command.params} - {*keywords._OF_THE_COMMAND, "help"}

    fields = {keywords._FIELDS.get(name, name) for name in names}

    assert {"epochs", "grace", "transport"} < names
    assert fields <= {field.name for field in dataclasses.fields(ServerConfig)}


def test_they_become_words_and_fields(tmp_path: Path) -> None:
    given = {
        "batch_size": 8,
        "epochs": "3",
        "run_dir": tmp_path / "run",
        "init": Path("weights.safetensors"),
        "consistency": "sync:2",
        "grace": 1,
        "optimizer": "-1 * sgd(1.0)",
        "insecure": False,
        "epoch_barrier": True,
        "patience": None,
    }

    found = read_keywords("fit", given)

    assert found.words == [
        "--batch-size=8",
        "--epochs=3",
        f"--run-dir={tmp_path / 'run'}",
        "--init=weights.safetensors",
        "--consistency=sync:2",
        "--grace=1",
        "--optimizer=-1 * sgd(1.0)",
        "--epoch-barrier",
    ]
    assert found.fields == {
        "batch_size": 8,
        "epochs": 3,
        "run_dir": tmp_path / "run",
        "init": str(Path("weights.safetensors").absolute()),
        "consistency": "sync:2",
        "grace_s": 1.0,
        "optimizer": "-1 * sgd(1.0)",
        "insecure": False,
        "epoch_barrier": True,
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epoch": 1}, "fit takes no 'epoch'; did you mean 'epochs'?"),
        ({"batch-size": 1}, "fit takes no 'batch-size'; did you mean 'batch_size'?"),
        ({"worker": 1}, "fit takes no 'worker'; did you mean 'workers'?"),
        ({"task_option": []}, "fit takes no 'task_option'; "),
        ({"xyz": 1}, "fit takes no 'xyz'; it takes the options of `headwater server`"),
        ({"epochs": 1.5}, "fit: Invalid value for '--epochs'"),
        ({"durability": "disk"}, "fit: Invalid value for '--durability'"),
        ({"epoch_barrier": "yes"}, "fit: epoch_barrier is True or False, not 'yes'"),
        ({"consistency": "sinc"}, "--consistency 'sinc'"),
        ({"epochs": 0}, "--epochs 0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_keywords("fit", given, ["workers"])

    assert said in str(raised.value)
