"""What a check has found, and the table of all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failure"]
NAMES = ("versions", "network", "clock", "gradient", "shards", "folder", "slurm")  # the checks, in their order
OF_A_CONFIG = ("shards", "folder")  # those that look at what a config names


@dataclass(frozen=True)
class Finding:
    """One line of the table: which check, how it went, what was seen, and what cures it."""

    check: str
    level: Level
    found: str
    cure: str = ""


def table(findings: Sequence[Finding]) -> str:
    """Plain text, failures with their cures below them, and a last line that counts."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:8s} {finding.check:10s} {finding.found}")
        if finding.cure:
            lines.append(f"{'':19s} cure: {finding.cure}")
    failures, warnings = (sum(finding.level == level for finding in findings) for level in ("failure", "warning"))
    lines.append(f"{len(findings)} checks: {failures} failed, {warnings} with a warning")
    return "\n".join(lines)


def failed(findings: Sequence[Finding]) -> bool:
    """Whether training should not start."""
    return any(finding.level == "failure" for finding in findings)
