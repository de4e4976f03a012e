"""A run is computed again from its history, to the last bit; or what differs is named.

Server and workers are threads here; processes, and what kills them, are in
tests/faults/test_replay.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from headwater import Client, Task
from headwater.protos.errors import HeadwaterError, UsageError
from headwater.server import history, likeness
from headwater.server.embedded import Server
from headwater.server.replay import Report, app, replay_run
from headwater.server.survey import survey
from headwater.worker.link import Patience
from headwater.worker.load import LoadedTask
from headwater.worker.loop import Worker
from kit import noisy, processes
from kit.waiting import wait_for

NOISY = noisy.task


def loaded(task: Task = NOISY) -> LoadedTask:
    return LoadedTask(task, "noisy", {}, "")


def train(
    run_dir: Path,
    workers: int = 2,
    task: Task = NOISY,
    steer: Callable[[Client], None] = lambda client: None,
    **options: Any,
) -> None:
    """Train to the end, with workers in threads; `steer` is called once it trains."""
    errors: list[BaseException] = []

    def work(address: str) -> None:
        try:
            Worker(loaded(task), address, Patience(address, 60)).run()
        except BaseException as error:
            errors.append(error)

    with Server(task, name="noisy", run_dir=run_dir, exit_when_done=True, **options) as server:
        threads = [
            threading.Thread(target=work, args=(server.address,), name=f"worker {n}")
            for n in range(workers)
        ]
        with Client(server.address) as client:
            client.pause()  # until all are there: one alone is never stale
            for thread in threads:
                thread.start()
            wait_ready(client, workers, lambda: errors)
            client.resume()
            steer(client)
        for thread in threads:
            thread.join(60)
    assert errors == []


def wait_ready(client: Client, workers: int, errors: Callable[[], object]) -> None:
    """Until so many are there and have compiled."""
    wait_for(
        lambda: [w["state"] for w in client.status()["workers"]] == ["waiting"] * workers,
        "all workers have compiled",
        60,
        lambda: (client.status()["workers"], errors()),
    )


def replayed(run_dir: Path, to: int | None = None, task: Task = NOISY, **options: Any) -> Report:
    return replay_run(run_dir, loaded(task), survey(run_dir / history.NAME, to), **options)


def staleness(run_dir: Path) -> set[int]:
    """That gradients had when they were applied."""
    lines = history.read(run_dir / history.NAME)
    return {line["v"] - 1 - base for line in lines for _, base, *_ in line.get("u", ())}


def edit(run_dir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Have `change` tamper with each line of the history."""
    path = run_dir / history.NAME
    lines: list[Any] = list(history.read(path))
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "short"
    train(folder, epochs=1)
    return folder


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    """25 updates; of this test alone."""
    return Path(shutil.copytree(short_run, tmp_path / "run"))


# ------------------------------------------------------------ the same weights


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({"task": noisy.with_dropout}, 46),
        ({"staleness": "compensate"}, 50),
        pytest.param({"staleness": "scale"}, 50, marks=pytest.mark.slow),
        pytest.param({"staleness": "drop:1"}, 50, marks=pytest.mark.slow),
        pytest.param({"consistency": "bounded:2"}, 50, marks=pytest.mark.slow),
        ({"consistency": "sync:4"}, 14),
        ({"local_steps": 3, "inner_optimizer": "adam(linear_schedule(0.1, 0.01, 40))"}, 18),
        pytest.param({"local_steps": 3, "consistency": "sync:2"}, 10, marks=pytest.mark.slow),
        ({"compress": "int8", "pull_dtype": "bfloat16"}, 50),
        pytest.param({"compress": "int8", "consistency": "sync:2"}, 26, marks=pytest.mark.slow),
    ],
    ids=[
        *("async", "compensate", "scale", "drop", "bounded", "sync"),
        *("local-steps", "local-steps-in-sync", "compressed", "compressed-in-sync"),
    ],
)
def test_a_run_is_computed_again_to_the_same_bits(
    options: dict[str, Any], updates: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    task = options.get("task", NOISY)
    train(run, **options)
    before = {path: path.read_bytes() for path in run.iterdir()}

    report = replayed(run, task=task, out=tmp_path / "again.safetensors")

    assert report.difference is None
    assert report.identical
    assert report.warnings == []
    assert (report.version, report.updates, report.checked_version) == (updates,) * 3
    assert report.compared_with == f"snapshot-{updates:020}.safetensors"
    ran, again = load_file(run / "weights.safetensors"), load_file(tmp_path / "again.safetensors")
    assert {n: a.tobytes() for n, a in ran.items()} == {n: a.tobytes() for n, a in again.items()}
    assert {path: path.read_bytes() for path in run.iterdir()} == before, "nothing is written"
    assert max(staleness(run)) > 0 or "sync" in options.get("consistency", "")


def test_a_run_that_went_on_with_another_optimizer_and_more_epochs_is_followed(
    tmp_path: Path,
) -> None:
    train(tmp_path, epochs=1)
    train(tmp_path, epochs=2, optimizer="adam(cosine_decay_schedule(0.05, total_updates))")

    report = replayed(tmp_path)

    assert report.difference is None
    assert (report.version, report.compared_with) == (50, f"snapshot-{50:020}.safetensors")


def test_what_was_set_on_the_way_is_set_again(tmp_path: Path) -> None:
    def steer(client: Client) -> None:
        client.set({"learning_rate": 0.02}, at_version=40)
        client.set({"consistency": "bounded:1", "momentum": 0.5})
        wait_for(lambda: client.status()["version"] > 45, "the planned one holds")
        client.set({"consistency": "sync:2", "learning_rate": "schedule"})

    run_dir = tmp_path / "run"
    optimizer = "sgd(linear_schedule(0.01, 0.001, 200), momentum=0.9)"
    train(run_dir, epochs=40, optimizer=optimizer, steer=steer)

    assert (
        sum("set" in line and "u" not in line for line in history.read(run_dir / history.NAME)) > 3
    )
    assert replayed(run_dir).difference is None


@pytest.mark.slow
def test_an_inner_schedule_follows_the_epochs_that_the_run_had_then(tmp_path: Path) -> None:
    inner = "sgd(cosine_decay_schedule(0.1, total_updates))"
    train(tmp_path, epochs=1, local_steps=4, inner_optimizer=inner)
    train(tmp_path, epochs=2)

    assert replayed(tmp_path).difference is None


@pytest.mark.slow
def test_batches_that_were_left_out_are_left_out_again(tmp_path: Path) -> None:
    def bad(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        spoilt = jnp.where(batch["x"][0, 0] > 1.2, jnp.nan, 1.0)
        return noisy.loss(params, batch, key) * spoilt

    task = dataclasses.replace(NOISY, loss=bad)
    train(tmp_path, task=task, epochs=1, on_nonfinite="skip")

    report = replayed(tmp_path, task=task)

    assert report.difference is None
    assert 0 < report.version < 25
    assert report.compared_with == f"snapshot-{report.version:020}.safetensors"


def test_what_error_feedback_left_out_was_not_recorded_and_cannot_be_replayed(
    tmp_path: Path,
) -> None:
    train(tmp_path / "run", epochs=1, compress="topk:0.1")
    with pytest.raises(HeadwaterError, match=r"from version 0 on .* --compress topk:0.1, which"):
        replayed(tmp_path / "run")


def test_a_replay_can_stop_at_any_version(short_run: Path) -> None:
    for version in (0, 17):
        report = replayed(short_run, to=version)
        assert report.difference is None
        assert (report.version, report.checked_version) == (version, version)


# ----------------------------------------------------------- what differs


def test_a_gradient_that_differs_is_named(run: Path, tmp_path: Path) -> None:
    def tamper(line: dict[str, Any]) -> None:
        if line["v"] == 12 and "u" in line:
            line["u"][0][3] = 7

    edit(run, tamper)
    (line,) = (x for x in history.read(run / history.NAME) if x["v"] == 12 and "u" in x)
    position, base, worker, _ = line["u"][0]
    name = survey(run / history.NAME).workers[worker].name

    report = replayed(run, out=tmp_path / "last.safetensors")

    assert report.difference is not None
    assert not report.identical
    assert report.line().startswith(
        f"version 12 differs: the gradient of batch {position} of epoch 0, computed by {name} at "
        f"version {base}, has other bits (CRC32C "
    )
    assert report.line().endswith("here, 00000007 in the run)")
    assert (report.difference["version"], report.difference["what"]) == (12, "gradient")
    assert report.out_version == 11, "the last that is as it was"


def test_an_update_that_differs_is_named(run: Path) -> None:
    edit(run, lambda line: line.update(w=7) if line["v"] == 12 and "w" in line else None)

    line = replayed(run).line()

    assert line.startswith(
        "version 12 differs: its gradients have the same bits, and the weights after the update "
        "have others (CRC32C "
    )


def test_an_update_that_is_not_finite_now_is_named(run: Path, tmp_path: Path) -> None:
    def tamper(line: dict[str, Any]) -> None:
        if "incarnation" in line:
            line["set"]["planned"] = [[11, "eps_root", -1.0]]

    edit(run, tamper)

    report = replayed(run, out=tmp_path / "last.safetensors")

    assert re.fullmatch(
        "version 12 differs: its gradients have the same bits, and what they make is not finite: "
        r"\d+ of the 1152 numbers in first would not be finite any more; lower the learning rate",
        report.line(),
    )
    assert report.difference is not None
    assert report.difference["what"] == "update"
    assert report.out_version == 11, "the last that is as it was"


def test_where_not_each_version_has_a_checksum_the_last_that_had_one_is_named(run: Path) -> None:
    def tamper(line: dict[str, Any]) -> None:
        if "w" in line and line["v"] % 5:
            del line["w"]
        if line["v"] == 20 and "u" in line:
            line["w"] = 7

    edit(run, tamper)
    (run / "weights.safetensors").unlink()

    assert "by an update after version 15 (CRC32C" in replayed(run).line()
    assert (
        "every gradient up to version 18 has the same bits as in the run, which kept no checksum "
        "of weights after version 15"
    ) in replayed(run, to=18).line()


def test_first_weights_that_differ_are_named(run: Path) -> None:
    other = dataclasses.replace(
        NOISY, init=lambda key: jax.tree.map(lambda x: x + 1, noisy.init(key))
    )

    assert (
        replayed(run, task=other)
        .line()
        .startswith("version 0 differs: the first weights have other bits (CRC32C ")
    )


def test_a_loss_that_was_changed_differs_at_the_first_gradient(run: Path) -> None:
    other = dataclasses.replace(NOISY, loss=lambda *given: 1.01 * noisy.loss(*given))

    assert replayed(run, task=other).line().startswith("version 1 differs: the gradient of batch ")


def test_a_file_of_other_weights_is_named(run: Path) -> None:
    edit(run, lambda line: line.pop("w", None))
    (newest,) = run.glob(f"snapshot-{25:020}.safetensors")
    newest.unlink()
    weights = run / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")

    assert replayed(run).line() == (
        "version 25 differs: second/1 in weights.safetensors has other bits than were computed now"
    )


# ---------------------------------------------------------- what is refused


def test_a_gap_is_refused_and_what_is_before_it_replayed(run: Path) -> None:
    path = run / history.NAME
    lines = path.read_text().splitlines(keepends=True)
    cut = [line for line in lines if not 10 < json.loads(line)["v"] <= 20]
    at = next(n for n, line in enumerate(cut) if json.loads(line)["v"] > 20)
    path.write_text("".join([*cut[:at], '{"v":20,"gap":10}\n', *cut[at:]]))

    with pytest.raises(
        HeadwaterError,
        match=r"what came between version 10 and 20 was not written, because .* replay --to 10$",
    ):
        replayed(run)
    assert replayed(run, to=10).identical


def test_another_task_is_refused(run: Path) -> None:
    other = dataclasses.replace(NOISY, seed=4, batch_size=16)

    with pytest.raises(UsageError) as refused:
        replayed(run, task=other)

    assert str(refused.value) == (
        f"{run} holds a run of another task than noisy (batch size: 8 in the directory, 16 now; "
        "seed: 3 in the directory, 4 now); replay it with the --task and --task-option that it "
        "was trained with"
    )


def test_another_optimizer_of_the_task_is_refused(run: Path) -> None:
    other = dataclasses.replace(NOISY, optimizer="sgd(0.1)")

    with pytest.raises(HeadwaterError, match=r"trained with adam\(.*, and the task has sgd"):
        replayed(run, task=other)


def test_a_directory_without_a_history_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file or directory; name the"):
        replayed(tmp_path)


def test_a_version_that_never_was_is_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="--to 26: the history leads to version 25"):
        replayed(run, to=26)


def test_a_line_that_is_half_written_is_passed_over(run: Path) -> None:
    with (run / history.NAME).open("a") as file:
        file.write('{"v":26,"u":[[4')

    assert replayed(run).version == 25


# ----------------------------------------------------------------- the command


@pytest.fixture
def command(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`headwater replay` of the run, in this process."""
    for name in ("NPROC", "XLA_FLAGS", "JAX_PLATFORMS"):  # it sets them
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def invoke(*options: str) -> Any:
        task = Path(noisy.__file__)
        return CliRunner().invoke(app, [str(run), "--task", str(task), *options])

    return invoke


def test_the_same_bits_are_said_with_their_checksum(command: Callable[..., Any]) -> None:
    done = command()

    assert done.exit_code == 0, done.output
    assert re.fullmatch(
        r"replayed 25 updates in \d+\.\d s: version 25 has the same bits as in the run and in "
        r"snapshot-0{18}25\.safetensors \(weights CRC32C [0-9a-f]{8}\)\n",
        done.stdout,
    )


def test_a_difference_is_exit_status_1_and_a_json_object(
    run: Path, command: Callable[..., Any]
) -> None:
    edit(run, lambda line: line["u"][0].__setitem__(3, 7) if "u" in line else None)

    done = command("--json")

    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert (found["identical"], found["version"], found["updates"]) == (False, 1, 0)
    assert found["difference"]["what"] == "gradient"
    assert found["difference"]["text"].startswith("version 1 differs: the gradient of batch ")


def test_the_weights_of_any_version_can_be_had(tmp_path: Path, command: Callable[..., Any]) -> None:
    out = tmp_path / "out.safetensors"

    done = command("--to", "3", "--out", str(out))

    assert done.exit_code == 0, done.output
    assert f"the weights of version 3 are in {out}\n" in done.stdout
    assert load_file(out).keys() == {"first", "second/0", "second/1"}


def test_a_platform_that_is_not_here_is_refused(run: Path, command: Callable[..., Any]) -> None:
    edit(run, lambda line: line.get("compute", {}).update(platform="tpu"))

    done = command()

    assert isinstance(done.exception, HeadwaterError)
    assert "the run was computed on tpu, and JAX finds none here" in str(done.exception)
    assert done.exception.exit_status == 1


def test_the_run_directory_is_not_written_to(run: Path, command: Callable[..., Any]) -> None:
    done = command("--out", str(run / "weights.safetensors"))

    assert isinstance(done.exception, UsageError)
    assert "is in the run directory, which a replay leaves as it is" in str(done.exception)


def test_workers_of_two_platforms_are_refused(run: Path, tmp_path: Path) -> None:
    def tamper(line: dict[str, Any]) -> None:
        if "worker" in line and line["name"] != "worker-1":
            line["compute"]["platform"] = "gpu"

    edit(run, tamper)

    done = processes.run("replay", "run", "--task", "any.py", cwd=tmp_path)

    assert done.status == 1, done.output
    assert done.errors == (
        "headwater replay: error: the run cannot be replayed: its gradients were computed on cpu "
        "(worker-1) and gpu (worker-2), whose bits differ; train with workers of one platform to "
        "replay it\n"
    )


def test_a_run_is_replayed_while_it_goes_on(tmp_path: Path) -> None:
    task = dataclasses.replace(NOISY, epochs=10_000)
    with Server(task, name="noisy", run_dir=tmp_path / "run") as server:
        life = Worker(loaded(task), server.address, Patience(server.address, 60))
        thread = threading.Thread(target=life.run, name="worker")
        thread.start()
        path = tmp_path / "run" / history.NAME
        wait_for(lambda: survey(path).version > 20, "20 updates are written")
        first = replayed(tmp_path / "run", task=task)
    thread.join(60)

    assert first.identical
    assert first.version > 20
    assert likeness.gradients_platform(survey(path)) == jax.default_backend()
