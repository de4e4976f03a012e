"""What a server that died comes back to, and how those who outlived it take that."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from headwater.client.client import Client
from headwater.protos import snapshot_file
from kit import counting, noisy
from kit.disk import power_loss, set_faults
from kit.lives import TASK, Lives, Witness, steady_workers
from kit.processes import worker
from kit.protocol import BareWorker, hello_of
from kit.waiting import wait_for

SMALL = {"examples": 1024, "epochs": 4, "batch_size": 4}
ENDLESS = {"examples": 256, "epochs": 100_000, "batch_size": 4}


def wait_version(lives: Lives, version: int) -> None:
    wait_for(
        lambda: lives.status().get("version", -1) >= version,
        f"version {version}",
        60,
        lambda: (lives.status(), lives.command and lives.command.errors),
    )


# --------------------------------------------------------------- the same bits


def trained(folder: Path, kills: tuple[int, ...]) -> snapshot_file.Snapshot:
    """The final snapshot of 500 updates by one worker, the server killed at versions."""
    folder.mkdir()
    lives = Lives(folder, options=["--durability", "log", "--snapshot-every", "40"])
    lives.task = Path(noisy.__file__)
    with lives:
        lives.start("--epochs", "20")
        with worker(lives.task, lives.address, cwd=folder) as one:
            for version in kills:
                wait_version(lives, version)
                lives.kill()
                lives.start()
            lives.finished()
            assert one.wait() == 0, one.errors
        lives.command.send(signal.SIGTERM)
        assert lives.command.wait() == 0, lives.command.errors
    (*_, newest) = sorted((folder / "run").glob("snapshot-*.safetensors"))
    return snapshot_file.read(newest)


def test_a_run_whose_server_was_killed_ends_with_the_same_bits(tmp_path):
    never = trained(tmp_path / "never", ())
    once = trained(tmp_path / "once", (60,))

    assert never.facts.version == once.facts.version == 500
    assert (never.facts.incarnation, once.facts.incarnation) == (1, 2)
    assert never.facts.tensors == once.facts.tensors  # checksums and all
    for name, array in never.arrays.items():
        assert array.tobytes() == once.arrays[name].tobytes()


def test_at_log_what_was_acknowledged_of_packed_gradients_outlives_the_server(tmp_path):
    task = counting.task(600, 1, 4)
    options = counting.options(examples=600, epochs=1, batch_size=4)
    with Lives(tmp_path, options, [*LOG, "--compress", "int8"]) as lives:
        lives.start()
        hello = hello_of(task, "counting")
        hello.task.options.update(examples="600", epochs="1", batch_size="4")
        random = np.random.default_rng(0)
        with BareWorker(lives.address, hello) as bare:
            bare.join()
            for version in range(1, 51):  # a snapshot and ten records
                buffer = bare.pushed.empty()
                for array in bare.pushed.views(buffer).values():
                    if array.dtype == np.int8:
                        array[:] = random.integers(-127, 128, array.size)
                    else:
                        array[:] = random.random(array.size)
                bare.push(bare.ticket(), buffer)
                assert bare.outcome().version == version
            with Client(lives.address) as client:
                acknowledged = client.pull()["count"]
            lives.kill()
        lives.start()
        with Client(lives.address) as client:
            weights = client.pull()
            assert client.status()["compression"] == "int8"
        assert weights.version == 50
        assert weights["count"].tobytes() == acknowledged.tobytes()


# --------------------------------------------------------------- who outlived it


def test_workers_refuse_a_server_restored_from_an_older_copy(tmp_path):
    with Lives(tmp_path, counting.options(**ENDLESS), ["--snapshot-every", "20"]) as lives:
        lives.start()
        options = counting.options(**ENDLESS)
        with worker(TASK, lives.address, *options, cwd=tmp_path) as one:
            wait_version(lives, 50)
            lives.kill()
            shutil.copytree(lives.run_dir, tmp_path / "copy")
            for _ in range(2):
                lives.start()
                wait_for(lambda: lives.status().get("workers"), "the worker is back")
                lives.kill()
            shutil.rmtree(lives.run_dir)
            shutil.copytree(tmp_path / "copy", lives.run_dir)
            lives.start()

            assert one.wait() == 1, one.errors
            assert (
                "headwater worker: error: this server is incarnation 2 of its run, but incarnation "
                "3 has been seen: it was restored from an older copy. Start it from the newest "
                "copy of the run directory"
            ) in one.errors


@pytest.mark.parametrize("first", [pytest.param("server", marks=pytest.mark.slow), "workers"])
def test_when_all_are_killed_they_go_on_in_whatever_order_they_come_back(first, tmp_path):
    task = SMALL | {"batch_size": 16}
    options = counting.options(**task)
    with (
        Lives(tmp_path, options, ["--snapshot-every", "10"]) as lives,
        contextlib.ExitStack() as stack,
    ):

        def workers():
            commands = [worker(TASK, lives.address, *options, cwd=tmp_path) for _ in range(2)]
            return [stack.enter_context(command) for command in commands]

        lives.start()
        alive = workers()
        wait_version(lives, 30)
        lives.kill()
        for command in alive:
            command.kill()

        if first == "workers":
            alive = workers()
            wait_for(
                lambda: all("trying again" in command.errors for command in alive),
                "they look for a server",
            )
            lives.start()
        else:
            lives.start()
            alive = workers()
        lives.finished()

        assert [command.wait() for command in alive] == [0, 0]
        with Client(lives.address) as client:
            counting.assert_exactly_once(client)


# --------------------------------------------------------------- a bad disk


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "faults.json"


def test_at_log_a_full_disk_holds_pushes_and_room_lets_them_go_on(control, tmp_path):
    options = counting.options(**SMALL)
    with Lives(tmp_path, [*options, "--task-option", f"faults={control}"], LOG) as lives:
        lives.start()
        witness = Witness(lives.address, 4, acknowledged_is_durable=True)
        with witness, workers_of(lives, witness, control) as steady:
            wait_version(lives, 50)
            set_faults(control, {"operation": "write", "error": "ENOSPC"})
            wait_for(lambda: lives.status()["problems"], "the problem is shown")

            def settled():
                """What had been logged when the disk filled is published and acknowledged."""
                status = lives.status()
                acknowledged = sum(worker.acknowledged for worker in steady)
                return status["version"] == status["durable_version"] == acknowledged and status

            held = wait_for(settled, "every logged update is acknowledged", state=lives.status)
            assert "pushes are held until there is room" in "".join(held["problems"])
            for _ in range(10):  # several times as long as an update takes
                time.sleep(0.02)
                assert settled()["version"] == held["version"]

            set_faults(control)
            lives.finished()
            assert lives.status()["problems"] == []
        with Client(lives.address) as client:
            counting.assert_exactly_once(client)


@pytest.mark.parametrize("operation", ["write", pytest.param("sync", marks=pytest.mark.slow)])
def test_at_log_a_failing_disk_ends_the_server_and_nothing_acknowledged_is_lost(
    operation, control, tmp_path
):
    options = counting.options(**SMALL)
    with Lives(tmp_path, [*options, "--task-option", f"faults={control}"], LOG) as lives:
        lives.start()
        witness = Witness(lives.address, 4, acknowledged_is_durable=True)
        with witness, workers_of(lives, witness, control):
            wait_version(lives, 50)
            set_faults(control, {"operation": operation, "files": "updates-*", "error": "EIO"})
            assert lives.command.wait(30) == 1
            assert "failed: Input/output error. Nothing after version" in lives.command.errors
            assert "Traceback" not in lives.command.errors

            set_faults(control)
            lives.start()
            lives.finished()
        with Client(lives.address) as client:
            counting.assert_exactly_once(client)


def test_a_slow_disk_does_not_hold_up_pushes(control, tmp_path):
    """An fsync takes a second; at level `snapshot` nobody waits for it."""
    options = counting.options(**ENDLESS)
    slow = [*options, "--task-option", f"faults={control}"]
    with Lives(tmp_path, slow, ["--snapshot-every", "1s"]) as lives:
        lives.start()
        witness = Witness(lives.address, 4, acknowledged_is_durable=False)
        with witness, workers_of(lives, witness, control, **ENDLESS):
            wait_version(lives, 20)
            set_faults(control, {"operation": "sync", "files": "snapshot-*", "delay_s": 1.0})
            durable = lives.status()["durable_version"]
            versions = []
            while lives.status()["durable_version"] == durable:
                versions.append(lives.status()["version"])
            grew = np.diff(np.array(versions)[:: max(1, len(versions) // 10)])
            assert (grew > 0).all(), versions
            set_faults(control)


@pytest.mark.parametrize("level", [pytest.param("snapshot", marks=pytest.mark.slow), "log"])
def test_what_was_called_durable_survives_a_loss_of_power(level, tmp_path):
    """Killed, and then everything that was not fsynced is dropped."""
    shadow = tmp_path / "shadow"
    task = SMALL | {"batch_size": 16, "epochs": 2}
    options = counting.options(**task)
    with Lives(
        tmp_path,
        [*options, "--task-option", f"shadow={shadow}"],
        ["--durability", level, "--snapshot-every", "30"],
    ) as lives:
        lives.start()
        witness = Witness(lives.address, 16, acknowledged_is_durable=level == "log")
        with witness, workers_of(lives, witness, shadow, "shadow", **task) as steady:
            for version in (40,):
                wait_version(lives, version)
                lives.kill()
                power_loss(lives.run_dir, shadow)
                lives.start()
            lives.finished()
            assert all(w.acknowledged for w in steady)
        with Client(lives.address) as client:
            counting.assert_exactly_once(client)


LOG = ["--durability", "log", "--snapshot-every", "40"]


def workers_of(lives, witness, path, option="faults", **task):
    """Two bare workers whose task has the option that gives the server its disk."""
    return steady_workers(
        lives.address, witness, 2, 0.002, **{**SMALL, **task}, **{option: str(path)}
    )
