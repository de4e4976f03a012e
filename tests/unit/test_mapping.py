"""Which own tensor is which served one: said by the user, checked, and shown where it is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from headwater.protos.layout import Layout
from headwater.worker.load import UsageError
from headwater.worker.mapping import MappingError, placed, served_as

F32, I32, F16 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.float16)

SERVED = Layout.of(
    [("bias", F32, (64,)), ("kernel", F32, (784, 64))], [("steps", I32, ())], [("mask", F32, (3,))]
)
OWN = Layout.of(
    [("fc.weight", F32, (64, 784)), ("fc.bias", F32, (64,))],
    [("count", I32, ())],
    [("keep", F32, (3,))],
)
RIGHT = {"kernel": ("fc.weight", (1, 0)), "bias": "fc.bias", "steps": "count", "mask": "keep"}


def refusal(**changed):
    """The table's rows but the first, for a mapping that differs from the right one in this."""
    mapping = {name: target for name, target in {**RIGHT, **changed}.items() if target}
    with pytest.raises(MappingError) as caught:
        placed(OWN, SERVED, mapping, {"tied.weight": "fc.weight"})
    told, *table = str(caught.value).splitlines()
    assert "every tensor" in told
    return [" ".join(row.split()) for row in table[1:]]


def test_every_tensor_is_found_by_its_own_name_and_axes() -> None:
    places = placed(OWN, SERVED, RIGHT)

    assert [(p.served.name, p.own.name, p.axes) for p in places] == [
        ("bias", "fc.bias", (0,)),
        ("kernel", "fc.weight", (1, 0)),
        ("steps", "count", ()),
        ("mask", "keep", (0,)),
    ]


def test_without_a_mapping_names_are_the_same() -> None:
    assert [p.own.name for p in placed(OWN, OWN)] == [t.name for t in OWN.tensors]


def test_without_a_server_the_mapping_gives_names_shapes_and_order() -> None:
    served = served_as(
        OWN, {"a/kernel": ("fc.weight", (1, 0)), "b": "fc.bias", "n": "count", "m": "keep"}
    )

    assert [(t.name, t.shape) for t in served.tensors] == [
        ("a/kernel", (784, 64)), ("b", (64,)), ("n", ()), ("m", (3,)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "row"),
    [
        ({"bias": None}, "bias float32[64] is not mapped"),
        ({"bias": None}, "fc.bias float32[64] is not mapped"),
        ({"other": "fc.bias"}, "other fc.bias float32[64] is not served"),
        ({"bias": "fc.b"}, "bias float32[64] fc.b the model has no such tensor"),
        (
            {"kernel": "fc.weight"},
            "kernel float32[784,64] fc.weight float32[64,784] the shapes differ",
        ),
        (
            {"kernel": ("fc.weight", (0, 1))},
            (
                "kernel float32[784,64] fc.weight (0, 1) float32[64,784] the shapes differ, by "
                "these axes it is [64, 784]"
            ),
        ),
        (
            {"kernel": ("fc.weight", (1, 2))},
            (
                "kernel float32[784,64] fc.weight (1, 2) float32[64,784] its axes are (0, 1), in "
                "another order"
            ),
        ),
        (
            {"kernel": ("tied.weight", (1, 0))},
            "kernel float32[784,64] tied.weight (1, 0) is fc.weight by another name: map that",
        ),
        (
            {"mask": "count"},
            "mask float32[3] constant count int32[] state is mapped to steps already",
        ),
        (
            {"bias": "keep", "mask": "fc.bias"},
            "bias float32[64] keep float32[3] constant the shapes differ",
        ),
    ],
)
def test_what_is_wrong_is_said_in_the_tensors_row(changed, row) -> None:
    rows = refusal(**changed)

    assert row in rows
    assert len([r for r in rows if r.endswith("ok")]) >= 2


def test_a_role_or_dtype_of_another_kind_is_refused() -> None:
    trained = Layout.of([("w", F32, (3,)), ("v", F32, (3,))])
    halves = Layout.of([("w", F16, (3,)), ("v", F32, (3,))])
    frozen = Layout.of([("w", F32, (3,))], (), [("v", F32, (3,))])

    with pytest.raises(MappingError, match=r"w +float32\[3\] +w +float16\[3\] +the dtypes differ"):
        placed(halves, trained)
    with pytest.raises(MappingError, match="is a parameter there, and a constant here"):
        placed(frozen, trained)
    assert len(placed(trained, frozen)) == 2  # what is served as constant is left alone


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(UsageError, match="not 3"):
        placed(OWN, SERVED, {"bias": 3})  # type: ignore[dict-item]
