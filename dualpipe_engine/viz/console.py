"""The console of tables: none loses a digit where the terminal is narrow."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 10_000  #: columns; more than any table takes
_TIGHTER = ((1, "maximum"), (0, "maximum"), (0, "minimum"))  #: padding; a number beside its unit, or above it


class WholeTables(Console):
    """A console that puts tables closer together where they are too wide, before it lets the terminal wrap lines."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As `Console.print`."""
        for each in objects:
            if isinstance(each, Table) and self._measured(each).maximum > self.width:
                self._fit(each)
        super().print(*objects, **options)

    def _fit(self, table: Table) -> None:
        """Keep names and numbers whole; headings and prose have what is left, and each word of theirs."""
        for padding, of_cell in _TIGHTER:
            table.padding = (0, padding)  # type: ignore[assignment]
            for column in table.columns:
                if column.no_wrap or column.justify == "right":
                    kind = "maximum" if column.no_wrap else of_cell
                    cells = [getattr(self._measured(cell), kind) for cell in column.cells]
                    column.width = max([self._measured(column.header).minimum, *cells])
            least = self._measured(table).minimum
            if least <= self.width:
                return
        self.width = least

    def _measured(self, what: Any) -> Measurement:  # noqa: ANN401
        return Measurement.get(self, self.options.update(width=_WIDEST), what)
