"""The pages about caches say what the code and the record say."""

from __future__ import annotations

from tests.caches.table import METHODS_PAGE, PAGE, page, read_record, with_methods


def test_the_table_of_caches_is_that_of_the_classes() -> None:
    assert METHODS_PAGE.read_text() == with_methods(METHODS_PAGE.read_text()), "run python -m tests.caches.table"


def test_the_support_page_is_the_record() -> None:
    assert PAGE.read_text() == page(read_record()), "run python -m tests.caches.table"
