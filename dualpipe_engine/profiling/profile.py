"""Profile: what the recorded steps cost, as a value, with its JSON form.

The file of a profile is a Chrome trace with one more key, so ui.perfetto.dev and `dualpipe draw` open it as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..errors import PlanError, ProfileError
from ..schedule.plain_json import Json, parse, read_text
from ..schedule.plan import Plan
from ..schedule.timeline import Timeline
from ..schedule.timing.costs import CostModel
from ..schedule.timing.simulate import simulate
from .breakdown import CATEGORIES
from .expert_load import LoadReport

KEY = "dualpipe_profile"
EXPERT_LOAD = "expert_load"
VERSION = 1


@dataclass(frozen=True)
class RankProfile:
    """One rank; times are means over the recorded steps.

    Args:
        rank: position in its pipeline.
        replica: which pipeline.
        host: name of its machine.
        seconds: category of `breakdown.CATEGORIES` -> seconds of a step.
        hidden: "communication" and "reduction" -> seconds that ran under something else.
        ops: kind and stage, as "F 3" -> median seconds of such an op.
        bubble: seconds of the makespan in which the rank computed nothing.
        memory_bytes: most bytes it has held: of the accelerator's tensors, else of the process.
        clock: seconds that its clock was ahead of that of the first rank.
        clock_error: the most that `clock` can be wrong by, seconds.
    """

    rank: int
    replica: int
    host: str
    seconds: Mapping[str, float]
    hidden: Mapping[str, float]
    ops: Mapping[str, float]
    bubble: float = 0.0
    memory_bytes: int = 0
    clock: float = 0.0
    clock_error: float = 0.0

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def compute(self) -> float:
        """Seconds of a step in F, I, W, B and F&B."""
        return sum(self.seconds.get(kind, 0.0) for kind in CATEGORIES[:5])

    @property
    def name(self) -> str:
        return f"rank {self.rank}" + (f" of replica {self.replica}" if self.replica else "")


@dataclass(frozen=True)
class Profile:
    """The last steps of a job.

    Args:
        plan: compute ops of the schedule.
        costs: medians of what its stages took; `comm` is a transfer between two ranks.
        ranks: all ranks, by replica and position.
        steps: seconds of each recorded step, oldest first.
        makespan: seconds from the first to the last compute op of the first pipeline, mean over the steps.
        facts: what is known of the job: "schedule", "micro_batch_size", "zero_stage", "device" ("cpu", "cuda"),
            "weight_split" (0..1), "partition_method", "environment", "expert_load" (see `expert_load.LoadReport`).
    """

    plan: Plan
    costs: CostModel
    ranks: Sequence[RankProfile]
    steps: Sequence[float]
    makespan: float
    facts: Mapping[str, Any]

    @property
    def step(self) -> float:
        """Seconds of a step, mean over the recorded ones."""
        return fmean(self.steps)

    @property
    def typical(self) -> int:
        """Index of the recorded step whose length is the median."""
        middle = median(self.steps)
        return min(range(len(self.steps)), key=lambda index: abs(self.steps[index] - middle))

    @property
    def expert_load(self) -> LoadReport | None:
        """How evenly experts were used in the last step that was reported; None: no layer has experts."""
        data = self.facts.get(EXPERT_LOAD)
        return None if data is None else LoadReport.from_json(data)

    def simulated(self) -> Timeline:
        """The plan simulated with the measured costs, transfers for nothing."""
        return simulate(self.plan, replace(self.costs, comm=0.0))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        ranks = [asdict(rank) for rank in self.ranks]
        plan = json.loads(self.plan.to_json())
        return {
            "version": VERSION,
            "step": self.step,
            "steps": list(self.steps),
            "makespan": self.makespan,
            "facts": dict(self.facts),
            "ranks": ranks,
            "costs": asdict(self.costs),
            "plan": plan,
        }

    @classmethod
    def from_json(cls, data: Json) -> Profile:
        """Read what `to_json` made.

        Raises:
            ProfileError: it is no profile of this version.
        """
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise ProfileError("no profile of this version: get_profiler().save_to_file() writes one")
        try:
            known = {each.name for each in fields(RankProfile)}
            ranks = [RankProfile(**{key: row[key] for key in known & row.keys()}) for row in data["ranks"]]
            given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["costs"].items()}
            costs = CostModel(**given)
            plan = Plan.from_json(json.dumps(data["plan"]))
            costs.check(plan.placement.num_stages)
            if not ranks or not data["steps"]:
                raise ValueError("it holds no rank or no step")
            made = cls(plan, costs, ranks, data["steps"], data["makespan"], data["facts"])
            if (load := made.expert_load) is not None and not all(
                0 <= each.stage < plan.placement.num_stages for each in load.layers
            ):
                raise ValueError("experts are on a stage that there is not")
            return made
        except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
            raise ProfileError(f"the profile is damaged ({type(error).__name__}: {error})") from None


def read_profile(path: str | Path) -> Profile:
    """Read a file that `Profiler.save_to_file` wrote.

    Raises:
        ProfileError: it cannot be read or holds no profile.
    """
    try:
        data: Json = parse(read_text(path))
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: {error}") from None
    if not isinstance(data, dict) or KEY not in data:
        raise ProfileError(f"{path}: holds no profile; get_profiler().save_to_file() writes one")
    try:
        return Profile.from_json(data[KEY])
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None
