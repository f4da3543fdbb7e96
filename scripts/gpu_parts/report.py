"""What a part came to; read without torch, so that the command that runs the parts starts at once."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """What a part came to; its JSON.

    Attributes:
        machine: what it ran on.
        rehearsal: whether at toy size.
        items: figures by item.
        failed: by item, in a line.
        left: items that the time did not suffice for.
        running: the item that a stopped process was at.
        seconds: spent, all calls together.
    """

    machine: dict[str, str] = field(default_factory=dict)
    rehearsal: bool = False
    items: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    running: str | None = None
    seconds: float = 0.0

    @classmethod
    def read(cls, path: Path) -> "Report":
        """That of an earlier call, or a new one."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()

    def write(self, path: Path) -> None:
        """Write the JSON, whole or not at all."""
        from thoughtbubbles.support.files import write_text

        write_text(path, json.dumps(vars(self), indent=1) + "\n")

    @property
    def is_done(self) -> bool:
        """Whether nothing is left and nothing failed."""
        return bool(self.items) and not (self.left or self.failed or self.running)

    def line(self) -> str:
        """In short."""
        parts = [f"{len(self.items)} done", f"{len(self.failed)} failed", f"{len(self.left)} left"]
        return f"{', '.join(parts)}, {self.seconds:.0f} s"
