"""The user's own errors, shown as Python shows them: from the user's first line on."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from headwater import ArrayData, Task
from headwater.protos.errors import HeadwaterError, RunFailed, UsageError
from headwater.worker import user_code
from headwater.worker.gradient import GradientFunction
from headwater.worker.user_code import UserCodeError, guard_user_code, user_place

OURS = str(Path(user_code.__file__).parent)

BATCH = {"x": np.ones((2, 3), np.float32)}

Load = Callable[[str], ModuleType]


@pytest.fixture(autouse=True)
def _this_file_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests stand where our commands do: their frames are none of the user's."""
    ours = [*user_code._OUR_FOLDERS, Path(__file__).parent]
    monkeypatch.setattr(user_code, "_OUR_FOLDERS", ours)


@pytest.fixture
def user(tmp_path: Path) -> Iterator[Load]:
    """Makes a module of the user's from its source."""

    def load(source: str) -> ModuleType:
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location("headwater_test_mine", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["headwater_test_mine"] = module
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("headwater_test_mine", None)


def guarded(call: Callable[[], Any], what: str = "the task raised") -> str:
    """What is shown of what `call` raises."""
    with pytest.raises(UserCodeError) as error, guard_user_code(what):
        call()
    return str(error.value)


def compile_loss(loss: Callable[..., Any]) -> None:
    task = Task(
        init=lambda key: {"w": jnp.ones(2)}, loss=loss, data=ArrayData(x=[1]), optimizer="sgd(1)"
    )
    GradientFunction(task, 0).compile(BATCH)


def test_the_traceback_begins_with_the_users_first_line(user: Load, tmp_path: Path) -> None:
    mine = user(
        """\
        def inner():
            raise ValueError("no such digit")

        def outer(*arguments):
            inner()
        """
    )

    # Through our own frames, as a worker calls a loss.
    shown = guarded(lambda: compile_loss(mine.outer))

    assert shown == textwrap.dedent(
        f"""\
        the task raised
        Traceback (most recent call last):
          File "{tmp_path}/mine.py", line 5, in outer
            inner()
          File "{tmp_path}/mine.py", line 2, in inner
            raise ValueError("no such digit")
        ValueError: no such digit"""
    )


def test_jaxs_note_about_its_frames_is_left_out(user: Load) -> None:
    mine = user(
        """
        import jax.numpy as jnp
        def loss(params, batch, key):
            return (batch["x"] @ params["w"]).mean()
        """
    )

    shown = guarded(lambda: compile_loss(mine.loss))

    lines = shown.splitlines()
    assert lines[:2] == ["the task raised", "Traceback (most recent call last):"]
    assert 'mine.py", line 4, in loss' in lines[2]
    assert lines[-1].startswith("TypeError: dot_general requires contracting dimensions")
    assert "JAX has removed its internal frames" not in shown
    assert OURS not in shown


def test_other_notes_are_kept(user: Load) -> None:
    mine = user(
        """
        def loss(*arguments):
            error = ValueError("no such digit")
            error.add_note("digits are 0 to 9")
            error.add_note("For simplicity, JAX has removed its internal frames from the ...")
            raise error
        """
    )

    shown = guarded(lambda: compile_loss(mine.loss))

    assert shown.endswith("ValueError: no such digit\ndigits are 0 to 9")


def test_frames_of_libraries_that_the_users_code_calls_are_kept(user: Load) -> None:
    mine = user(
        """
        import json
        def loss(*arguments):
            json.loads("{")
        """
    )

    shown = guarded(lambda: compile_loss(mine.loss))

    assert shown.index("mine.py") < shown.index("json/decoder.py") < shown.index("JSONDecodeError")


def test_an_error_without_any_frame_of_the_users_has_none_of_ours_either() -> None:
    shown = guarded(lambda: compile_loss(lambda *arguments: 1 / 0))

    assert "test_user_code" not in shown
    assert OURS not in shown
    assert shown.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_the_place_of_an_error_is_the_last_of_the_users_own_lines(user: Load) -> None:
    mine = user("def loss(*arguments):\n    return {}['digits']")

    with pytest.raises(KeyError) as error:
        compile_loss(mine.loss)

    assert user_place(error.value) == " (mine.py, line 2)"
    assert user_place(KeyError("never raised")) == ""


def test_an_example_is_a_users_code() -> None:
    from headwater.examples.character_lm import load

    shown = guarded(lambda: load("nowhere.txt", 64))

    assert 'examples/character_lm.py", line' in shown
    assert shown.splitlines()[-1].startswith("FileNotFoundError: there is no file ")


@pytest.mark.parametrize("error", [UsageError("use it so"), RunFailed("over"), HeadwaterError("x")])
def test_our_own_errors_go_through_as_they_are(error: HeadwaterError) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(HeadwaterError) as raised, guard_user_code("the task raised"):
        fail()

    assert raised.value is error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_is_no_error_of_the_users(kind: type[BaseException]) -> None:
    with pytest.raises(kind), guard_user_code("the task raised"):
        raise kind


def test_what_goes_well_is_not_touched() -> None:
    with guard_user_code("the task raised"):
        found = 7
    assert found == 7


def test_the_error_itself_is_the_cause_for_a_debugger() -> None:
    error = ValueError("no such digit")

    with pytest.raises(UserCodeError) as shown, guard_user_code("the task raised"):
        raise error

    assert shown.value.__cause__ is error
    assert shown.value.exit_status == 1


def test_what_the_users_data_raises_begins_with_the_users_line_too(user: Load) -> None:
    mine = user(
        """
        def data():
            raise FileNotFoundError("digits.npz")
        """
    )
    task = Task(init=dict, loss=print, data=mine.data, optimizer="sgd(1)")

    shown = guarded(lambda: task.dataset)

    assert "mine.py" in shown.splitlines()[2]
    assert OURS not in shown


@pytest.mark.parametrize("chained", [" from error", ""])
def test_what_led_to_the_error_is_shown_before_it(chained: str, user: Load) -> None:
    mine = user(
        f"""
        def loss(*arguments):
            try:
                {{}}["digits"]
            except KeyError as error:
                raise ValueError("cannot load"){chained}
        """
    )

    shown = guarded(lambda: compile_loss(mine.loss))

    assert "KeyError: 'digits'\n" in shown.partition("ValueError: cannot load")[0]
    assert OURS not in shown


def test_what_the_user_chose_to_hide_stays_hidden(user: Load) -> None:
    mine = user(
        """
        def loss(*arguments):
            try:
                {}["digits"]
            except KeyError:
                raise ValueError("cannot load") from None
        """
    )

    shown = guarded(lambda: compile_loss(mine.loss))

    assert "KeyError" not in shown


def test_the_users_folder_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "concurrent" / "mine.py"
    code = compile("def loss(*arguments):\n    raise ValueError('no such digit')", path, "exec")
    space: dict[str, Any] = {}
    exec(code, space)  # noqa: S102  (the test's own text)

    shown = guarded(lambda: compile_loss(space["loss"]))

    assert f'File "{path}", line 2, in loss' in shown
    assert OURS not in shown
