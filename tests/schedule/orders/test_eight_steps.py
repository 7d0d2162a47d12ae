from dualpipe_engine.schedule.orders.eight_steps import eight_steps


def test_phases_of_unequal_length() -> None:
    """Dropping the last micro-batch of one phase drops its ops and turns its pairs into their other halves."""
    stages = (1, 2)
    for h in range(4):
        even = [str(op) for op in eight_steps(4, h, stages, (range(9), range(9)))]
        short = [str(op) for op in eight_steps(4, h, stages, (range(9), range(8)))]
        expected = []
        for op in even:
            if op.startswith("("):
                kept = [part for part in op[1:-3].split(";") if part not in ("2F8", "2B8")]
                expected.append(op if len(kept) == 2 else kept[0])
            elif op not in ("2F8", "2B8", "2I8", "2W8"):
                expected.append(op)
        assert short == expected
        assert len(even) > len(short)


def test_middle_rank_starts_its_steady_state_unpaired() -> None:
    middle = [str(op) for op in eight_steps(2, 1, (1, 2), (range(5), range(5)))]
    assert middle[4:8] == ["1F2", "2B0", "(2F2;1B0)FB", "(1F3;2B1)FB"]
    outer = [str(op) for op in eight_steps(2, 0, (0, 3), (range(5), range(5)))]
    assert outer[7] == "(0F3;3B1)FB"


def test_last_backwards_leave_their_w_for_the_end() -> None:
    odd = [str(op) for op in eight_steps(4, 1, (0, 1), (range(12), range(12)))]
    assert odd[-9:] == ["0B8", "1I11", "0I9", "1W11", "0I10", "0W9", "0I11", "0W10", "0W11"]
    even = [str(op) for op in eight_steps(4, 2, (0, 1), (range(12), range(12)))]
    assert even[-9:] == ["1B10", "0I9", "1I11", "0I10", "0W9", "0I11", "1W11", "0W10", "0W11"]
