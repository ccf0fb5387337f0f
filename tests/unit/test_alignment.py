"""Intervals that the probe saw become atoms: the same rows have the same name wherever they appear."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parafuse.engine.alignment import Alignment, Interval, Node, Place

Q, K = Place("q", 0, 2), Place("k", 0, 2)
TEXT, IMAGE, TABLE, ATTENTION = (Node("argument", i, 1) for i in range(4))


def joint(text: int, image: int) -> Alignment:
    """q and k are [text, image]; a table runs over both."""
    alignment = Alignment({Q: text + image, K: text + image})
    for place in (Q, K):
        alignment.add(Interval(place, 0, TEXT, text))
        alignment.add(Interval(place, text, IMAGE, image))
        alignment.add(Interval(place, 0, TABLE, text + image))
    return alignment


def test_a_joint_stream_has_the_atoms_of_its_parts() -> None:
    atoms = joint(13, 35).solve()
    (text,), (image,) = atoms[TEXT], atoms[IMAGE]
    assert None not in (text, image)
    assert text != image
    assert atoms[Q] == atoms[K] == atoms[TABLE] == [text, image]


def test_equal_lengths_are_told_apart() -> None:
    atoms = joint(35, 35).solve()
    assert atoms[Q] == [*atoms[TEXT], *atoms[IMAGE]]
    assert atoms[TEXT] != atoms[IMAGE]


def test_cuts_travel_through_places_to_other_nodes() -> None:
    """Text and image meet in the keys only; the table is seen in the queries, and is cut all the same."""
    alignment = Alignment({Q: 48, K: 48})
    alignment.add(Interval(K, 0, TEXT, 13))
    alignment.add(Interval(K, 13, IMAGE, 35))
    alignment.add(Interval(Q, 0, TABLE, 48))
    alignment.add(Interval(K, 0, TABLE, 48))
    assert alignment.cuts()[TABLE] == alignment.cuts()[Q] == {0, 13, 48}
    atoms = alignment.solve()
    assert atoms[Q] == atoms[TABLE] == [*atoms[TEXT], *atoms[IMAGE]]


def test_rows_that_nothing_accounts_for_have_no_name() -> None:
    alignment = Alignment({Q: 35, K: 39})
    alignment.add(Interval(Q, 0, IMAGE, 35))
    alignment.add(Interval(K, 4, IMAGE, 35))
    atoms = alignment.solve()
    assert atoms[K] == [None, *atoms[IMAGE]]
    assert atoms[Q] == atoms[IMAGE]
    assert Alignment({Q: 7}).solve() == {Q: [None]}


def test_streams_that_never_meet_are_different() -> None:
    alignment = Alignment({Q: 35, K: 35})
    alignment.add(Interval(Q, 0, IMAGE, 35))
    alignment.add(Interval(K, 0, TEXT, 35))
    atoms = alignment.solve()
    assert atoms[Q] == atoms[IMAGE]
    assert atoms[K] == atoms[TEXT]
    assert atoms[Q] != atoms[K]


def test_offsets_within_a_node() -> None:
    """The results of attention: its first 13 rows go one way, the others another way."""
    first, second = Place("result", 0, 1), Place("result", 1, 1)
    alignment = joint(13, 35)
    alignment.add(Interval(Q, 0, ATTENTION, 48))
    alignment.add(Interval(second, 0, ATTENTION, 13))
    alignment.add(Interval(first, 0, ATTENTION, 35, 13))
    atoms = alignment.solve()
    assert atoms[first] == atoms[IMAGE]
    assert atoms[second] == atoms[TEXT]
    assert atoms[ATTENTION] == atoms[Q]


def test_a_single_row_is_a_token_where_its_node_is_one_elsewhere() -> None:
    other = Place("q", 1, 2)
    alignment = Alignment({Q: 14, other: 1})
    alignment.add(Interval(Q, 13, IMAGE, 1))
    alignment.doubtful += [Interval(other, 0, IMAGE, 1), Interval(other, 0, TEXT, 1)]
    assert alignment.solve()[other] == [None]
    alignment.settle_doubtful()
    atoms = alignment.solve()
    assert atoms[other] == atoms[IMAGE]
    assert TEXT not in atoms


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
def test_the_same_rows_have_the_same_atoms(lengths: list[int], data: st.DataObject) -> None:
    """Streams in one order in the queries and in another in the keys; a table that follows the queries."""
    order = data.draw(st.permutations(range(len(lengths))))
    nodes = [Node("argument", i, 1) for i in range(len(lengths))]
    table = Node("argument", 99, 0)
    alignment = Alignment({Q: sum(lengths), K: sum(lengths)})
    intervals = [Interval(Q, 0, table, sum(lengths))]
    for place, streams in ((Q, range(len(lengths))), (K, order)):
        start = 0
        for i in streams:
            intervals.append(Interval(place, start, nodes[i], lengths[i]))
            start += lengths[i]
    for interval in data.draw(st.permutations(intervals)):
        alignment.add(interval)
        alignment.add(interval)
    atoms = alignment.solve()
    names = [atoms[node] for node in nodes]
    assert all(len(name) == 1 for name in names)
    assert len({name[0] for name in names}) == len(lengths)
    assert atoms[Q] == atoms[table] == [name[0] for name in names]
    assert atoms[K] == [names[i][0] for i in order]


def test_rows_that_come_and_go_belong_to_no_atom() -> None:
    alignment = joint(13, 35)
    alignment.unsteady = {Q: [(0, 1), (12, 13)]}
    atoms = alignment.solve()
    assert atoms[TEXT] == [None]
    assert None not in atoms[IMAGE]
    assert atoms[Q] == atoms[K] == [None, *atoms[IMAGE]]


def test_rows_that_may_come_between_atoms_have_their_place() -> None:
    alignment = joint(13, 35)
    alignment.unsteady = {Q: [(48, 48)], K: [(13, 13), (13, 13)]}
    atoms = alignment.solve()
    assert atoms[Q] == [*atoms[TEXT], *atoms[IMAGE], None]
    assert atoms[K] == [*atoms[TEXT], None, *atoms[IMAGE]]
