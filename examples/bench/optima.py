"""How good DualPipe's orders with transfers are: CP-SAT looks for shorter ones, and for shorter periods.

Needs `pip install ortools`. Plans are those whose directions mirror each other, take micro-batches in order and hold
PP + 1 activations. So a rank and its mirror image start the same ops at the same times, and half of the ranks is what
is searched, each with micro-batches 0, 1, ... of both of its stages.

    python examples/bench/optima.py                # whole batches: our order, the best that CP-SAT finds from there
    python examples/bench/optima.py --periods      # the steady state: which periods there are
    python examples/bench/optima.py --models       # 60 cost models, without CP-SAT: how far above the lower bound
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from math import ceil
from statistics import mean
from typing import Any, NamedTuple

from dualpipe_engine.schedule.op import FB, F, atoms
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.bound import lower_bound
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import makespan_of, simulate

try:
    from ortools.sat.python import cp_model
except ImportError:
    cp_model = None

SCALE = 20  #: whole numbers in a second
SIZES = ((4, 12), (4, 16), (8, 8), (8, 12), (8, 16), (8, 32), (16, 16))  #: ranks and micro-batches
MODELS = (CostModel(i=1.4, w=0.6, fb=2.1, comm=0.3), CostModel(fb=2.55, comm=0.2))
SWEPT = ((4, 16), (8, 32), (16, 64))  #: ranks and micro-batches
TRIES = 100_000  #: for `make_plan`, beside what it tries by itself
PERIODS = ((4, 1), (4, 2), (8, 1), (16, 1))  #: ranks, and micro-batches of a direction in a period


class Found(NamedTuple):
    """What CP-SAT found: the makespan of the best plan and one that no plan beats."""

    best: float
    proven: float


class Micros:
    """Ops of micro-batches 0..number-1 on all stages, not yet in an order: `f`, `b` and `end` are when F and the
    backward start and when the activation goes; a pair is one F and one full backward of the same start, else the
    backward is an I and a W, which comes at any time later.

    Args:
        stages: PP.
        number: micro-batches of one direction.
        costs: of the stages.
        until: whole number that no start passes.
    """

    def __init__(self, stages: int, number: int, costs: CostModel, until: int) -> None:
        self.model, self.stages, self.number = cp_model.CpModel(), stages, number
        self.seconds = [round(SCALE * each) for each in costs.at(0)]
        f, i, w, fb = self.seconds
        hop = round(SCALE * costs.comm)
        self.keys = list(product(range(stages), range(number)))
        self.f, self.b, self.end = ({key: self.model.new_int_var(0, until, "") for key in self.keys} for _ in range(3))
        self.alone_f, self.alone_b = ({key: self.model.new_bool_var("") for key in self.keys} for _ in range(2))
        self.pairs = {
            (forward, backward): self.model.new_bool_var("")
            for forward, backward in product(self.keys, self.keys)
            if self.rank(forward[0]) == self.rank(backward[0])
        }
        done = {key: self.f[key] + fb - (fb - f) * self.alone_f[key] for key in self.keys}
        back = {key: self.b[key] + fb - (fb - i) * self.alone_b[key] for key in self.keys}
        for stage, micro in self.keys:
            key = stage, micro
            self.model.add_exactly_one([self.alone_f[key], *(on for (one, _), on in self.pairs.items() if one == key)])
            self.model.add_exactly_one([self.alone_b[key], *(on for (_, one), on in self.pairs.items() if one == key)])
            self.model.add(self.end[key] == back[key]).only_enforce_if(~self.alone_b[key])
            self.model.add(self.end[key] >= back[key] + w).only_enforce_if(self.alone_b[key])
            if stage:
                self.model.add(self.f[key] >= done[stage - 1, micro] + hop)
            last = stage == stages - 1
            self.model.add(self.b[key] >= (done[key] if last else back[stage + 1, micro] + hop))
            if micro:
                self.model.add(self.f[key] >= self.f[stage, micro - 1] + f)
                self.model.add(self.b[key] >= self.b[stage, micro - 1] + i)

    def rank(self, stage: int) -> int:
        """The one of the half that runs a stage, of one direction or the other."""
        return min(stage, self.stages - 1 - stage)

    def of(self, rank: int) -> list[tuple[int, int]]:
        """The ops of a rank: stage and micro-batch."""
        return [key for key in self.keys if self.rank(key[0]) == rank]

    def occupy(self, starts: Sequence[dict[Any, Any]], shifts: Sequence[int]) -> None:
        """A rank runs one op at a time: F or its pair, I and W, that start then; all of them once for each shift."""
        f, i, w, fb = self.seconds
        for rank in range(self.stages // 2):
            spans = []
            for key, shift in product(self.of(rank), shifts):
                begin, back, weight = (each[key] + shift for each in starts)
                alone, alone_back = self.alone_f[key], self.alone_b[key]
                spans += [
                    self.model.new_optional_fixed_size_interval_var(begin, f, alone, ""),
                    self.model.new_optional_fixed_size_interval_var(begin, fb, ~alone, ""),
                    self.model.new_optional_fixed_size_interval_var(back, i, alone_back, ""),
                    self.model.new_optional_fixed_size_interval_var(weight, w, alone_back, ""),
                ]
            self.model.add_no_overlap(spans)

    def solve(self, seconds: float) -> tuple[cp_model.CpSolver, str]:
        """Run CP-SAT for so long; with the name of how it ended."""
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds, solver.parameters.num_workers = seconds, 2
        return solver, solver.status_name(solver.solve(self.model))


def whole(plan: Plan, costs: CostModel, cap: int, seconds: float) -> Found:
    """Look for a plan shorter than `plan`, a mirrored one."""
    until, stages = round(SCALE * makespan_of(plan, costs)), plan.placement.num_stages
    micros = Micros(stages, plan.num_micro // 2, costs, until)
    model, w = micros.model, micros.seconds[2]
    for (forward, backward), on in micros.pairs.items():
        model.add(micros.f[forward] == micros.b[backward]).only_enforce_if(on)
    weights = {key: end - w for key, end in micros.end.items()}
    micros.occupy((micros.f, micros.b, weights), (0,))
    for rank in range(stages // 2):
        alive = []
        for key in micros.of(rank):
            held = model.new_int_var(0, until, "")
            alive.append(model.new_interval_var(micros.f[key], held, micros.end[key], ""))
        model.add_cumulative(alive, [1] * len(alive), cap)
    makespan = model.new_int_var(0, until, "")
    model.add_max_equality(makespan, list(micros.end.values()))
    _hint(micros, plan, costs)
    model.minimize(makespan)
    solver, status = micros.solve(seconds)
    found = status in ("OPTIMAL", "FEASIBLE")
    return Found((solver.objective_value if found else until) / SCALE, solver.best_objective_bound / SCALE)


def _hint(micros: Micros, plan: Plan, costs: CostModel) -> None:
    """Let CP-SAT begin with a plan."""
    pairs, ends = set(), {}
    for rank, op, start, end in simulate(plan, costs).spans:
        if rank >= plan.placement.num_ranks // 2:
            continue
        keys = [(part.stage, part.micro // 2) for part in atoms(op)]
        if op.kind == FB:
            pairs.add((keys[0], keys[1]))
        for part, key in zip(atoms(op), keys, strict=True):
            if part.kind == F:
                micros.model.add_hint(micros.f[key], round(SCALE * start))
            elif part.kind != "W":
                micros.model.add_hint(micros.b[key], round(SCALE * start))
            if part.kind in "BW":
                ends[key] = round(SCALE * end)
    for key in micros.keys:
        micros.model.add_hint(micros.end[key], ends[key])
        micros.model.add_hint(micros.alone_f[key], all(key != one for one, _ in pairs))
        micros.model.add_hint(micros.alone_b[key], all(key != one for _, one in pairs))
    for both, on in micros.pairs.items():
        micros.model.add_hint(on, both in pairs)


def alternating(ranks: int, costs: CostModel) -> float:
    """Seconds a micro-batch where all ops are pairs, of either direction in turn: 2 fb + 2 (PP-1) c / PP for two.

    Say a pair with F of direction 1 starts psi(r) after one with F of direction 0 on rank r, in each period p: psi and
    p - psi are at least fb. From rank r to r+1 micro-batches of direction 0 take d, those of direction 1 take d' back,
    and d + d' = p + psi(r) - psi(r+1) >= 2 fb + 2 c, where none waits for longer than a period. Summed up over the
    PP-1 hops: (PP-1) p + p - 2 fb >= (PP-1) (2 fb + 2 c).
    """
    return costs.at(0)[3] + (ranks - 1) * costs.comm / ranks


def period(ranks: int, number: int, costs: CostModel, cap: int, length: int, seconds: float) -> str:
    """Whether a steady state with `number` micro-batches of each direction repeats after `length`: how CP-SAT ended.

    None lives for longer than `cap` periods, since those that came after it live as well.
    """
    micros = Micros(ranks, number, costs, (cap + 2) * length)
    model, most, (f, i, w, _) = micros.model, cap + 2, micros.seconds
    model.add(micros.f[0, 0] < length)

    def folded(times: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
        phases = {key: model.new_int_var(0, length - 1, "") for key in times}
        rounds = {key: model.new_int_var(0, most, "") for key in times}
        for key, time in times.items():
            model.add(time == rounds[key] * length + phases[key])
        return phases, rounds

    (begin, _), (back, _) = folded(micros.f), folded(micros.b)
    weight, _ = folded({key: end - w for key, end in micros.end.items()})
    held, whole_rounds = folded({key: micros.end[key] - micros.f[key] for key in micros.keys})
    for (forward, backward), on in micros.pairs.items():
        model.add(begin[forward] == back[backward]).only_enforce_if(on)
    micros.occupy((begin, back, weight), (0, length))
    for stage in range(ranks):
        model.add(micros.f[stage, 0] + length >= micros.f[stage, number - 1] + f)
        model.add(micros.b[stage, 0] + length >= micros.b[stage, number - 1] + i)
    for rank in range(ranks // 2):
        keys = micros.of(rank)
        always = model.new_int_var(0, cap, "")
        model.add(always == sum(whole_rounds[key] for key in keys))
        alive = [model.new_fixed_size_interval_var(0, 2 * length, "")]
        for key, shift in product(keys, (0, length)):
            end = model.new_int_var(0, 4 * length, "")
            alive.append(model.new_interval_var(begin[key] + shift, held[key], end, ""))
        model.add_cumulative(alive, [always] + [1] * (len(alive) - 1), cap)
    return micros.solve(seconds)[1]


def above_bound(ranks: int, micros: int) -> list[float]:
    """How far above `lower_bound` our order is, as a part of it, for 60 cost models."""
    parts = []
    for i, overlap, hop in product((0.8, 1.0, 1.2, 1.4), (0.7, 0.75, 0.85, 0.95, 1.0), (0.1, 0.2, 0.3)):
        costs = CostModel(i=i, w=2 - i, fb=3 * overlap, comm=hop)
        plan = make_plan("dualpipe", ranks, micros, costs, optimize=True)
        parts.append(makespan_of(plan, costs) / lower_bound(ranks, micros, costs, ranks + 1) - 1)
    return parts


def main() -> None:
    """Print rows of a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--periods", action="store_true", help="periods of the steady state, not whole batches")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long CP-SAT may search for one row")
    parser.add_argument("--models", action="store_true", help="60 cost models beside the lower bound")
    arguments = parser.parse_args()
    if cp_model is None and not arguments.models:
        parser.error("CP-SAT is not here: pip install ortools")
    if arguments.models:
        print("| PP | M | mean | most |\n|" + "---|" * 4)
        for ranks, micros in SWEPT:
            parts = above_bound(ranks, micros)
            print(f"| {ranks} | {micros} | {mean(parts):.1%} | {max(parts):.1%} |", flush=True)
        return
    if arguments.periods:
        print(
            "| PP | micro-batches a period | F, I, W, F&B, hop | alternating pairs | a shorter period |\n|" + "---|" * 5
        )
        for (ranks, number), costs in product(PERIODS, MODELS):
            shortest = alternating(ranks, costs)
            length = ceil(2 * number * shortest * SCALE - 1e-6) - 1
            status = period(ranks, number, costs, ranks + 1, length, arguments.seconds)
            print(f"| {ranks} | {2 * number} | {_text(costs)} | {shortest:.4g} | {status} |", flush=True)
        return
    print(
        f"| PP | M | F, I, W, F&B, hop | ours | {TRIES:,} tries | CP-SAT | above it | proven | lower_bound |\n|"
        + "---|" * 9
    )
    for (ranks, micros), costs in product(SIZES, MODELS):
        quick, plan = (
            make_plan("dualpipe", ranks, micros, costs, optimize=True, tries=tries) for tries in (None, TRIES)
        )
        ours, best = makespan_of(quick, costs), makespan_of(plan, costs)
        found = whole(plan, costs, ranks + 1, arguments.seconds)
        bound = lower_bound(ranks, micros, costs, ranks + 1)
        above = " / ".join(f"{max(0.0, each / found.best - 1):.1%}" for each in (ours, best))
        print(
            f"| {ranks} | {micros} | {_text(costs)} | {ours:.2f} | {best:.2f} | {found.best:.2f} | {above} "
            f"| {found.proven:.2f} | {bound:.2f} |",
            flush=True,
        )


def _text(costs: CostModel) -> str:
    return ", ".join(f"{each:g}" for each in (*costs.at(0), costs.comm))


if __name__ == "__main__":
    main()
