"""Of a sweep a part is run: always the same one, at least one case, and the rest says who runs it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import _thin


class Case:
    """What is looked at of a collected test."""

    def __init__(self, nodeid: str, one_in: int | None, *, whole: bool = False):
        self.nodeid, self._one_in, self._whole, self.marks = nodeid, one_in, whole, list[Any]()

    def get_closest_marker(self, name: str) -> Any:
        if name == "whole":
            return pytest.mark.whole.mark if self._whole else None
        return None if self._one_in is None else getattr(pytest.mark, name)(one_in=self._one_in).mark

    def add_marker(self, marker: Any) -> None:
        self.marks.append(marker)


def test_one_case_in_so_many_is_run() -> None:
    few = [Case(f"tests/a.py::few[{number}]", 3) for number in range(2)]
    many = [Case(f"tests/a.py::many[{ranks}-{number}]", 3) for number in range(7) for ranks in (1, 2, 3)]
    plain = [Case(f"tests/a.py::plain[{number}]", None) for number in range(5)]
    _thin([*many, *plain, *few])  # type: ignore[list-item]
    left = {case.nodeid for case in (*few, *many, *plain) if not case.marks}
    assert sum("few" in name for name in left) == 1
    assert sum("many" in name for name in left) == 7
    assert sum("plain" in name for name in left) == 5
    assert {name.partition("[")[2][0] for name in left if "many" in name} == {"1", "2", "3"}
    again = [Case(case.nodeid, 3) for case in reversed(many)]
    _thin(again)  # type: ignore[arg-type]
    assert {case.nodeid for case in again if not case.marks} == {name for name in left if "many" in name}
    long = [Case("tests/a.py::long", None, whole=True), Case("tests/a.py::short", None)]
    _thin(long)  # type: ignore[arg-type]
    assert [bool(case.marks) for case in long] == [True, False]
    assert all("test-whole" in case.marks[0].kwargs["reason"] for case in again if case.marks)
