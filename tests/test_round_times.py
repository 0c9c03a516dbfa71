"""Times of rounds that were never measured, told from those that were."""

from __future__ import annotations

from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specformer.generation.draft_length_times import RoundTimes, straight_line

pytestmark = pytest.mark.one_version


def times_of(seconds: dict[tuple[int, int], float], count: int = 2) -> RoundTimes:
    times = RoundTimes()
    for (num_rows, drafted), value in seconds.items():
        for _ in range(count):
            times.add(num_rows, drafted, value)
    return times


def test_a_first_round_does_not_count():
    times = times_of({(8, 0): 1.0})
    times.add(8, 2, 99.0)
    assert times.known() == {(8, 0): 1.0} and times.count(8, 2) == 1
    times.add(8, 2, 3.0)
    assert times.known() == {(8, 0): 1.0, (8, 2): pytest.approx(3.0)} and times.count(8, 2) == 2


def test_what_was_timed_earlier_keeps_pace():
    """The machine becomes half as fast, which is seen at one length: the other one's time follows."""
    times = times_of({(8, 0): 1.0, (8, 4): 1.5}, count=100)
    for _ in range(100):
        times.add(8, 0, 2.0)
    assert times.estimate(8, 4)[0] == pytest.approx(2.0, rel=0.01)
    assert times.estimate(8, 4)[4] == pytest.approx(3.0, rel=0.17)  # most of the way


@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0, 4.0])
def test_what_comes_and_goes_leaves_no_trace(factor: float):
    """The machine is faster or slower for a while, in which one length is used: the times of both stay comparable."""
    times = times_of({(8, 0): 1.0, (8, 4): 1.5}, count=50)
    for seconds in (factor, 1.0) * 3:
        for _ in range(150):
            times.add(8, 0, seconds)
        estimate = times.estimate(8, 4)
        assert estimate[0] == pytest.approx(seconds, rel=0.1)
        assert estimate[4] / estimate[0] == pytest.approx(1.5, rel=0.25)
    assert estimate[4] / estimate[0] == pytest.approx(1.5, rel=0.1)


def test_what_was_believed_for_long_is_corrected():
    """One length takes longer than it did, as it does in longer texts; the other one is timed now and then."""
    times = times_of({(8, 0): 1.0, (8, 4): 1.0}, count=100)
    for _ in range(10):
        for _ in range(15):
            times.add(8, 4, 1.5)
        times.add(8, 0, 1.0)
    estimate = times.estimate(8, 4)
    assert estimate[4] / estimate[0] == pytest.approx(1.5, rel=0.1)


def test_threads_share_times():
    times, errors = times_of({(8, 0): 1.0}), []

    def work():
        try:
            for number in range(3000):
                times.add(1 + number % 30, number % 3, 1.0)
                times.known()
                times.estimate(8, 4)
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and times.times == 9002


def test_a_wrong_time_does_not_become_the_pace():
    """One length was timed in lucky moments. Once it is used, its own time is corrected, and not that of all others."""
    times = times_of({(8, 0): 1.0}, count=20)
    for seconds in (1.0, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5):
        times.add(8, 4, seconds)
    estimate = times.estimate(8, 4)
    assert estimate[0] == pytest.approx(1.0, rel=0.06) and estimate[4] == pytest.approx(1.5, rel=0.1)


def test_one_slow_round_is_no_pace():
    times = times_of({(8, 0): 1.0}, count=20)
    times.add(8, 0, 1000.0)
    assert times.estimate(8, 0)[0] == pytest.approx(1.0, rel=0.05)


def test_no_round_that_drafts_is_shorter_than_one_that_does_not():
    estimate = times_of({(8, 0): 1.0, (8, 2): 0.8, (8, 4): 1.2}).estimate(8, 4)
    assert [estimate[0], estimate[2], estimate[4]] == pytest.approx([1.0, 1.0, 1.2])


def test_shapes_that_were_not_seen_for_long_are_forgotten():
    times = times_of({(rows, 0): float(rows) for rows in range(1, 301)})
    known = times.known()
    assert len(known) == RoundTimes.REMEMBERED and (300, 0) in known and (1, 0) not in known


def test_what_is_known_is_what_was_measured():
    seconds = {(8, 0): 1.0, (8, 2): 1.1, (8, 4): 2.0, (1, 0): 0.7}
    estimate = times_of(seconds).estimate(8, 4)
    assert [estimate[0], estimate[2], estimate[4]] == pytest.approx([1.0, 1.1, 2.0])
    assert estimate[0] < estimate[1] < estimate[3] < estimate[4]


def test_of_one_kind_everything_takes_the_same():
    assert times_of({(8, 4): 3.0}).estimate(2, 3) == pytest.approx([3.0] * 4)


@given(
    st.floats(0.1, 10),
    st.floats(0.001, 1),
    st.sets(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=2, max_size=9),
    st.integers(1, 64),
)
def test_a_line_is_found(base: float, slope: float, shapes: set, num_rows: int):
    """Where time is a line over tokens, so is every estimate, whatever was measured."""
    if len({rows * (drafted + 1) for rows, drafted in shapes}) < 2:
        return
    times = times_of({shape: base + slope * shape[0] * (shape[1] + 1) for shape in shapes})
    expected = [base + slope * num_rows * (drafted + 1) for drafted in range(9)]
    assert times.estimate(num_rows, 8) == pytest.approx(expected, rel=1e-3)


def test_times_that_fall_or_pass_through_nothing():
    falling = straight_line([(1, 2.0), (10, 1.0)])
    assert falling(1) == falling(10) == falling(99) == pytest.approx(1.2)  # of the least relative errors
    assert straight_line([(1, 1.0), (2, 3.0)])(0) == 0.0
    assert straight_line([(3, 0.0), (4, 0.0)])(9) >= 0.0


def test_rows_that_are_slower_than_others_are_so_at_every_length():
    times = times_of({(1, 0): 1.0, (1, 4): 1.4, (8, 0): 3.4, (8, 4): 10.0})
    others = times_of({(1, 0): 1.0, (1, 4): 1.4})
    factor = times.estimate(8, 4)[0] / others.estimate(8, 4)[0]
    assert factor == pytest.approx(3.4 / 1.7)
