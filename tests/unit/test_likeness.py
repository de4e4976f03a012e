"""How a replay is made to compute as the run did, and when it is refused."""

from __future__ import annotations

import array
from typing import Any

import pytest

from headwater.protos.errors import HeadwaterError
from headwater.server import likeness
from headwater.server.survey import Survey, Worker


def run(*workers: Worker, **server: str) -> Survey:
    compute = {"platform": "cpu", **server}
    return Survey(
        run_id="r",
        version=1,
        incarnations=({"v": 0, "compute": compute, "software": {"optax": "0.2"}},),
        workers={worker.name: worker for worker in workers},
        last_used=array.array("q", [0, 0]),
    )


def worker(name: str, gradients: int = 1, **compute: str) -> Worker:
    return Worker(name, {"platform": "cpu", **compute}, gradients)


def environment(survey: Survey, **before: str) -> dict[str, str]:
    likeness.imitate(survey, before)
    return before


def test_threads_and_flags_become_the_workers() -> None:
    found = environment(
        run(worker("a", threads="3", XLA_FLAGS="--xla_gpu_deterministic_ops=true"), threads="7"),
        NPROC="2",
        XLA_FLAGS="--xla_cpu_enable_fast_math=true",
    )

    assert found == {"NPROC": "3", "XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}


def test_where_workers_differ_the_most_gradients_count() -> None:
    few, many = worker("a", 2, threads="1"), worker("b", 3, threads="4")

    assert environment(run(few, many))["NPROC"] == "4"


def test_a_cpu_has_as_many_devices_as_a_worker_split_its_batches_over() -> None:
    workers = worker("a", 5, devices="1"), worker("b", 1, devices="4")
    flag = "--xla_force_host_platform_device_count=8"

    assert environment(run(*workers)) == {"JAX_NUM_CPU_DEVICES": "4"}
    assert environment(run(worker("a", devices="4", XLA_FLAGS=flag))) == {"XLA_FLAGS": flag}
    for text in ("1", "0", "-2", "4 --x", "1000000", ""):
        assert environment(run(worker("a", devices=text))) == {}


def test_fewer_devices_than_a_worker_had_are_a_warning() -> None:
    here = {"platform": "cpu", "devices": "1"}
    found = run(worker("a", devices="4"), worker("b", devices="2"), devices="1")

    assert likeness.warnings(found, here, {}, devices=2) == [
        "what computed may give other bits here: a: devices: 2 here, 4 there"
    ]


def test_without_gradients_the_server_counts() -> None:
    assert environment(run(threads="7")) == {"NPROC": "7"}


@pytest.mark.parametrize(
    "flags",
    [
        "--xla_dump_to=/home/me",
        "--xla_dump_hlo_as_text",
        "--xla_gpu_load_autotune_results_from=x",
        "--xla_ok=true --anything",
    ],
)
def test_flags_that_could_name_a_file_are_not_taken(flags: str) -> None:
    assert environment(run(worker("a", XLA_FLAGS=flags)), XLA_FLAGS="mine") == {"XLA_FLAGS": "mine"}


@pytest.mark.parametrize("threads", ["0", "-1", "many", "1000000000"])
def test_threads_that_cannot_be_are_not_taken(threads: str) -> None:
    assert environment(run(worker("a", threads=threads))) == {}


def test_gradients_of_two_platforms_are_refused() -> None:
    mixed = run(worker("a"), worker("b", platform="gpu"), Worker("c", {}, 1))

    with pytest.raises(
        HeadwaterError,
        match=r"its gradients were computed on cpu \(a\) and gpu \(b\), whose bits differ; train",
    ):
        likeness.gradients_platform(mixed)


def test_a_gpu_beside_a_server_on_the_cpu_is_not() -> None:
    mixed = run(worker("a", platform="gpu"))

    assert likeness.gradients_platform(mixed) == likeness.accelerator(mixed) == "gpu"
    assert likeness.accelerator(run(worker("a"))) == "cpu"
    assert likeness.accelerator(run(worker("a"), platform="gpu")) == "gpu"


def test_two_accelerators_in_one_process_are_refused() -> None:
    with pytest.raises(HeadwaterError, match="it was computed on gpu and tpu, and one process has"):
        likeness.accelerator(run(worker("a", platform="tpu"), platform="gpu"))


def test_whatever_else_differs_is_a_warning() -> None:
    workers = [worker(f"w{n}", threads="1") for n in range(5)] + [Worker("other", {}, 1)]
    here = {"platform": "cpu", "threads": "2"}

    found = likeness.warnings(run(*workers, threads="2"), here, {"optax": "0.3"})

    assert found == [
        "what computed may give other bits here: other: nothing is known of it",
        "what computed may give other bits here: the server: optax: 0.3 here, 0.2 there",
        "what computed may give other bits here: w0, w1, w2 and 2 more: threads: 2 here, 1 there",
    ]


def test_nothing_that_differs_is_no_warning() -> None:
    here: dict[str, Any] = {"platform": "cpu", "threads": "1"}

    assert likeness.warnings(run(worker("a", threads="1"), threads="1"), here, {}) == []


TORCH = "torch 2.13.0"


def test_gradients_of_two_frameworks_are_not_replayed() -> None:
    mixed = run(worker("a"), worker("b", framework="jax"), worker("c", framework=TORCH))

    with pytest.raises(HeadwaterError, match=r"computed by jax \(a, b\) and torch \(c\), and one"):
        likeness.check_framework(mixed, {"framework": "jax"})


def test_gradients_are_replayed_by_the_framework_that_computed_them() -> None:
    by_torch = run(worker("a", framework=TORCH))

    likeness.check_framework(by_torch, {"framework": "torch 2.14.1"})  # which is a warning
    likeness.check_framework(run(worker("a")), {"framework": "jax"})
    with pytest.raises(HeadwaterError, match="computed by torch, and this task's are by jax"):
        likeness.check_framework(by_torch, {"framework": "jax"})
