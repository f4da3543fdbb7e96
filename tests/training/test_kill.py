"""SIGKILL at random moments: the run can always go on, and ends as if nothing had happened."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.run_fixtures import tiny_recipe
from tests.training.test_run import comparable
from thoughtbubbles.data import PreparedData
from thoughtbubbles.recipes.training import Recipe
from thoughtbubbles.training.checkpoints import PREFIX
from thoughtbubbles.training.folder import RunSummary
from thoughtbubbles.training.run import train

OVERRIDES = ("training.save_every=1", "training.eval_every=2", "training.log_every=3")


def start(recipe: Recipe, log: Path) -> int:
    """Train in a forked child, which has everything imported; its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            train(recipe)
            status = 0
        finally:
            os._exit(status)
    return child


def wait_for_a_half_written_checkpoint(recipe: Recipe, seconds: float = 2.0) -> None:
    """Until one is there, or for so long, should the run have ended."""
    folder, end = Path(recipe.training.output) / "checkpoints", time.monotonic() + seconds
    while time.monotonic() < end and not any(folder.glob(f".{PREFIX}*")):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(("kills", "steps"), [(4, 15), pytest.param(20, 30, marks=pytest.mark.long)])
def test_a_run_survives_being_killed_again_and_again(
    tmp_path: Path, tiny_data: PreparedData, kills: int, steps: int
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    overrides = (*OVERRIDES, f"training.steps={steps}")
    whole, killed = (tiny_recipe(tmp_path / name, tiny_data.path, *overrides) for name in ("whole", "killed"))
    began = time.monotonic()
    train(whole, progress=False)
    duration = time.monotonic() - began
    moments = random.Random(kills)
    log = tmp_path / "log"
    for kill in range(kills):
        child = start(killed, log)
        # A fork goes through less than the run above, which may have been the first to import something.
        time.sleep(moments.uniform(0, 0.5 * duration))
        if kill % 2:
            wait_for_a_half_written_checkpoint(killed)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, log.read_text()
    _, status = os.waitpid(start(killed, log), 0)
    assert status == 0, log.read_text()
    assert comparable(tmp_path / "killed" / "run") == comparable(tmp_path / "whole" / "run")
    summaries = [RunSummary.read(tmp_path / name / "run") for name in ("killed", "whole")]
    assert summaries[0].eval_loss == summaries[1].eval_loss
