"""TASK on the command line: how it is found, what it may be told, and what is said of mistakes."""

from __future__ import annotations

import hashlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import headwater
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import UsageError
from headwater.worker.load import LoadedTask, load_task
from kit.processes import run

OURS = str(Path(headwater.worker.load.__file__).parent)

TASK = """
import numpy as np
from headwater import ArrayData, Task

def make(**fields):
    return Task(**{
        "init": lambda key: {"w": np.ones(3, np.float32)},
        "loss": lambda params, batch, key: params["w"].sum(),
        "data": ArrayData(x=np.arange(10)),
        "optimizer": "sgd(0.1)",
        **fields,
    })
"""

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _python_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test works in a folder of its own, and leaves sys.path and sys.modules alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    modules = sys.modules.copy()
    yield
    for name in sys.modules.keys() - modules.keys():
        del sys.modules[name]
    sys.modules.update(modules)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file with `make`, which builds a Task, and then `text`."""

    def write(text: str = "task = make()", name: str = "mine.py", *, bare: bool = False) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(("" if bare else TASK) + textwrap.dedent(text))
        return path

    return write


def refusal(spec: str, *options: str) -> str:
    with pytest.raises(UsageError) as error:
        load_task(spec, options)
    return str(error.value)


def identities(loaded: LoadedTask) -> tuple[str, dict[str, str]]:
    return loaded.name, dict(loaded.options)


# ------------------------------------------------------------- where a task is found


@pytest.mark.parametrize("status", [0, 7])
def test_a_task_that_ends_python_while_loading_is_refused(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("leaves.py").write_text(f"import sys\nsys.exit({status})\n")

    with pytest.raises(UsageError, match=f"SystemExit: {status}$") as error:
        load_task("leaves.py")

    assert error.value.exit_status == 2


def test_a_file_is_loaded_by_its_path_and_named_for_it(write: Write) -> None:
    path = write()

    for spec in ("mine.py", "./mine.py", str(path)):
        loaded = load_task(spec)
        assert identities(loaded) == ("mine", {})
        assert len(loaded.task.dataset) == 10


def test_a_name_after_the_colon_is_part_of_the_tasks_name(write: Write) -> None:
    write("task = make()\nsmall = make(batch_size=2)")

    assert load_task("mine.py:small").task.batch_size == 2
    assert load_task("mine.py:small").name == "mine-small"
    assert load_task("mine.py:task").name == "mine"
    assert load_task("mine.py:").name == "mine"


def test_a_task_may_say_itself_what_it_is_called(write: Write) -> None:
    assert load_task(str(write('task = make(name="theirs")'))).name == "theirs"


def test_a_task_whose_model_cannot_be_made_is_refused_when_it_is_loaded(write: Write) -> None:
    backend = """
from headwater.worker.backend import AbstractBackend
class Backend(AbstractBackend):
    platform = "cpu"
    use = software = fingerprint = gradient_function = None
    def check(self, task):
        raise RuntimeError("no such model")
task = make(backend=Backend())
"""
    assert refusal(str(write(backend))).endswith("RuntimeError: no such model")


def test_where_jax_is_not_to_be_had_a_task_that_needs_it_is_told_so(write: Write) -> None:
    """Also where the task itself fell over that while it was loaded."""
    for text in ("task = make()", "import jax.numpy as jnp\nx = jnp.ones(3)\ntask = make()"):
        command = ["check", "--task", str(write(text)), "--platform", "tpu"]
        done = run(*command, cwd=Path.cwd())
        assert (done.status, done.output) == (2, "")
        assert done.errors.startswith("headwater check: error: --platform tpu cannot be had here")


def test_a_module_is_found_in_the_working_directory(write: Write) -> None:
    write(name="mypackage/__init__.py", bare=True, text="")
    write("task = make()\nsmall = make(batch_size=2)", name="mypackage/digits.py")

    assert load_task("mypackage.digits").name == "digits"
    assert load_task("mypackage.digits:small").name == "digits-small"
    assert load_task("mypackage.digits:small").task.batch_size == 2


def test_an_installed_module_is_found() -> None:
    assert load_task("headwater.examples.mnist").name == "mnist"


def test_the_files_folder_comes_first_on_the_path(write: Write, tmp_path: Path) -> None:
    write("helper = 7", name="elsewhere/helper.py", bare=True)
    write("import helper\ntask = make(batch_size=helper.helper)", name="elsewhere/mine.py")

    assert load_task("elsewhere/mine.py").task.batch_size == 7
    assert sys.path[0] == str(tmp_path / "elsewhere")

    load_task("elsewhere/mine.py")
    assert sys.path[:2].count(str(tmp_path / "elsewhere")) == 1


def test_the_working_directory_comes_first_on_the_path_for_a_module(write: Write) -> None:
    write()
    sys.path.insert(0, "/nowhere")

    load_task("mine")
    load_task("mine")

    assert sys.path[:2] == ["", "/nowhere"]


def test_what_a_files_helpers_import_by_its_name_is_the_file(write: Write) -> None:
    write("import mine\nbatch_size = lambda: mine.BATCH_SIZE", name="helper.py", bare=True)
    write("BATCH_SIZE = 5\nimport helper\ntask = make(batch_size=helper.batch_size())")

    assert load_task("mine.py").task.batch_size == 5


@pytest.mark.parametrize("name", ["random", "json", "jax", "headwater", "pytest"])
def test_a_file_with_the_name_of_a_loaded_module_is_loaded_all_the_same(
    name: str, write: Write
) -> None:
    __import__(name)
    before = sys.modules[name]
    write(name=f"{name}.py")

    loaded = load_task(f"{name}.py")

    assert loaded.name == name
    assert loaded.task.batch_size == 32
    assert sys.modules[name] is before


@pytest.mark.parametrize("name", ["two words.py", "class.py", "0.py", "mnist-small.py", "Öl.py"])
def test_a_files_name_need_not_be_a_name_in_python(name: str, write: Write) -> None:
    write(name=name)
    assert load_task(name).name == Path(name).stem


def test_a_class_in_a_file_finds_its_module_as_dataclasses_and_pickle_do(write: Write) -> None:
    write(
        """
        import sys
        class Sizes: pass
        task = make(batch_size=3 if sys.modules[Sizes.__module__].Sizes is Sizes else 1)
        """
    )
    assert load_task("mine.py").task.batch_size == 3


def test_the_source_is_hashed_so_that_a_change_shows(write: Write) -> None:
    path = write()

    loaded = load_task("mine.py")

    assert loaded.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    software = loaded.software()
    assert software["task source"] == loaded.source_sha256[:12]
    assert software["jax"] == jax.__version__
    assert software["optax"] == optax.__version__
    assert software["numpy"] == np.__version__
    assert software["python"] == sys.version.split()[0]


def test_the_identity_is_what_must_be_equal_on_both_sides(write: Write) -> None:
    write("def task(width: int = 1): return make(batch_size=4, seed=width)")

    identity = load_task("mine.py", ["width=9"]).identity()

    assert identity == pb.TaskIdentity(
        name="mine", options={"width": "9"}, example_count=10, batch_size=4, seed=9
    )


# ------------------------------------------------------------- options

OPTIONS = """
def task(
    count: int = 0, rate: float = 0.0, flag: bool = False, word: str = "", bare=None,
    many: "list[int]" = (),
):
    seen.append((count, rate, flag, word, bare, many))
    return make()

seen = []
"""


def arguments(*options: str) -> dict[str, Any]:
    """What a function with parameters of all kinds was given, less its defaults."""
    load_task("mine.py", options)
    names = ("count", "rate", "flag", "word", "bare", "many")
    (values,) = sys.modules["mine"].seen
    return {n: v for n, v in zip(names, values, strict=True) if v not in (0, "", None, ())}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("count=7", 7),
        ("count=-7", -7),
        ("count= 7 ", 7),
        ("count=1_000", 1000),
        ("rate=7", 7.0),
        ("rate=1e-3", 1e-3),
        ("rate=inf", float("inf")),
        ("flag=true", True),
        ("flag=TRUE", True),
        ("flag=1", True),
        ("flag=yes", True),
        ("word=7", "7"),
        ("word=a=b", "a=b"),
        ("word= a ", " a "),
        ("word='a'", "'a'"),
        ("bare=7", 7),
        ("bare=7.5", 7.5),
        ("bare='7'", "7"),
        ("bare=True", True),
        ("bare=(1, 2)", (1, 2)),
        ("bare={'a': [1]}", {"a": [1]}),
        ("bare=data/mnist.npz", "data/mnist.npz"),
        ("bare=two words", "two words"),
        ("bare=__import__('os').getcwd()", "__import__('os').getcwd()"),
        ("many=[1, 2]", [1, 2]),
        ("many=1, 2", (1, 2)),
    ],
)
def test_an_option_is_read_by_its_annotation_else_as_a_literal_else_as_text(
    option: str, value: Any, write: Write
) -> None:
    write(OPTIONS)
    (got,) = arguments(option).values()
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("text", ["false", "0", "no", "False"])
def test_a_flag_can_be_turned_off(text: str, write: Write) -> None:
    write("def task(flag: bool = True): return make(batch_size=1 if flag else 2)")
    assert load_task("mine.py", [f"flag={text}"]).task.batch_size == 2


def test_options_keep_their_text_for_the_identity(write: Write) -> None:
    write(OPTIONS)
    loaded = load_task("mine.py", ["rate=1e-3", "count=7", "rate=1e-4"])
    assert identities(loaded) == ("mine", {"rate": "1e-4", "count": "7"})


def test_annotations_may_be_texts_as_with_the_future_import(write: Write) -> None:
    write("def task(count: 'int' = 0): return make(seed=count)")
    assert load_task("mine.py", ["count=7"]).task.seed == 7


@pytest.mark.parametrize("name", ["cached", "of_maker", "small", "maker", "small_maker"])
def test_whatever_can_be_called_can_make_the_task_and_its_annotations_hold(
    name: str, write: Write
) -> None:
    write(
        """
        import functools
        seen = []

        @functools.cache
        def cached(word: str, batch_size: int = 32):
            seen.append(word)
            return make(batch_size=batch_size)

        small = functools.partial(cached.__wrapped__, batch_size=4)

        class Maker:
            @staticmethod
            def make(word: str): return cached(word)
            def __call__(self, word: str): return cached(word)

        of_maker = Maker.make
        maker = Maker()
        small_maker = functools.partial(maker)
        """
    )
    load_task(f"mine.py:{name}", ["word=2024"])
    assert sys.modules["mine"].seen == ["2024"]


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        ("str | None", "2024"),
        ("'Optional[str]'", "2024"),
        ("float | None", 2024.0),
        ("Path", Path("2024")),
        ("Path | None", Path("2024")),
        ("int | str", 2024),
    ],
)
def test_an_annotation_holds_where_none_is_allowed_too(
    annotation: str, value: Any, write: Write
) -> None:
    write(
        f"""
        from pathlib import Path
        from typing import Optional
        seen = []
        def task(word: {annotation} = None):
            seen.append(word)
            return make()
        """
    )
    load_task("mine.py", ["word=2024"])
    (got,) = sys.modules["mine"].seen
    assert (got, type(got)) == (value, type(value))


# ------------------------------------------------------------- mistakes in TASK


def test_a_file_that_is_not_there_is_named() -> None:
    assert refusal("nowhere/mine.py:small") == (
        "there is no file nowhere/mine.py; --task nowhere/mine.py:small names one"
    )


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").mkdir()
    assert refusal("mine.py") == "there is no file mine.py; --task mine.py names one"


def test_a_name_that_is_not_there_is_answered_with_those_that_are(write: Write) -> None:
    write("large = make()\nsmall = make()")

    assert refusal("mine.py") == ("mine.py has no 'task'; it has large, small: write mine.py:large")
    assert refusal("mine.py:tiny") == (
        "mine.py has no 'tiny'; it has large, small: write mine.py:large"
    )
    assert refusal("mine:tiny") == "mine has no 'tiny'; it has large, small: write mine:large"


def test_a_file_without_any_task_is_told_what_one_is(write: Write) -> None:
    write("")
    assert refusal("mine.py") == "mine.py has no 'task'; a task is a Task called `task`"


@pytest.mark.parametrize("spec", ["nowhere", "nowhere.mine", "headwater.examples.nowhere:small"])
def test_a_module_that_is_not_there_is_named(spec: str) -> None:
    assert refusal(spec) == (
        f"there is no module {spec.partition(':')[0]!r} (looked in the working directory and the "
        "installed packages); a file is named with its .py"
    )


@pytest.mark.parametrize(
    "spec", ["", ":small", "a/b", "mine.txt/", "a..b", ".mine", "mine.", "a b"]
)
def test_what_is_neither_a_file_nor_a_module_is_told_how_to_write_one(spec: str) -> None:
    place = spec.partition(":")[0]
    assert refusal(spec) == f"--task {place!r}: TASK is file.py[:NAME] or package.module[:NAME]"


@pytest.mark.parametrize(("value", "kind"), [("7", "int"), ("'text'", "str"), ("[make()]", "list")])
def test_what_is_no_task_is_refused(value: str, kind: str, write: Write) -> None:
    write(f"task = {value}")
    assert refusal("mine.py") == (
        f"task in mine.py is {kind}; it must be a Task or a function that returns one"
    )


@pytest.mark.parametrize(("value", "kind"), [("None", "NoneType"), ("{}", "dict")])
def test_a_function_that_returns_no_task_is_refused(value: str, kind: str, write: Write) -> None:
    write(f"def task(): return {value}")
    assert refusal("mine.py") == f"mine.py returned {kind}, not a Task"


# ------------------------------------------------------------- mistakes in options


@pytest.mark.parametrize("option", ["width", "", "=3", "wi dth=3", "--width=3", "1=2"])
def test_an_option_is_name_equals_value(option: str, write: Write) -> None:
    write(OPTIONS)
    assert refusal("mine.py", option) == f"--task-option takes NAME=VALUE, not {option!r}"


def test_an_option_that_the_function_does_not_take_is_answered_with_those_it_takes(
    write: Write,
) -> None:
    write("def task(width: int = 1, *, depth=2): return make()\ndef plain(): return make()")

    assert refusal("mine.py", "with=3") == (
        "mine.py takes no --task-option 'with'; it takes: width, depth"
    )
    assert refusal("mine.py:plain", "width=3") == (
        "mine.py:plain takes no --task-option 'width'; it takes: none"
    )


def test_an_option_that_is_missing_is_named(write: Write) -> None:
    write("def task(width, depth: int, *, name='x', **rest): return make()")

    assert refusal("mine.py") == "mine.py needs --task-option width=VALUE"
    assert refusal("mine.py", "width=1") == "mine.py needs --task-option depth=VALUE"


@pytest.mark.parametrize(
    ("option", "takes"),
    [
        ("count=seven", "a whole number"),
        ("count=7.5", "a whole number"),
        ("count=", "a whole number"),
        ("rate=fast", "a number"),
        ("flag=maybe", "true or false"),
        ("flag=", "true or false"),
        ("flag=2", "true or false"),
    ],
)
def test_an_option_of_another_type_is_told_its_type(option: str, takes: str, write: Write) -> None:
    write(OPTIONS)
    assert refusal("mine.py", option) == f"--task-option {option}: takes {takes}"


def test_a_task_takes_no_options(write: Write) -> None:
    write()
    assert refusal("mine.py", "width=3", "depth=2") == (
        "mine.py is a Task, which takes no --task-option; make it a function that returns one to "
        "take width, depth"
    )


# ------------------------------------------------------------- the user's own errors


def test_what_a_file_raises_is_shown_with_the_users_traceback_and_none_of_our_frames(
    write: Write,
) -> None:
    path = write("def broken():\n    raise ValueError('no such digit')\nbroken()", bare=True)

    assert refusal("mine.py") == textwrap.dedent(
        f"""\
        mine.py raised while it was loaded
        Traceback (most recent call last):
          File "{path}", line 3, in <module>
            broken()
          File "{path}", line 2, in broken
            raise ValueError('no such digit')
        ValueError: no such digit"""
    )


def test_what_a_module_raises_is_shown_in_the_same_way(write: Write) -> None:
    path = write("raise ValueError('no such digit')", bare=True)

    assert refusal("mine:task") == textwrap.dedent(
        f"""\
        mine raised while it was loaded
        Traceback (most recent call last):
          File "{path}", line 1, in <module>
            raise ValueError('no such digit')
        ValueError: no such digit"""
    )


@pytest.mark.parametrize("spec", ["mine.py", "mine"])
def test_a_module_that_the_users_module_lacks_is_the_users_error(spec: str, write: Write) -> None:
    write("import nowhere_at_all", bare=True)

    first, *_, last = refusal(spec).splitlines()

    assert first == f"{spec} raised while it was loaded"
    assert last == "ModuleNotFoundError: No module named 'nowhere_at_all'"


def test_a_name_that_a_module_lacks_is_the_users_error(write: Write) -> None:
    write("from headwater import Tusk", bare=True)

    message = refusal("mine")

    assert message.splitlines()[0] == "mine raised while it was loaded"
    assert "cannot import name 'Tusk'" in message


def test_what_the_tasks_function_raises_is_shown_with_the_users_traceback(write: Write) -> None:
    path = write("def task(width: int = 0): return 1 / width", bare=True)

    message = refusal("mine.py", "width=0")

    assert message.startswith(
        f'mine.py raised\nTraceback (most recent call last):\n  File "{path}", line 1, in task\n'
    )
    assert message.endswith("\nZeroDivisionError: division by zero")
    assert OURS not in message


@pytest.mark.parametrize("spec", ["mine.py", "mine"])
def test_what_a_task_refuses_is_said_with_the_users_line(spec: str, write: Write) -> None:
    path = write("task = Task(\n    init=print, loss=print, data=[], optimizer='', epochs=0\n)")
    line = path.read_text().splitlines().index("task = Task(") + 1

    assert refusal(spec) == (
        f"Task.epochs must be a whole number from 1 on, not 0 (mine.py, line {line})"
    )


@pytest.mark.parametrize("spec", ["mine.py", "mine"])
def test_a_syntax_error_is_shown_with_its_line(spec: str, write: Write) -> None:
    path = write("x = (1\ny = 2\n", bare=True)

    message = refusal(spec)

    assert message.splitlines()[0] == f"{spec} raised while it was loaded"
    assert f'  File "{path}", line 1\n    x = (1\n        ^\n' in message
    assert message.endswith("SyntaxError: '(' was never closed")


@pytest.mark.parametrize("spec", ["mine.py", "mine"])
def test_a_syntax_error_is_shown_without_our_frames(spec: str, write: Write) -> None:
    write("x = (1\n", bare=True)
    message = refusal(spec)
    assert OURS not in message
    assert "importlib" not in message


def test_an_annotation_that_cannot_be_read_is_the_users_error(write: Write) -> None:
    write("def task(width: 'Undefined' = 0): return make()")

    first, *_, last = refusal("mine.py").splitlines()

    assert first == "mine.py's annotations raise"
    assert last == "NameError: name 'Undefined' is not defined"


def test_our_own_errors_go_through_as_they_are(write: Write) -> None:
    write(
        """
        from headwater.protos.errors import UsageError
        def task(): raise UsageError("use it so")
        """
    )
    assert refusal("mine.py") == "use it so"


def test_the_message_says_it_all_so_no_chain_of_ours_is_shown_beside_it(write: Write) -> None:
    write("raise ValueError('no such digit')", bare=True)

    with pytest.raises(UsageError) as error:
        load_task("mine.py")

    assert error.value.__suppress_context__


def test_a_file_that_could_not_be_loaded_leaves_no_half_made_module(write: Write) -> None:
    write("raise ValueError('no such digit')", bare=True)

    refusal("mine.py")

    assert "mine" not in sys.modules


def test_options_are_checked_before_anything_is_loaded(write: Write) -> None:
    write("raise ValueError('loaded')", bare=True)
    assert "NAME=VALUE" in refusal("mine.py", "width")


def test_a_loaded_task_is_plain_data(write: Write) -> None:
    write(OPTIONS)
    loaded = load_task("mine.py", ["count=1"])
    assert json.loads(json.dumps(dict(loaded.options))) == {"count": "1"}
