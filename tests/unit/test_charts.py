"""Charts of one line: nothing that was counted is lost, and everything fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headwater.client import charts


@given(st.integers(0, 10**9), st.integers(1, 60))
def test_a_round_step_is_the_least_that_fits(end: int, bar_count: int) -> None:
    step = charts.round_step(end, bar_count)

    assert str(step).rstrip("0") in {"1", "2", "5"}
    assert end // step + 1 <= bar_count
    smaller = {"1": step // 2, "2": step // 2, "5": 2 * step // 5}[str(step)[0]]
    assert smaller == 0 or end // smaller + 1 > bar_count


@given(
    st.dictionaries(st.integers(0, 500), st.integers(1, 10**9), min_size=1),
    st.integers(0, 400),
    st.integers(1, 50),
    st.booleans(),
)
def test_every_value_that_was_counted_is_seen_and_no_other(
    counts: dict[int, int], end: int, values: int, ascii_only: bool
) -> None:
    bars = charts.histogram(counts, end, values, ascii_only=ascii_only)

    assert len(bars) == end // values + 1
    seen = {number for number, bar in enumerate(bars) if bar != " "}
    assert seen == {min(value, end) // values for value in counts}
    assert ("#" if ascii_only else "▇") in bars


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6), st.integers(1, 100))
def test_shares_fill_the_bar_each_within_a_cell_of_its_own(parts: list[float], width: int) -> None:
    cells = charts.shares(parts, width)

    if not sum(parts):
        assert cells == [0] * len(parts)
        return
    assert sum(cells) == width
    for part, cell in zip(parts, cells, strict=True):
        assert abs(cell - part / sum(parts) * width) < 1 + 1e-6
