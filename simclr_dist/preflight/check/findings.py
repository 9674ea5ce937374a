"""Define the findings of checks, and format their table."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NAMES = ("versions", "network", "clock", "gradient", "shards", "memory", "folder", "slurm")  # the checks, in their order
OF_A_CONFIG = ("shards", "memory", "folder")  # checks of what a config names


@dataclass(frozen=True)
class Finding:
    """One line of the table, with what cures it."""

    check: str
    level: Literal["ok", "warning", "failure"]
    seen: str
    cure: str = ""


def place_of(rank: int) -> str:
    """Return this machine's name, with the rank of this process."""
    return f"{socket.gethostname()} (rank {rank})"


def table(findings: Sequence[Finding]) -> str:
    """Format findings with their cures, and count them."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:8s} {finding.check:10s} {finding.seen}")
        if finding.cure:
            lines.append(f"{'':19s} cure: {finding.cure}")
    failures, warnings = (sum(finding.level == level for finding in findings) for level in ("failure", "warning"))
    lines.append(f"{len(findings)} checks: {failures} failed, {warnings} with a warning")
    return "\n".join(lines)


def failed(findings: Sequence[Finding]) -> bool:
    """Return whether training should not start."""
    return any(finding.level == "failure" for finding in findings)
