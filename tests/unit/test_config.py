"""A server's settings are checked once, and an error names the flag and the remedy."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from headwater.protos.errors import UsageError
from headwater.server.config import ServerConfig, is_loopback, split_address


@pytest.mark.parametrize("listen", ["127.0.0.1:50051", "localhost:0", "[::1]:50051", "127.9.8.7:1"])
def test_a_server_may_listen_on_this_machine_without_more_ado(listen: str) -> None:
    assert ServerConfig(listen=listen).listen == listen


def test_a_server_listens_on_this_machine_unless_told_otherwise() -> None:
    assert is_loopback(split_address(ServerConfig().listen, "--listen")[0])


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:50051", "[::]:50051", "192.168.1.5:50051", "gpu7.example.org:50051"]
)
def test_listening_to_other_machines_is_refused_unless_it_is_asked_for_by_name(listen: str) -> None:
    with pytest.raises(UsageError) as error:
        ServerConfig(listen=listen)

    assert str(error.value) == (
        f"--listen {listen} lets other machines in, without encryption or passwords; add "
        "--insecure if you trust everyone on that network, or listen on 127.0.0.1:50051"
    )
    assert ServerConfig(listen=listen, insecure=True).listen == listen


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"consistency": "sync:0"}, "^--consistency 'sync:0': it is async; bounded:K, .* sync:N"),
        ({"consistency": "bounded"}, "^--consistency 'bounded': it is async; bounded:K, "),
        ({"staleness": "drop"}, "^--staleness 'drop': it is none; scale; compensate .* drop:K"),
        ({"local_steps": 0}, "^--local-steps 0 must be at least 1$"),
        ({"lease_s": 0.0}, "^--lease-seconds 0.0 must be more than 0 seconds$"),
        ({"epochs": 0}, "^--epochs 0 must be at least 1$"),
        ({"batch_size": 0}, "^--batch-size 0 must be at least 1$"),
        ({"batch_size": -3}, "^--batch-size -3 must be at least 1$"),
        ({"seed": -1}, r"^--seed -1 must be in 0 … 4294967295$"),
        ({"seed": 2**32}, r"^--seed 4294967296 must be in 0 … 4294967295$"),
        ({"max_staged_bytes": 0}, "^--max-staged-bytes 0 must be at least 1$"),
        ({"session_timeout_s": 0.0}, "^--session-timeout 0.0 must be more than 0 seconds$"),
        ({"ticket_timeout_s": -1.0}, "^--ticket-timeout -1.0 must be more than 0 seconds$"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_flag(
    settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        ServerConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 1, "batch_size": 1, "seed": 0, "max_staged_bytes": 1},
        {"seed": 2**32 - 1, "session_timeout_s": 0.1, "ticket_timeout_s": 0.1},
    ],
)
def test_the_smallest_and_largest_settings_are_taken_as_they_are(settings: dict[str, Any]) -> None:
    config = ServerConfig(**settings)

    assert {name: getattr(config, name) for name in settings} == settings


def test_settings_left_out_keep_the_tasks_own() -> None:
    config = ServerConfig()

    assert (config.epochs, config.batch_size, config.optimizer, config.seed) == (None,) * 4


def test_settings_do_not_change_once_they_are_checked() -> None:
    config = ServerConfig()

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("gpu7.example.org:80", ("gpu7.example.org", 80)),
    ],
)
def test_an_address_is_a_host_and_a_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address, "--listen") == parts


@pytest.mark.parametrize(
    "address",
    ["", "localhost", ":50051", "50051", "localhost:", "localhost:http", "localhost:65536",
     "localhost:-1", "localhost:5.5", "http://localhost"],
)  # fmt: skip
def test_an_address_without_a_host_or_port_is_refused_by_its_flag(address: str) -> None:
    text = f"--server takes HOST:PORT such as 127.0.0.1:50051, not {address!r}"

    with pytest.raises(UsageError, match=f"^{re.escape(text)}$"):
        split_address(address, "--server")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.255.0.3", "::1"])
def test_only_this_machine_reaches_a_loopback_host(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "10.0.0.1", "", "example.org", "localhost.eu"],  # noqa: S104  (nothing binds)
)
def test_a_host_that_is_not_known_to_be_loopback_is_taken_for_the_world(host: str) -> None:
    assert not is_loopback(host)
