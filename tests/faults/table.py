"""What came of each try."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.jobs import Job, Result
from faults.processes import Ended

COLUMNS = ("tried", "survived", "detected", "silent", "lost", "unclear")
GOOD = ("tried", "survived", "detected")
#: of a line, what differs from one run to the next
_PASSING = re.compile(r"/\S*(?=/)|\b[0-9a-f]{8,}\b|\d+")
#: what a line must hold: the cause, then what to do
_REMEDY = re.compile(r"\S; \S+ \S+")


@dataclass
class Table:
    """Counts of what was tried and how it came out.

    survived: the result is that of an unbroken run. detected: one line said what is wrong. silent: done, with another
    result. lost: what was finished is gone, or was made anew. unclear: it hung, or ended without a line.
    """

    counts: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    lines: set[str] = field(default_factory=set)
    kills: int = 0
    damages: int = 0

    def note(
        self,
        kind: str,
        what: str,
        ended: Ended,
        job: Job,
        out: Path,
        want: Result,
        tries: int = 1,
        lost: list[str] | None = None,
        must: bool = False,
        whole: list[Result] | None = None,
        where: str = "",
    ) -> str | None:
        """One try (or several that came to one end) of a job in `out`.

        Args:
            must: survive, since nothing is damaged; a line is not enough.
            whole: what may be there as a whole now, where that is asked.
            where: the fault struck, for who reads what went wrong.

        Returns: the line that said what is wrong, without paths and numbers, if that is how it came out.
        """
        row = self.counts.setdefault((kind, what), dict.fromkeys(COLUMNS, 0))
        row["tried"] += tries
        how, why, line = "survived", "", None
        if lost or (whole is not None and job.whole(out) not in whole):
            how, why = "lost", str(lost or "half of it is there")
        elif ended.code == 0:
            try:
                found = job.result(out, ended)
                why = "" if found == want else f"another result: {difference(found, want)}"
            except Exception as error:
                why = f"no result: {error!r}"
            how = "silent" if why else how
        elif ended.code is not None and ended.code > 0 and ended.one_line and not must:
            line = _PASSING.sub("...", ended.line)
            self.lines.add(line)
            how, why = ("detected", "") if _REMEDY.search(line) else ("unclear", f"no remedy: {ended.line}")
        else:
            how, why = "unclear", f"code {ended.code}, {ended.error[-6000:]!r}"
        row[how] += tries
        if how not in GOOD:
            self.wrong.append(f"{where}{kind}, {what}: {how}: {why}")
            print(self.wrong[-1], file=sys.stderr, flush=True)
        return line if how == "detected" else None

    def leave_out(self, kind: str, why: str) -> None:
        """Say in the table that a fault cannot be made here."""
        self.counts[kind, why] = dict.fromkeys(COLUMNS, 0)

    def require(self, kind: str, what: str, held: bool, why: str) -> None:
        """Something else that has to hold of a try that was noted."""
        if not held:
            self.wrong.append(f"{kind}, {what}: {why}")
            print(self.wrong[-1], file=sys.stderr, flush=True)

    def rows(self) -> list[dict[str, Any]]:
        return [{"fault": kind, "of": what, **row} for (kind, what), row in self.counts.items()]

    def total(self) -> dict[str, int]:
        return {column: sum(row[column] for row in self.counts.values()) for column in COLUMNS}

    def markdown(self) -> str:
        lines = ["| fault | of | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
        for row in [*self.rows(), {"fault": "all", "of": "", **self.total()}]:
            lines.append("| " + " | ".join(str(value) for value in row.values()) + " |")
        return "\n".join(lines)


def difference(found: Any, want: Any) -> str:
    """Where two results differ."""
    if isinstance(found, dict) and isinstance(want, dict):
        names = [name for name in {**found, **want} if found.get(name) != want.get(name)]
        return ", ".join(f"{name} ({difference(found.get(name), want.get(name))})" for name in names)
    return f"{str(found)[:80]} instead of {str(want)[:80]}"
