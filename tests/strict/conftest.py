import pytest
import strict_runs
from ranks import free_port
from strict_hub import Hub


@pytest.fixture
def on_twin(ranks):
    """Runs a function of strict_runs on a strict twin of `world` ranks; `on_twin.hub` is its hub."""

    def run(world, function, eager=True, in_flight=8, timeouts=False, seed=0, **kwargs):
        run.hub = hub = Hub(world, eager, seed)
        rules = {"port": free_port(), "eager": eager, "in_flight": in_flight, "timeouts": timeouts}
        try:
            given = {"address": hub.address, "rules": rules, "call": function, "kwargs": kwargs}
            found = ranks.run(world, strict_runs.on_twin, **given)
            assert not hub.faults
            return found
        finally:
            hub.close()

    return run
