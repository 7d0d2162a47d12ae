"""Plan: a whole schedule as a value, with its CSV and JSON forms and a digest."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PlanError
from .columns import Columns, columns
from .op import COMM, COMPUTE, COPIES, STEPS, Op, atoms
from .placement import BIDIRECTIONAL, LINEAR, LOOP, VEE, Placement
from .plain_json import parse, read_text

MOST = 20_000_000  #: micro-batches times stages of the largest plan


def check_size(placement: Placement, num_micro: int) -> None:
    """Before a plan is made: whether it can be held and walked through.

    Raises:
        PlanError: it cannot.
    """
    if num_micro < 1:
        raise PlanError(f"a plan needs at least one micro-batch, got {num_micro}")
    if placement.num_stages * num_micro > MOST:
        raise PlanError(f"a plan is too large: stages x micro-batches may be {MOST:,} at most")


@dataclass(frozen=True)
class Plan:
    """One program (a tuple of ops) a rank.

    Args:
        placement: where stages live.
        num_micro: micro-batches 0..num_micro-1 of one batch of one pipeline.
        programs: `programs[rank]` is what the rank executes, in order.
        schedule: the name shown to people; not part of the plan's identity.
    """

    placement: Placement
    num_micro: int
    programs: tuple[tuple[Op, ...], ...]
    schedule: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        check_size(self.placement, self.num_micro)
        if len(self.programs) != self.placement.num_ranks:
            raise PlanError(f"{len(self.programs)} programs for {self.placement.num_ranks} ranks")

    @property
    def num_ops(self) -> int:
        return sum(map(len, self.programs))

    @cached_property
    def columns(self) -> Columns:
        """All ops as arrays.

        Raises:
            ValueError: an op has numbers or parts that none can have.
        """
        return columns(self.programs)

    def with_ops(self, ops: Iterable[Op], found: Columns) -> Plan:
        """The plan with other ops.

        Args:
            ops: of all ranks, one rank after the other.
            found: their columns, which need not be worked out again.
        """
        first = np.diff(found.op, prepend=-1) != 0
        sizes = np.bincount(found.rank[first], minlength=len(self.programs)).tolist()
        left = iter(ops)
        plan = replace(self, programs=tuple(tuple(islice(left, size)) for size in sizes))
        vars(plan)["columns"] = found
        return plan

    def compute_only(self) -> Plan:
        """The same plan without transfers, copies to host memory and tail ops."""
        return self._only(COMPUTE)

    def unlowered(self) -> Plan:
        """The same plan without transfers and tail ops: what `lower` takes."""
        return self._only(STEPS)

    def _only(self, kinds: frozenset[str]) -> Plan:
        programs = tuple(tuple(op for op in program if op.kind in kinds) for program in self.programs)
        return Plan(self.placement, self.num_micro, programs, self.schedule)

    def has_comm(self) -> bool:
        return any(op.kind in COMM for program in self.programs for op in program)

    def has_copies(self) -> bool:
        """Whether activations are offloaded to host memory."""
        return any(op.kind in COPIES for program in self.programs for op in program)

    def digest(self) -> str:
        """SHA-256 over placement, micro-batch count and all ops; equal plans have equal digests in every process."""
        sha = hashlib.sha256(f"{self.placement.key} {self.placement.num_ranks} {self.num_micro}".encode())
        for program in self.programs:
            sha.update(b"\n")
            sha.update(" ".join(map(str, program)).encode())
        return sha.hexdigest()

    def texts(self) -> list[list[str]]:
        return [[str(op) for op in program] for program in self.programs]

    def to_csv(self) -> str:
        """One row a rank, one cell an op."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(self.texts())
        return out.getvalue()

    @classmethod
    def from_csv(cls, text: str, placement: Placement | None = None) -> Plan:
        """Read `to_csv` output, or a schedule file of torch.distributed.pipelining.

        Without `placement` it is found from the stages that the ranks run.

        Raises:
            PlanError: the text is not CSV, a cell is not an op, or the stages fit no placement.
        """
        try:
            rows = list(csv.reader(io.StringIO(text)))
        except csv.Error as error:
            raise PlanError(f"not a plan: expected CSV with an op in each cell ({error})") from None
        programs = _parse(row for row in rows if any(cell.strip() for cell in row))
        return cls(placement or _infer_placement(programs), _count_micro(programs), programs)

    def to_json(self) -> str:
        return json.dumps(
            {
                "schedule": self.schedule,
                **placement_data(self.placement),
                "micro_batches": self.num_micro,
                "programs": self.texts(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read `to_json` output; `placement` and `micro_batches` may be absent and are then found from the ops.

        Raises:
            PlanError: the text is not JSON, `programs` is missing, or an op is malformed.
        """
        try:
            data: Any = parse(text)
            rows = data["programs"]
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f'not a plan: expected JSON with a list "programs" of lists of op text ({error})') from None
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise PlanError('not a plan: "programs" must be a list of lists of op text')
        programs = _parse(rows)
        name, per_rank = data.get("placement"), data.get("stages_per_rank")
        if per_rank is not None and type(per_rank) is not int:
            raise PlanError(f'"stages_per_rank" must be a whole number, got {per_rank!r}')
        placement = Placement(name, len(programs), per_rank) if name else _infer_placement(programs)
        num_micro = data.get("micro_batches", _count_micro(programs))
        if not isinstance(num_micro, int):
            raise PlanError(f'"micro_batches" must be a whole number, got {num_micro!r}')
        return cls(placement, num_micro, programs, str(data.get("schedule", "custom")))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file, `.csv` or `.json`.

        Raises:
            PlanError: the file cannot be read, has another ending, or holds no plan.
        """
        path = Path(path)
        readers = {".csv": cls.from_csv, ".json": cls.from_json}
        if path.suffix not in readers:
            raise PlanError(f"{path}: a plan file ends in .csv or .json")
        try:
            return readers[path.suffix](read_text(path))
        except (OSError, ValueError) as error:
            raise PlanError(f"{path}: {error}") from None


def placement_data(placement: Placement) -> dict[str, Any]:
    """A placement's part of a plan's JSON."""
    data: dict[str, Any] = {"placement": placement.name, "ranks": placement.num_ranks}
    if placement.stages_per_rank is not None:
        data["stages_per_rank"] = placement.stages_per_rank
    return data


def _parse(rows: Iterable[Iterable[Any]]) -> tuple[tuple[Op, ...], ...]:
    programs = []
    for rank, row in enumerate(rows):
        try:
            programs.append(tuple(Op.parse(str(cell)) for cell in row if str(cell).strip()))
        except PlanError as error:
            raise PlanError(f"rank {rank}: {error}") from None
    if not programs:
        raise PlanError("the plan is empty")
    return tuple(programs)


def _count_micro(programs: tuple[tuple[Op, ...], ...]) -> int:
    return 1 + max((part.micro for program in programs for op in program for part in atoms(op)), default=-1)


def _infer_placement(programs: tuple[tuple[Op, ...], ...]) -> Placement:
    found = {
        (part.stage, part.micro, rank)
        for rank, program in enumerate(programs)
        for op in program
        if op.kind in COMPUTE
        for part in atoms(op)
    }
    stages, size = {stage for stage, _, _ in found}, len(programs)
    fitting = [Placement(LINEAR, size), Placement(VEE, size)]
    fitting += [Placement(BIDIRECTIONAL, size)] if size % 2 == 0 else []
    fitting += [Placement(LOOP, size, len(stages) // size)] if len(stages) >= size else []
    for placement in fitting:
        if stages == set(range(placement.num_stages)) and all(
            placement.rank_of(stage, micro) == rank for stage, micro, rank in found
        ):
            return placement
    raise PlanError(
        "the stages of this plan fit no placement: rank r must run stage r (linear), stage r for even and PP-1-r for "
        "odd micro-batches (bidirectional), stages r and 2*PP-1-r (vee), or stages r, PP+r, 2*PP+r, ... (loop)"
    )
