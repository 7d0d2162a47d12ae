"""What users read from the engine is what stock DeepSpeed reports: additional losses, monitors, boundaries."""

from __future__ import annotations

import pytest
import reporting_runs


@pytest.fixture(scope="module")
def stock(ranks, tmp_path_factory):
    runs = {}

    def run(**kwargs):
        key = str(kwargs)
        if key not in runs:
            folder = tmp_path_factory.mktemp("stock")
            found = ranks.run(4, reporting_runs.report, folder=str(folder), schedule=None, **kwargs)
            runs[key] = found, reporting_runs.written(folder)
        return runs[key]

    return run


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("dualpipe", {"ranks": 4}),
        pytest.param("dualpipe", {"ranks": 2, "replicas": 2}, marks=pytest.mark.all),
        ("zb1p", {"ranks": 2, "replicas": 2}),
        pytest.param("dualpipev", {"ranks": 4}, marks=pytest.mark.all),
    ],
)
def test_reports_like_stock(ranks, stock, tmp_path, schedule, shape):
    theirs, (their_csv, their_board) = stock(**shape)
    ours = ranks.run(4, reporting_runs.report, folder=str(tmp_path), schedule=schedule, **shape)
    for rank in ours:
        assert rank["losses"] == pytest.approx(theirs[0]["losses"], rel=1e-5)
        assert rank["counts"] == theirs[0]["counts"]
        assert rank["boundary"] == theirs[0]["boundary"] == {"before": False, "in the step": True, "after": False}
        for mine, expected in zip(rank["additional"], theirs[0]["additional"], strict=True):
            assert list(mine) == list(expected) == ["language", "penalty"]
            assert mine == pytest.approx(expected, rel=1e-5)
    for mine, expected in zip(reporting_runs.written(tmp_path), (their_csv, their_board), strict=True):
        assert mine.keys() == expected.keys()
        for tag, values in expected.items():
            assert [samples for samples, _ in mine[tag]] == [samples for samples, _ in values]
            assert [value for _, value in mine[tag]] == pytest.approx([value for _, value in values], rel=1e-5), tag


def test_curriculum_of_sequence_lengths(ranks, stock, tmp_path):
    """Longer sequences from batch to batch, announced by `reset_activation_shape` as for DeepSpeed's own engine."""
    shape = {"ranks": 4, "lengths": (2, 4, 5)}
    ours = ranks.run(4, reporting_runs.report, folder=str(tmp_path), schedule="dualpipe", **shape)
    assert ours[0]["losses"] == pytest.approx(stock(**shape)[0][0]["losses"], rel=1e-5)
