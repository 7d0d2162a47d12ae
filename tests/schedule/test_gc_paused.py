import gc

import pytest

from dualpipe_engine.schedule.gc_paused import collector_paused


def test_restores_the_collector_even_after_an_error() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), collector_paused():
        assert not gc.isenabled()
        1 / 0  # noqa: B018
    assert gc.isenabled()


def test_leaves_a_disabled_collector_alone() -> None:
    gc.disable()
    try:
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("frozen", [False, True])
def test_what_was_made_is_old_afterwards(frozen):
    if frozen:
        gc.freeze()
    try:
        count = gc.get_freeze_count()
        with collector_paused():
            made = [(number, []) for number in range(5000)]
        assert gc.isenabled() and gc.get_freeze_count() == count
        young = {id(each) for generation in (0, 1) for each in gc.get_objects(generation)}
        assert frozen or not any(id(each) in young for each in made)
    finally:
        gc.unfreeze()
