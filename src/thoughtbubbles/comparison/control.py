"""Whether extra computation pays at all where variants are compared: without that no comparison says much of forks.

The dense model's parameters on as many tokens, with more computation: serial, where all blocks are applied several
times, or parallel, where every token is several streams from the start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thoughtbubbles.comparison.compare import Tuned
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.support.statistics import Estimate, interval

SEEDS = 3
"""With fewer, nothing is said of how much seeds differ that could be trusted."""
RATES = 3
"""With fewer, the best of them is at the edge of those tried."""
PAYS, FAILS, OPEN = "pays", "doesn't pay", "can't tell"
SERIAL, PARALLEL = "serial", "parallel"
NAMES = {SERIAL: "looped", PARALLEL: "copy-root, copy-average or pause"}
NOTHING = "Nothing about forks follows."


@dataclass(frozen=True)
class Trial:
    """A variant with more computation than the dense one, and no more parameters, beside it.

    Attributes:
        name: of the variant.
        title: for people.
        kind: of its computation, serial or parallel.
        difference: its loss minus the dense one's; None if they have no seed in common.
        caveat: what keeps the learning rates from being the best ones; empty if nothing does.
    """

    name: str
    title: str
    kind: str
    difference: Estimate | None
    caveat: str = ""

    @property
    def verdict(self) -> str:
        """Whether the 95% interval says that it pays."""
        found = self.difference
        if found is None or found.seeds < SEEDS or found.low < 0 <= found.high:
            return OPEN
        return PAYS if found.high < 0 else FAILS


def kind_of(config: ThoughtbubblesConfig) -> str | None:
    """Of the extra computation of a model without gates; None if it has none."""
    if config.copied_layers:
        return PARALLEL if config.exact_budget() > 1 else None
    return SERIAL if config.num_loops > 1 else None


def is_dense(config: ThoughtbubblesConfig) -> bool:
    """Whether a model has neither gates nor more streams than tokens, and applies its blocks once."""
    return config.routing == "none" and config.num_loops == 1


def rate_caveat(sources: Mapping[str, str], tuned: Mapping[str, Tuned]) -> str:
    """What keeps the learning rates of two variants from being the best ones; empty if nothing does.

    Args:
        sources: of each of the two the variant whose rate it takes.
        tuned: the rates tried, by variant.
    """
    if not tuned:
        return "at a learning rate that was not tuned"
    for name, source in sources.items():
        if source != name:
            return f"{name} at the learning rate of {source}"
        if len(tuned[name].losses) < RATES:
            return f"{name} at the better of {len(tuned[name].losses)} learning rates alone"
        if tuned[name].at_edge:
            return f"{name} at a learning rate at the edge of those tried"
    return ""


def control_lines(trials: Sequence[Trial]) -> list[str]:
    """What the trials found, in a line, and in another what follows of it for forks."""
    if not trials:
        wanted = "; ".join(f"{kind}: {names}" for kind, names in NAMES.items())
        return [
            f"Whether extra computation pays in this setting was not asked: it takes the variant dense and another "
            f"({wanted}). {NOTHING}"
        ]
    found = "; ".join(_finding(trial) for trial in trials)
    return [f"Extra computation, dense's parameters at equal tokens: {found}.", _implication(trials)]


def _finding(trial: Trial) -> str:
    difference = trial.difference
    text = f"{trial.kind} ({trial.title}) {trial.verdict}"
    if difference is not None:
        seeds = "1 seed" if difference.seeds == 1 else f"{difference.seeds} seeds"
        text += f", loss {interval(difference)} nats, {seeds}"
        if difference.seeds < SEEDS:
            text += f" of the {SEEDS} that it takes"
    return text + (f", {trial.caveat}" if trial.caveat else "")


def _implication(trials: Sequence[Trial]) -> str:
    serial, parallel = (_kind_verdict([each for each in trials if each.kind == kind]) for kind in (SERIAL, PARALLEL))
    if parallel == PAYS:
        return "Parallel computation pays here, and forks are that: what they gain or lose beside it says something."
    if serial == PAYS and parallel is None:
        return (
            f"Serial computation pays here; parallel, which is what forks are, was not tried ({NAMES[PARALLEL]}): "
            "whether this setting asks for depth alone, which forks don't give, can't be told."
        )
    if serial == PAYS:
        shown = "alone pays" if parallel == FAILS else "alone is shown to pay"
        return f"Serial computation {shown} here: this setting asks for depth, which forks don't give."
    if OPEN in (serial, parallel):
        return f"No extra computation is shown to pay here. {NOTHING}"
    return f"No extra computation that was tried pays here. {NOTHING}"


def _kind_verdict(trials: Sequence[Trial]) -> str | None:
    """Of all trials of a kind; None if there are none."""
    verdicts = {trial.verdict for trial in trials}
    return next((each for each in (PAYS, OPEN, FAILS) if each in verdicts), None)
