"""What a program or a function says of an output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mergeflow import objective as module
from mergeflow.errors import ConfigError, ObjectiveError
from mergeflow.objective import Objective, check, score

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    """A command line that runs a script on `{file}`."""

    def written(script: str) -> str:
        (tmp_path / "score.py").write_text(script)
        return f"{sys.executable} {tmp_path / 'score.py'} {{file}}"

    return written


def size(path: str) -> float:
    """A score for the tests."""
    return float(Path(path).stat().st_size)


def nothing(path: str) -> None:
    """A score that has forgotten to return it."""


def fail(path: str) -> float:
    """A score that does not come to an end."""
    raise LookupError("no prompt for it")


def undefined(path: str) -> float:
    """A score that is no number."""
    return float("nan")


# a program


@pytest.mark.parametrize(
    ("printed", "number"),
    [("3", 3), ("loading\\n-0.25", -0.25), ("1\\n2e3\\n\\n", 2000), (" 7 ", 7), ("inf", float("inf"))],
    ids=repr,
)
def test_the_last_line_is_the_number(printed: str, number: float, program: Callable[[str], str]) -> None:
    assert score(Objective(command=program(f"print('{printed}')")), ["a"]) == number


def test_a_program_is_given_the_path_as_one_word(program: Callable[[str], str]) -> None:
    command = program(
        "import sys; print(sys.argv[1:] == ['/a dir/b \\'c.safetensors', '--x=/a dir/b \\'c.safetensors'])"
    )
    with pytest.raises(ObjectiveError, match="True"):
        score(Objective(command=f"{command} --x={{file}}"), ["/a dir/b 'c.safetensors"])


def test_several_outputs_have_a_number_each(program: Callable[[str], str]) -> None:
    command = program("import sys; print(len(sys.argv[1]))")
    assert score(Objective(command=command), ["a", "bcd"]) == (1, 3)


def test_what_a_program_that_failed_has_printed_is_shown(program: Callable[[str], str]) -> None:
    command = program("import sys; print('reading', sys.argv[1]); sys.exit('no such prompt')")
    with pytest.raises(ObjectiveError) as caught:
        score(Objective(command=command), ["/out/a.safetensors"])
    assert str(caught.value) == (
        "objective.command ended with 1 for /out/a.safetensors; it printed:\n"
        "    reading /out/a.safetensors\n    no such prompt"
    )


@pytest.mark.parametrize("script", ["print('good')", "print('nan')", "", "print('1\\n2 points')"])
def test_a_last_line_that_is_no_number_is_refused_with_what_was_printed(
    script: str, program: Callable[[str], str]
) -> None:
    with pytest.raises(ObjectiveError, match="must end with a line that is a number"):
        score(Objective(command=program(script)), ["a"])


def test_a_long_output_is_cut_to_its_end(program: Callable[[str], str]) -> None:
    with pytest.raises(ObjectiveError) as caught:
        score(Objective(command=program("[print('line', n) for n in range(1000)]")), ["a"])
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (module.SHOWN_LINES + 1, "    line 999")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("true", "does not say which file; write {file} where it goes"),
        ("./nowhere {file}", "there is no program ./nowhere that can be run"),
        ("score '{file}", "cannot be read: No closing quotation"),
    ],
)
def test_a_command_that_could_not_be_run_is_refused_beforehand(command: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(Objective(command=command))
    assert why in str(caught.value)


def test_a_command_that_can_be_run_is_not(program: Callable[[str], str]) -> None:
    check(Objective(command=program("")))


# a function


def test_a_function_is_called_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    wanted = Objective(target="tests.test_objective.size")
    check(wanted)
    assert score(wanted, [str(tmp_path / "a")]) == 5
    assert score(wanted, [str(tmp_path / "a")] * 2) == (5, 5)


def test_a_module_of_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_score_of_a_test.py").write_text("def score(path):\n    return 4\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert score(Objective(target="own_score_of_a_test.score"), ["a"]) == 4
    assert sys.path == before


@pytest.mark.parametrize("name", ["nowhere.score", "tests.test_objective.sise", "size", "", "."])
def test_a_function_that_cannot_be_found_is_refused_beforehand(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be found .*; give package.module.function"):
        check(Objective(target=name))


@pytest.mark.parametrize(
    ("name", "why"),
    [("fail", "LookupError: no prompt for it"), ("nothing", "TypeError: "), ("undefined", "ValueError: it is NaN")],
)
def test_a_function_that_fails_is_named_with_its_reason(name: str, why: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        score(Objective(target=f"tests.test_objective.{name}"), ["/out/a"])
    assert str(caught.value).startswith(f"objective.target=tests.test_objective.{name} failed for /out/a: {why}")
