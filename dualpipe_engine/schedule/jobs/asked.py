"""What a configuration asks of schedules that changes how many bytes they hold."""

from __future__ import annotations

from dataclasses import dataclass

from ..orders.registry import STOCK, Schedule, known_schedule, with_stages
from ..passes.offload import offload
from ..placement import Placement
from ..plan import Plan
from ..search.make_plan import make_plan
from ..timing.costs import CostModel
from .activations import Names


@dataclass(frozen=True)
class Asked:
    """Keys of the "pipeline" section.

    Args:
        stages_per_rank: of the schedules that take any number; None: their own.
        activation_cap: activations that no rank may exceed; None: what the schedule is known for.
        split_backward: whether I and W run apart.
        offload_activations: see `passes.offload`.
        recompute: names of modules that are computed again.
        checkpoint_interval: layers of a group that is computed again; 0: there are none.
        cut: layers of each stage; None: so that ranks have equal work.
    """

    stages_per_rank: int | None = None
    activation_cap: int | None = None
    split_backward: bool = True
    offload_activations: bool | int = False
    recompute: Names = ()
    checkpoint_interval: int = 0
    cut: tuple[int, ...] | None = None

    @property
    def stock(self) -> Asked:
        """Of this, what DeepSpeed's own pipeline engine knows."""
        return Asked(checkpoint_interval=self.checkpoint_interval, cut=self.cut)

    def placement(self, schedule: str, num_ranks: int) -> Placement:
        """Of the stages of a schedule, or of `STOCK`.

        Raises:
            PlanError: the rank count does not fit.
        """
        return self._known(schedule).on(num_ranks)

    def plan(self, schedule: str, num_ranks: int, num_micro: int, costs: CostModel) -> Plan:
        """The reference order of a schedule, or of `STOCK`.

        Args:
            schedule: its name.
            num_ranks: pipeline ranks.
            num_micro: micro-batches of the batch.
            costs: bytes of the stages.

        Raises:
            PlanError: the rank count does not fit, no plan keeps within the cap, or no rank's peak can fall by so many.
        """
        plan = make_plan(
            "1f1b" if schedule == STOCK else schedule,
            num_ranks,
            num_micro,
            costs,
            activation_cap=self.activation_cap,
            split_backward=self.split_backward,
            stages_per_rank=self._known(schedule).stages_per_rank,
        )
        return offload(plan, self.offload_activations, costs, exact=True)

    def _known(self, schedule: str) -> Schedule:
        return known_schedule("1f1b") if schedule == STOCK else with_stages(self.stages_per_rank)[schedule]


NOTHING = Asked()
