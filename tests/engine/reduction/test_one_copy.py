"""Where nobody else has a copy, gradients become what a collective of one rank makes of them, in their own memory."""

from itertools import product

import pytest
import torch
import training
import zero_runs

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
CASES = {
    f"{dtype} as {travels}, {factors}".replace("torch.", ""): (dtype, travels, factors)
    for dtype, travels, factors in product(DTYPES, DTYPES[:3], [(1.0, 1.0), (0.3, 1.0), (0.25, 0.7)])
}


@pytest.fixture(scope="module")
def found(ranks):
    cases = {name: dict(zip(("dtype", "travels", "factors"), case, strict=True)) for name, case in CASES.items()}
    return ranks.run(1, training.each, call=zero_runs.one_copy, cases=cases)[0]


@pytest.mark.parametrize("name", CASES)
def test_bits(found, name):
    (alone, stays), (collective, _) = found[name]
    dtype, travels, factors = CASES[name]
    assert all(map(torch.equal, alone, collective))
    assert all(grad.dtype == dtype for grad in alone)
    exact = torch.promote_types(dtype, travels) == travels and factors == (1.0, 1.0)
    assert stays == (exact or dtype in (travels, torch.float64))
