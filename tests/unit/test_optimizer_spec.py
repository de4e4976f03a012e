"""--optimizer: what a SPEC says, and where the caret stands when it cannot be read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headwater.worker.delayed_nesterov import delayed_nesterov
from headwater.worker.optimizer_spec import OptimizerError, SpecError, parse, transformation

PARAMS = {"b": jnp.array([0.3, -0.2]), "w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)}

GOOD: list[tuple[str, Callable[[], optax.GradientTransformation]]] = [
    ("sgd(0.1)", lambda: optax.sgd(0.1)),
    ("optax.sgd(0.1)", lambda: optax.sgd(0.1)),
    ("sgd(learning_rate=0.1)", lambda: optax.sgd(0.1)),
    ("  sgd (\n0.1 ,\tmomentum = 0.9,)  ", lambda: optax.sgd(0.1, momentum=0.9)),
    ("sgd(0.1, 0.9, True)", lambda: optax.sgd(0.1, 0.9, True)),
    ("sgd(0.1, momentum=None)", lambda: optax.sgd(0.1)),
    ("sgd(1_0 * 0x1 * 1e-2)", lambda: optax.sgd(0.1)),
    ("adam(3e-4)", lambda: optax.adam(3e-4)),
    ("adamw(3e-4, weight_decay=0.1)", lambda: optax.adamw(3e-4, weight_decay=0.1)),
    ("lion(1e-3, b1=.8)", lambda: optax.lion(1e-3, b1=0.8)),
    (
        "sgd(cosine_decay_schedule(0.1, total_updates), momentum=0.9)",
        lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 100), momentum=0.9),
    ),
    (
        "sgd(linear_schedule(0.1, 0.0, optax.total_updates))",
        lambda: optax.sgd(optax.linear_schedule(0.1, 0.0, 100)),
    ),
    (
        "sgd(warmup_cosine_decay_schedule(0.0, 0.1, total_updates // 20, total_updates - 1))",
        lambda: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 99)),
    ),
    (
        "sgd(schedules.constant_schedule(0.1))",
        lambda: optax.sgd(optax.schedules.constant_schedule(0.1)),
    ),
    (
        "chain(clip_by_global_norm(0.5), adam(1e-2))",
        lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    ),
    (
        "chain(chain(clip(1.0), trace(0.9)), scale(-1e-2))",
        lambda: optax.chain(optax.chain(optax.clip(1.0), optax.trace(0.9)), optax.scale(-1e-2)),
    ),
    (
        "sgd(join_schedules([constant_schedule(0.1), constant_schedule(0.2)], [2]))",
        lambda: optax.sgd(
            optax.join_schedules([optax.constant_schedule(0.1), optax.constant_schedule(0.2)], [2])
        ),
    ),
    (
        "sgd(piecewise_constant_schedule(0.1, {1: 0.5, 2: 0.5}))",
        lambda: optax.sgd(optax.piecewise_constant_schedule(0.1, {1: 0.5, 2: 0.5})),
    ),
    (
        "partition({'one': sgd(0.1), 'two': adam(0.1)}, {'b': 'one', 'w': 'two'})",
        lambda: optax.partition(
            {"one": optax.sgd(0.1), "two": optax.adam(0.1)}, {"b": "one", "w": "two"}
        ),
    ),
    (
        "masked(sgd(0.1), {'b': True, 'w': False})",
        lambda: optax.masked(optax.sgd(0.1), {"b": True, "w": False}),
    ),
    (
        "inject_hyperparams(sgd)(learning_rate=0.1)",
        lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    ),
    ("apply_if_finite(adam(0.1), 5)", lambda: optax.apply_if_finite(optax.adam(0.1), 5)),
    ("contrib.prodigy(0.1)", lambda: optax.contrib.prodigy(0.1)),
    ("adam(0.1, live(0.8), b2=live(9 / 10))", lambda: optax.adam(0.1, 0.8, b2=0.9)),
    ("sgd(learning_rate=live(-0.1))", lambda: optax.sgd(-0.1)),
    ("delayed_nesterov(0.1, delay=2)", lambda: delayed_nesterov(0.1, delay=2)),
    ("scale_by_learning_rate(0.1)", lambda: optax.scale_by_learning_rate(0.1)),
    ("(((sgd(((0.1))))))", lambda: optax.sgd(0.1)),
]


def three_updates(tx: optax.GradientTransformation) -> Any:
    """Not jitted: its operations are then compiled once for all tests."""
    tx = optax.with_extra_args_support(tx)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        grads = jax.tree.map(lambda x: 2 * x, params)  # of the sum of squares
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


@pytest.mark.parametrize(("spec", "by_hand"), GOOD, ids=[spec.strip() for spec, _ in GOOD])
def test_a_spec_is_the_optax_call_that_it_reads_as(
    spec: str, by_hand: Callable[[], optax.GradientTransformation]
) -> None:
    got, want = three_updates(parse(spec, total_updates=100)), three_updates(by_hand())

    for name in PARAMS:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.skipif(not hasattr(optax.contrib, "muon"), reason="this optax has no muon")
def test_a_dotted_name_is_looked_up_in_optaxs_own_modules() -> None:
    got = three_updates(parse("contrib.muon(0.1, ns_steps=2)", 100))
    np.testing.assert_array_equal(got["w"], three_updates(optax.contrib.muon(0.1, ns_steps=2))["w"])


@pytest.mark.parametrize(
    ("arithmetic", "value"),
    [
        ("0.1", 0.1),
        ("0.3 - 0.1 - 0.1", 0.3 - 0.1 - 0.1),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("7 // 2 / 2", 1.5),
        ("-2 * -3", 6),
        ("- -2", 2),
        ("-(1 - 3)", 2),
        ("total_updates // 3", 33),
        ("0.1 * (1 - 1 / total_updates)", 0.1 * (1 - 1 / 100)),
        ("1e-3*256/32", 1e-3 * 256 / 32),
    ],
)
def test_arithmetic_is_pythons(arithmetic: str, value: float) -> None:
    moved = three_updates(parse(f"scale({arithmetic})", 100))["b"]
    np.testing.assert_array_equal(moved, three_updates(optax.scale(value))["b"])


MISPLACED = "live marks a number argument of an optimizer's call, as in adam(1e-3, b1=live(0.9))"
ELSEWHERE = "only names of optax, numbers, strings, lists, dicts and + - * / // can stand here"
NOT_CLOSED = "'(' was never closed; write it as adam(1e-3)"
NOTHING = "invalid syntax; write it as adam(1e-3)"

# The caret of the message, written under the SPEC; then the message.
BAD = [
    ("adm(1e-3)",
     "^", "'adm' is not a function of optax; did you mean adam?"),
    ("chain(clip(1.0), adamm(1e-3))",
     "                 ^", "'adamm' is not a function of optax; did you mean adam?"),
    ("sgd(cosine_decay_schedule(0.1, total_update))",
     "                               ^",
     "'total_update' is not a function of optax; did you mean total_updates?"),
    ("optax.qqqqqqqqq(1)",
     "^", "'qqqqqqqqq' is not a function of optax"),
    ("sgd(x)",
     "    ^", "'x' is not a function of optax"),
    ("adam.__init__",
     "^", "'adam.__init__' is not a function of optax"),
    ("optax._src.alias.adam(1e-3)",
     "^", "'_src.alias.adam' is not a function of optax"),
    ("chain(contrib.__loader__.load_module('os'))",
     "      ^", "'contrib.__loader__.load_module' is not a function of optax"),
    ("optax.jax.devices()",
     "^", "'jax.devices' is not a function of optax"),
    ("contrib.jax.numpy.save('x', 1)",
     "^", "'contrib.jax.numpy.save' is not a function of optax"),
    ("__import__('os').system('true')",
     "^", "a name of optax must stand before the dot"),
    ("adam(1e-3).__class__",
     "^", "a name of optax must stand before the dot"),
    ("chain(sgd(0.1).init)",
     "      ^", "a name of optax must stand before the dot"),
    ("'adam'.upper()",
     "^", "a name of optax must stand before the dot"),
    ("print('hello')",
     "^", "'print' is not a function of optax"),
    ("open('x', 'w')",
     "^", "'open' is not a function of optax"),
    ("lambda: adam(1e-3)",
     "^", ELSEWHERE),
    ("adam((lambda: 1)())",
     "      ^", ELSEWHERE),
    ("chain(*[sgd(0.1)])",
     "      ^", "* is not understood here"),
    ("adam(**{'learning_rate': 1})",
     "       ^", "** is not understood here"),
    ("chain(sgd(x) for x in [1])",
     "     ^", ELSEWHERE),
    ("chain([sgd(x) for x in [1]])",
     "      ^", ELSEWHERE),
    ("sgd([0.1][0])",
     "    ^", ELSEWHERE),
    ("adam[0]",
     "^", ELSEWHERE),
    ("sgd(f'{1}')",
     "    ^", ELSEWHERE),
    ("sgd({0.1})",
     "    ^", ELSEWHERE),
    ("sgd(0.1 if 1 else 0.2)",
     "    ^", ELSEWHERE),
    ("sgd(0.1 or 0.2)",
     "    ^", ELSEWHERE),
    ("sgd(1 < 2)",
     "    ^", ELSEWHERE),
    ("sgd(not 1)",
     "    ^", ELSEWHERE),
    ("sgd(~1)",
     "    ^", ELSEWHERE),
    ("sgd((x := 0.1))",
     "     ^", ELSEWHERE),
    ("await sgd(0.1)",
     "^", ELSEWHERE),
    ("sgd(0.1 ** 2)",
     "    ^", "the operators are + - * / //"),
    ("sgd(1 - 0.1 ** 2)",
     "        ^", "the operators are + - * / //"),
    ("sgd(1 @ 2)",
     "    ^", "the operators are + - * / //"),
    ("sgd(7 % 2)",
     "    ^", "the operators are + - * / //"),
    ("sgd(1 << 2)",
     "    ^", "the operators are + - * / //"),
    ("sgd(b'0.1')",
     "    ^", "b'0.1' is not a number, string, True, False or None"),
    ("sgd(0.1j)",
     "    ^", "0.1j is not a number, string, True, False or None"),
    ("sgd(...)",
     "    ^", "Ellipsis is not a number, string, True, False or None"),
    ("sgd(0.1 + 'a')",
     "          ^", "arithmetic takes numbers; this is str 'a'"),
    ("sgd(-True)",
     "     ^", "arithmetic takes numbers; this is bool True"),
    ("sgd(2 * constant_schedule(0.1))",
     "        ^", "arithmetic takes numbers; this is a function, "),
    ("sgd(1 / (2 - 2))",
     "    ^", "division by zero"),
    ("sgd(1 + 10 // 0)",
     "        ^", ""),
    ("sgd(piecewise_constant_schedule(0.1, {x: 1}))",
     "                                      ^", "a key must be a number or a string"),
    ("sgd(piecewise_constant_schedule(0.1, {**{}}))",
     "                                     ^", "a key must be a number or a string"),
    ("chain(1(2))",
     "      ^", "1 cannot be called"),
    ("chain(sgd(0.1)(1))",
     "      ^", "sgd(0.1) cannot be called"),
    ("adam(rate=1e-3)",
     "^", "optax says: adam() got an unexpected keyword argument 'rate'"),
    ("chain(clip(1.0), adam())",
     "                 ^",
     "optax says: adam() missing 1 required positional argument: 'learning_rate'"),
    ("sgd(cosine_decay_schedule(0.1, 0))",
     "    ^",
     "optax says: The cosine_decay_schedule requires positive decay_steps, got decay_steps=0."),
    ("delayed_nestrov(0.1)",
     "^", "'delayed_nestrov' is not a function of optax; did you mean delayed_nesterov?"),
    ("delayed_nesterov(0.1, delay=0)",
     "^", "optax says: "),
    ("live(adam(1e-3))",
     "^", MISPLACED),
    ("adam(2 * live(1e-3))",
     "         ^", MISPLACED),
    ("adam((live(1e-3), 1))",
     "      ^", MISPLACED),
    ("sgd(cosine_decay_schedule(live(0.1), 10))",
     "                          ^", MISPLACED),
    ("inject_hyperparams(sgd)(learning_rate=live(0.1))",
     "                                      ^", MISPLACED),
    ("adam(live())",
     "     ^", "live takes one number, such as live(0.9)"),
    ("adam(live(1, 2))",
     "     ^", "live takes one number, such as live(0.9)"),
    ("adam(live(True))",
     "     ^", "live takes one number, such as live(0.9)"),
    ("adam(live(constant_schedule(1)))",
     "     ^", "live takes one number, such as live(0.9)"),
    ("adam(live)",
     "     ^", "'live' is not a function of optax"),
    ("adam",
     "^", "this gives a function, adam, not an optimizer; write one such as adam(1e-3)"),
    ("cosine_decay_schedule(0.1, 10)",
     "^", "this gives a function, schedule, not an optimizer; write one such as adam(1e-3)"),
    ("total_updates",
     "^", "this gives int 100, not an optimizer; write one such as adam(1e-3)"),
    ("'adam(1e-3)'",
     "^", "this gives str 'adam(1e-3)', not an optimizer; write one such as adam(1e-3)"),
    ("[adam(1e-3), 0.5][1]",
     "^", ELSEWHERE),
    ("adam(1e-3",
     "    ^", NOT_CLOSED),
    ("chain(sgd(0.1), adam(1e-3)",
     "     ^", NOT_CLOSED),
    ("adam(1e-3))",
     "          ^", "unmatched ')'; write it as adam(1e-3)"),
    ("adam(1e-3]",
     "         ^",
     "closing parenthesis ']' does not match opening parenthesis '('; write it as adam(1e-3)"),
    ("adam(1 2)",
     "     ^", "invalid syntax. Perhaps you forgot a comma?; write it as adam(1e-3)"),
    ("sgd('0.1)",
     "    ^", "unterminated string literal (detected at line 1); write it as adam(1e-3)"),
    ("import os",
     "^", NOTHING),
    ("adam(1e-3); print(1)",
     "          ^", NOTHING),
    ("adam 1e-3",
     "     ^", NOTHING),
    ("",
     "^", NOTHING),
    ("é",
     "^", "'é' is not a function of optax"),
    ("sgd('é', x)",
     "         ^", "'x' is not a function of optax"),
    ("partition({'日本': sgd(0.1), '語': 1 / 0}, {})",
     "                                ^", "division by zero"),
    ("sgd('\N{PARTY POPPER}', 1 / 0)",
     "         ^", "division by zero"),
    ("sgd(0.1) + 1",
     "^", "arithmetic takes numbers; this is GradientTransformationExtraArgs"),
    ("sgd('é', 1 2)",
     "         ^", "invalid syntax. Perhaps you forgot a comma?; write it as adam(1e-3)"),
    ("sgd('é', (1",
     "         ^", NOT_CLOSED),
]  # fmt: skip


def refusal(spec: str) -> SpecError:
    with pytest.raises(SpecError) as error:
        parse(spec, total_updates=100)
    return error.value


@pytest.mark.parametrize(("spec", "caret", "message"), BAD, ids=[spec for spec, _, _ in BAD])
def test_what_cannot_be_read_is_pointed_at(spec: str, caret: str, message: str) -> None:
    first, shown, pointer = str(refusal(spec)).split("\n")

    assert pointer == f"    {caret}"
    assert shown == f"    {spec}"
    assert first.startswith(f"--optimizer, character {len(caret)}: {message}")


def test_the_option_that_gave_it_is_named() -> None:
    with pytest.raises(SpecError) as error:
        transformation("sgd(0.1, momentum=x)", 10, option="--inner-optimizer")

    assert str(error.value) == (
        "--inner-optimizer, character 19: 'x' is not a function of optax\n"
        "    sgd(0.1, momentum=x)\n"
        "                      ^"
    )


def test_lines_and_spaces_are_shown_as_one_space_each() -> None:
    assert str(refusal(" adam(1e-3,\n\n    b1 = 1/0)")) == (
        "--optimizer, character 17: division by zero\n"
        "    adam(1e-3, b1 = 1/0)\n"
        "                    ^"
    )


def test_a_wrong_spec_is_wrong_usage() -> None:
    assert refusal("adm(1)").exit_status == 2


@pytest.mark.parametrize("spec", ["contrib", "schedules", "chain(losses)"])
def test_a_module_is_not_an_optimizer(spec: str) -> None:
    assert "is not a function of optax" in str(refusal(spec))


@pytest.mark.parametrize("spec", ["contrib", "optax.__builtins__", "optax._src"])
def test_a_suggestion_is_a_name_that_can_stand_there(spec: str) -> None:
    assert "did you mean" not in str(refusal(spec))


@pytest.mark.parametrize(
    "spec",
    ["(" * 5000, "[" * 5000 + "]" * 5000, "-" * 100_000 + "1", "1" + "+1" * 10_000, "1 +" * 10_000],
    ids=["brackets", "lists", "minus", "plus", "no end"],
)
def test_very_deep_nesting_is_refused(spec: str) -> None:
    assert str(refusal(spec)).startswith("--optimizer, character ")


def test_a_sum_that_python_parses_but_we_cannot_follow_is_refused() -> None:
    assert str(refusal(f"sgd(1{'+1' * 450})")).startswith("--optimizer, character ")


@pytest.mark.parametrize("spec", [f"0x{'f' * 5000}", f"0x{'f' * 5000}()"])
def test_a_number_too_long_to_write_out_is_refused(spec: str) -> None:
    assert str(refusal(spec)).startswith("--optimizer, character ")


def test_numbers_past_what_a_float_holds_are_refused() -> None:
    assert "int too large to convert to float" in str(refusal(f"sgd(1.0 * {'9' * 400})"))


# The same examples every time and no limits of time: the verdict is about the code alone.
quick = settings(
    derandomize=True,
    deadline=None,
    max_examples=250,
    suppress_health_check=[HealthCheck.too_slow],
)

HARMFUL = [
    "__import__('os').system('touch was-run')",
    "open('was-run', 'w')",
    "().__class__.__bases__[0].__subclasses__()",
    'exec(\'open("was-run", "w")\')',
    "eval('exit()')",
    "optax.__builtins__['exec']('1')",
    "adam.__globals__",
    "getattr(optax, 'jax')",
    "chain.__call__(sgd(0.1))",
    "9**9**9**9",
    "'a' * 10 ** 10",
    "[0] * 1000000000000",
    "sgd(0.1) if exit() else 1",
]

words = st.sampled_from(
    [
        *("adam", "sgd", "chain", "optax", "contrib", "total_updates", "schedules", "clip"),
        "live",
        *("__import__", "__class__", "lambda", "for", "in", "if", "else", "not", "await", "yield"),
        *("(", ")", "[", "]", "{", "}", ",", ":", ":=", "=", ".", "*", "**", "@", "-", "+", "/"),
        *("//", "%", "~", "<", "'a'", "'", '"', "b'a'", "f'{x}'", "0", "1e-3", "0.1", "1j", "..."),
        *("é", "日本", " ", "\n", "\t", "\\", "#", ";", "\0", "\ufeff", "\ud800"),
    ]
)


def assert_an_optimizer_or_a_spec_error(spec: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, about the text
            assert isinstance(parse(spec, 100), optax.GradientTransformation)
    except SpecError as error:
        first, *_, pointer = str(error).split("\n")
        assert first.startswith("--optimizer, character ")
        assert pointer.strip() == "^"


@quick
@given(st.text(max_size=60))
def test_arbitrary_text_raises_nothing_but_a_spec_error(spec: str) -> None:
    assert_an_optimizer_or_a_spec_error(spec)


@quick
@given(st.lists(words, max_size=25).map("".join))
@example("adam(1e-3)")
def test_arbitrary_words_of_python_raise_nothing_but_a_spec_error(spec: str) -> None:
    assert_an_optimizer_or_a_spec_error(spec)


@pytest.mark.parametrize("spec", HARMFUL)
@pytest.mark.parametrize("around", ["{}", "sgd({})", "chain(sgd(0.1), {})", "sgd(-({}))"])
def test_what_would_do_harm_is_never_run(
    spec: str, around: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert refusal(around.format(spec))
    assert list(tmp_path.iterdir()) == []


def test_infinite_and_missing_numbers_are_optaxs_to_judge() -> None:
    """A SPEC is read as Python reads it; what the numbers do is the user's choice."""
    assert math.isinf(float(three_updates(parse("scale(1e999)", 1))["b"][0]))


def test_what_a_worker_trains_with_is_plain_optax() -> None:
    made = optax.sgd(0.1)

    assert transformation(made, 10) == (made, "the task's own optimizer")
    assert transformation(lambda updates: made, 10) == (made, "the task's own optimizer")
    got, text = transformation("sgd(0.1 / total_updates)", 10)
    assert text == "sgd(0.1 / total_updates)"
    np.testing.assert_array_equal(three_updates(got)["w"], three_updates(optax.sgd(0.01))["w"])


def test_what_is_no_optimizer_is_refused_where_it_was_given() -> None:
    with pytest.raises(OptimizerError, match=r"^Task\.inner is 3; it must be an optax"):
        transformation(3, 10, what="Task.inner")
    with pytest.raises(OptimizerError, match=r"^Task\.inner\(10\) returned int, not an optax"):
        transformation(lambda updates: 3, 10, what="Task.inner")
