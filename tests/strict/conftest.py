import pytest
from strict_hub import Hub
from strict_ranks import run_on_twin


@pytest.fixture
def on_twin(ranks):
    """Runs a function of strict_runs on a strict twin of `world` ranks; `on_twin.hub` is its hub."""

    def run(world, function, eager=True, in_flight=8, timeouts=False, seed=0, **kwargs):
        run.hub = Hub(world, eager, seed)
        return run_on_twin(ranks.run, run.hub, world, function, eager, in_flight, timeouts, **kwargs)

    return run
