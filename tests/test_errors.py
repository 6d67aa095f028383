from __future__ import annotations

import inspect
import pickle
import re

import pytest

from mergeflow import errors
from mergeflow.errors import (
    ConfigError,
    ExecutorError,
    FormatError,
    MergeflowError,
    OverBudget,
    Problems,
    SelectionError,
    SourceChanged,
    StorageError,
    UnmergeableValues,
    UsageError,
    raise_all,
)

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, MergeflowError)]


def drawn_tree() -> dict[str, str | None]:
    """Every class that the module's docstring draws, with the class that it hangs from."""
    parents: dict[str, str | None] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"^    ((?:│   |    |├── |└── )*)([A-Z]\w+)  ", line):
            depth = len(found[1]) // 4
            above[depth:] = [found[2]]
            parents[found[2]] = above[depth - 1] if depth else None
    return parents


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    actual = {kind.__name__: None if kind is MergeflowError else kind.__bases__[0].__name__ for kind in CLASSES}
    assert drawn_tree() == actual


def test_the_tree_in_the_docstring_tells_the_exit_codes() -> None:
    stated = {found[1]: int(found[2]) for found in re.finditer(r"(\w+) +exit code (\d)", errors.__doc__ or "")}
    assert stated == {"MergeflowError": MergeflowError.exit_code, "UsageError": UsageError.exit_code}


def test_only_bad_usage_exits_with_2() -> None:
    for kind in CLASSES:
        if kind is not Problems:
            assert kind.exit_code == (2 if issubclass(kind, UsageError) else 1)


def test_a_run_can_be_resumed_after_what_leaves_its_drafts_as_good_as_they_were() -> None:
    resumable = {kind.__name__ for kind in CLASSES if kind.resumable}
    assert resumable == {"StorageError", "ReadFailed", "ExecutorError", "HeadLost"}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not Problems], ids=lambda kind: kind.__name__)
def test_an_error_crosses_processes_unchanged(kind: type[MergeflowError], protocol: int) -> None:
    error = kind("'a.weight' of m3: 1,280 values, not 640")
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert copy.exit_code == error.exit_code
    assert copy.resumable == error.resumable


@pytest.mark.parametrize(
    ("found", "code"),
    [
        pytest.param([ConfigError("a"), SelectionError("b")], 2, id="all-usage"),
        pytest.param([ConfigError("a"), FormatError("b")], 1, id="mixed"),
        pytest.param([StorageError("a"), OverBudget("b")], 1, id="none-usage"),
    ],
)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_problems_cross_processes_unchanged(found: list[MergeflowError], code: int, protocol: int) -> None:
    problems = Problems(found)
    copy: Problems = pickle.loads(pickle.dumps(problems, protocol))
    assert type(copy) is Problems
    assert str(copy) == str(problems) == "2 problem(s):\n  - a\n  - b"
    assert copy.exit_code == problems.exit_code == code
    assert [(type(error), str(error)) for error in copy.errors] == [(type(error), str(error)) for error in found]


@pytest.mark.parametrize(
    ("found", "resumable"),
    [
        pytest.param([StorageError("a"), ExecutorError("b")], True, id="after-all"),
        pytest.param([StorageError("a"), SourceChanged("b")], False, id="not-after-one"),
        pytest.param([SourceChanged("a"), UnmergeableValues("b")], False, id="after-none"),
    ],
)
def test_a_run_can_be_resumed_after_several_problems_only_if_it_can_after_each(
    found: list[MergeflowError], resumable: bool
) -> None:
    problems = Problems(found)
    assert problems.resumable is resumable
    assert pickle.loads(pickle.dumps(problems)).resumable is resumable


def test_raising_nothing_is_silent() -> None:
    raise_all([])


def test_raising_one_error_raises_that_very_one() -> None:
    error = OverBudget("too much")
    with pytest.raises(OverBudget) as caught:
        raise_all(iter([error]))
    assert caught.value is error


def test_raising_several_errors_shows_them_all_in_order() -> None:
    found = [FormatError("first"), StorageError("second"), FormatError("third")]
    with pytest.raises(Problems) as caught:
        raise_all(iter(found))
    assert caught.value.errors == tuple(found)
    assert str(caught.value) == "3 problem(s):\n  - first\n  - second\n  - third"


def test_problems_among_problems_are_shown_side_by_side() -> None:
    a, b, c = FormatError("a"), StorageError("b"), ConfigError("c")
    with pytest.raises(Problems) as caught:
        raise_all([Problems([a, b]), c])
    assert caught.value.errors == (a, b, c)


def test_problems_that_hold_a_single_error_raise_it_alone() -> None:
    error = FormatError("a")
    with pytest.raises(FormatError) as caught:
        raise_all([Problems([error])])
    assert caught.value is error
