import pytest

from dualpipe_engine.schedule.orders.emitter import Emitter


def text(emitter: Emitter) -> list[str]:
    return [str(op) for op in emitter.ops]


def test_numbers_micro_batches_of_each_phase() -> None:
    emitter = Emitter((3, 4), (range(0, 6, 2), range(1, 6, 2)))
    emitter.repeat(2, ("F", 0), ("F", 1))
    emitter.repeat(1, ("FB", 0), ("B", 0))
    assert text(emitter) == ["3F0", "4F1", "3F2", "4F3", "(3F4;4B1)FB", "3B0"]


def test_w_first_in_first_out() -> None:
    emitter = Emitter((0, 1), (range(2), range(2)))
    emitter.repeat(2, ("F", 0), ("F", 1))
    emitter.repeat(1, ("I", 1), ("I", 0), ("W", 0), ("I", 1), ("W", 0), ("W", 0))
    assert text(emitter)[4:] == ["1I0", "0I0", "1W0", "1I1", "0W0", "1W1"]


def test_missing_micro_batches_emit_nothing() -> None:
    emitter = Emitter((0, 1), (range(1), range(2)))
    emitter.repeat(2, ("F", 0), ("F", 1))
    emitter.repeat(1, ("FB", 0), ("FB", 0), ("FB", 1), ("I", 0), ("W", 0))
    assert text(emitter) == ["0F0", "1F0", "1F1", "1B0", "1B1", "0B0"]


def test_w_before_any_i_is_our_bug() -> None:
    with pytest.raises(IndexError):
        Emitter((0, 1), (range(1), range(1))).repeat(1, ("W", 0))
