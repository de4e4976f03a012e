"""How GPUs are found without JAX, and dealt out among workers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from headwater.client import gpus
from headwater.client.gpus import CUDA, Gpus, deal, find_gpus
from headwater.client.shares import devices_option, shares_of_gpus

LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-6d1f7c06-0000-1111-2222-333344445555)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-7e2f8d17-0000-1111-2222-333344445555)
"""
CUT = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-6d1f7c06-0000-1111-2222-333344445555)
  MIG 1g.5gb      Device  0: (UUID: MIG-11111111-0000-1111-2222-333344445555)
  MIG 1g.5gb      Device  1: (UUID: MIG-22222222-0000-1111-2222-333344445555)
"""


def machine(count: int) -> Gpus:
    return Gpus(CUDA, tuple(map(str, range(count))))


def seen(count: int, workers: int) -> list[str]:
    return [share[CUDA] for share in deal(machine(count), workers)]


def test_gpus_are_dealt_out_in_neighbouring_groups() -> None:
    assert seen(8, 2) == ["0,1,2,3", "4,5,6,7"]
    assert seen(8, 3) == ["0,1,2", "3,4,5", "6,7"]
    assert seen(4, 4) == ["0", "1", "2", "3"]


def test_every_gpu_is_dealt_once_and_shares_differ_by_one_at_most() -> None:
    for count in range(1, 17):
        for workers in range(2, count + 1):
            groups = [share.split(",") for share in seen(count, workers)]
            assert [n for group in groups for n in group] == [str(n) for n in range(count)]
            assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_workers_share_gpus_and_their_memory_where_there_are_too_few() -> None:
    shares = deal(machine(2), 5)

    assert [share[CUDA] for share in shares] == ["0", "1", "0", "1", "0"]
    assert [share["XLA_CLIENT_MEM_FRACTION"] for share in shares] == [
        "0.300", "0.450", "0.300", "0.450", "0.300",
    ]  # fmt: skip


def test_who_shares_with_nobody_has_all_of_its_memory() -> None:
    assert deal(machine(2), 3)[1] == {CUDA: "1"}


def test_one_worker_sees_what_there_is() -> None:
    assert deal(machine(8), 1) == [{}]


def test_where_there_are_none_nothing_is_dealt() -> None:
    assert deal(machine(0), 2) == [{}, {}]


def test_where_it_is_not_known_what_there_is_memory_is_shared() -> None:
    fractions = [share["XLA_CLIENT_MEM_FRACTION"] for share in deal(None, 3)]

    assert fractions == ["0.300"] * 3


def test_of_instances_a_worker_gets_one() -> None:
    names = ("MIG-a", "MIG-b", "MIG-c")

    assert [share[CUDA] for share in deal(Gpus(CUDA, names), 2)] == ["MIG-a", "MIG-b"]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("0,2", ("0", "2")),
        (" 3 , GPU-6d1f7c06-0000", ("3", "GPU-6d1f7c06-0000")),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("1,-1,2", ("1",)),
    ],
)
def test_what_may_be_seen_is_dealt(value: str, names: tuple[str, ...]) -> None:
    assert find_gpus({CUDA: value, "PATH": ""}) == Gpus(CUDA, names)


def test_amds_are_dealt_where_they_are_named() -> None:
    found = find_gpus({"HIP_VISIBLE_DEVICES": "0,1", "PATH": ""})

    assert deal(found, 2) == [{"HIP_VISIBLE_DEVICES": "0"}, {"HIP_VISIBLE_DEVICES": "1"}]


def nvidia_smi(folder: Path, script: str) -> dict[str, str]:
    """An environment with such a one on its PATH."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"PATH": str(folder)}


def test_nvidia_smi_lists_the_gpus(tmp_path: Path) -> None:
    script = f'[ "$*" = -L ] || exit 1\n/bin/cat <<END\n{LISTED}END'

    assert find_gpus(nvidia_smi(tmp_path, script)) == Gpus(CUDA, ("0", "1"))


def test_instances_stand_for_the_gpu_that_was_cut_into_them(tmp_path: Path) -> None:
    script = f"/bin/cat <<END\n{CUT}{LISTED.splitlines()[1]}\nEND"

    found = find_gpus(nvidia_smi(tmp_path, script))

    assert found is not None
    assert [name[:5] for name in found.names] == ["MIG-1", "MIG-2", "1"]


def test_nothing_is_known_without_nvidia_smi_or_where_it_fails(tmp_path: Path) -> None:
    assert find_gpus({"PATH": str(tmp_path)}) is None
    assert find_gpus(nvidia_smi(tmp_path, "echo no driver; exit 9")) is None


def test_nvidia_smi_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "NVIDIA_SMI_TIMEOUT_S", 0.2)
    monkeypatch.delenv(CUDA, raising=False)
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, "exec /bin/sleep 60")["PATH"])
    said: list[str] = []

    began = time.monotonic()
    shares = shares_of_gpus(2, None, said.append)

    assert time.monotonic() - began < 30
    assert [CUDA in share for share in shares] == [False, False]
    assert "every worker will see all GPUs; set CUDA_VISIBLE_DEVICES" in "".join(said)


def test_what_is_set_by_hand_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUDA, "3")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.2")

    shares = shares_of_gpus(2, "gpu", pytest.fail)

    assert [share[CUDA] for share in shares] == ["3", "3"]
    assert not any("XLA_CLIENT_MEM_FRACTION" in share for share in shares)


def test_workers_on_the_cpu_are_dealt_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUDA, "0,1")

    assert shares_of_gpus(2, "cpu", pytest.fail) == [{}, {}]


def test_in_sync_mode_each_worker_uses_one_device_however_many_it_is_dealt() -> None:
    assert devices_option(None, in_sync=False) == []
    assert devices_option("0,1", in_sync=False) == ["--devices", "0,1"]
    assert devices_option(None, in_sync=True) == ["--devices", "1"]
    assert devices_option("2", in_sync=True) == ["--devices", "2"]
