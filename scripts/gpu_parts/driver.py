"""What the parts of scripts/gpu.py share: items of work one after the other, each kept as soon as it is done.

A part is a list of items. Its JSON is written anew after each of them, so that a part that is stopped, by the clock or
by a fault, loses no more than the item it was at, and a second call does what is left.
"""

import argparse
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_parts.report import Report
from thoughtbubbles.support.machine import describe_machine

FAULTS = "faults"
"""Key of an item's figures that lists what is not as it should be."""


@dataclass(frozen=True)
class Setting:
    """How a part is run.

    Attributes:
        output: folder of the results.
        kit: folder that scripts/gpu_kit.py packed.
        rehearse: at toy size, to see that everything runs.
        end: `time.monotonic` by which the part is to be done.
    """

    output: Path
    kit: Path
    rehearse: bool
    end: float

    @property
    def device(self) -> str:
        """Type of the device that is measured; a rehearsal needs none."""
        return "cuda" if torch.cuda.is_available() and not self.rehearse else "cpu"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


@dataclass(frozen=True)
class Item:
    """A piece of work.

    Attributes:
        name: of its figures in the JSON.
        seconds: about how long it takes; it is left for another time where less is left.
        work: does it and returns the figures.
    """

    name: str
    seconds: float
    work: Callable[[], dict[str, Any]]


def run_part(name: str, items: Callable[[Setting], Iterable[Item]], description: str | None) -> None:
    """Carry a part out as its command line says; exit code 1 if an item failed."""
    parser = argparse.ArgumentParser(prog=f"python -m gpu_parts.{name}", description=(description or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--kit", type=Path, required=True, help="folder that scripts/gpu_kit.py packed")
    parser.add_argument("--seconds", type=float, required=True, help="to be done in")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy size")
    options = parser.parse_args()
    setting = Setting(options.output, options.kit, options.rehearse, time.monotonic() + options.seconds)
    report = carry_out(items(setting), setting, options.output / f"{name}.json")
    if report.failed:
        raise SystemExit("\n".join(f"{item}: {line}" for item, line in report.failed.items()))


def carry_out(items: Iterable[Item], setting: Setting, path: Path) -> Report:
    """Do what is not done yet, as far as the time goes. What stopped an earlier call comes last."""
    report = Report.read(path)
    report.machine, report.rehearsal = describe_machine(setting.device), setting.rehearse
    waiting = [item for item in items if item.name not in report.items or item.name in report.failed]
    waiting.sort(key=lambda item: item.name in (report.running, *report.failed))
    before, start = report.seconds, time.monotonic()
    report.failed, report.running = {}, None
    report.left = [item.name for item in waiting]
    for item in waiting:
        if setting.left < item.seconds:
            continue
        report.running = item.name
        report.write(path)
        try:
            figures = item.work()
        except Exception as error:  # whatever it is, the next item may do
            traceback.print_exc()
            report.failed[item.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            report.items[item.name] = figures
            if faults := figures.get(FAULTS):
                report.failed[item.name] = "; ".join(faults)
        if setting.device == "cuda":
            torch.cuda.empty_cache()
        report.left.remove(item.name)
        report.running, report.seconds = None, before + time.monotonic() - start
        report.write(path)
    report.write(path)
    return report
