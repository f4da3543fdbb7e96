"""Checkpoints: sealed, checked, pruned; and what a run does when one is broken or the disk is full."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.run_fixtures import tiny_recipe
from tests.training.test_run import Kill, comparable, train_with
from thoughtbubbles.data import PreparedData
from thoughtbubbles.support.errors import RunError
from thoughtbubbles.training.checkpoints import Checkpoint, clear_leavings, newest_sound, prune, seal, sealed
from thoughtbubbles.training.run import train


def write_checkpoint(folder: Path, step: int, eval_loss: float | None = None) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(range(100)))
    (path / "inner" / "state").write_bytes(b"state")
    seal(path, step, eval_loss)
    return path


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in sealed(folder)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [truncate, flip_a_bit, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=["truncated", "a bit flipped", "missing"])
@pytest.mark.parametrize("name", ["weights", "inner/state", "seal.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage, name: str) -> None:
    for step in (5, 10):
        write_checkpoint(tmp_path, step)
    if name == "seal.json" and damage is flip_a_bit:
        (tmp_path / "checkpoint-10" / name).write_text("{}")
    else:
        damage(tmp_path / "checkpoint-10" / name)
    warnings: list[str] = []
    found = newest_sound(tmp_path, warnings.append)
    if name == "seal.json" and damage is truncate:
        assert (found.step, warnings) == (10, [])  # only the line's end is gone
    else:
        assert found == Checkpoint(tmp_path / "checkpoint-5", 5, None)
        assert len(warnings) == 1
        assert f"{tmp_path / 'checkpoint-10'} is damaged" in warnings[0]
        assert name in warnings[0]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_sound(tmp_path, warn=pytest.fail) is None


def test_steps_count_as_numbers(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    assert steps(tmp_path) == [9, 20, 100]


@pytest.mark.parametrize(("best", "kept"), [(3, [3, 8, 9]), (9, [8, 9]), (None, [8, 9])])
def test_the_newest_and_the_best_are_kept(tmp_path: Path, best: int | None, kept: list[int]) -> None:
    for step in range(10):
        losses = {None: None, best: 1.5}
        write_checkpoint(tmp_path, step, losses.get(step, 2.0 if step % 2 and best is not None else None))
    prune(tmp_path, keep=2)
    assert steps(tmp_path) == kept
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in kept}


OTHERS = ["checkpoint-backup", "checkpoint-3-copy", "checkpoint-007", "checkpoint-4.old", "checkpoint-", "checkpoint-٣"]


def test_what_has_another_name_is_somebody_elses(tmp_path: Path) -> None:
    for step in range(4):
        write_checkpoint(tmp_path, step)
    hidden = [".checkpoint-backup", ".checkpoint-5.mine", ".checkpoint-x.partial", ".checkpoint-5.partial.keep"]
    for name in (*OTHERS, *hidden):
        shutil.copytree(tmp_path / "checkpoint-3", tmp_path / name)
    assert newest_sound(tmp_path, pytest.fail) == Checkpoint(tmp_path / "checkpoint-3", 3, None)
    prune(tmp_path, keep=1)
    clear_leavings(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", *OTHERS, *hidden}
    assert all((tmp_path / name / "weights").is_file() for name in (*OTHERS, *hidden))


def test_a_link_is_used_and_never_removed(tmp_path: Path) -> None:
    for step in range(3):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-0").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-0").symlink_to("elsewhere")
    prune(tmp_path, keep=1)
    assert steps(tmp_path) == [0, 2]
    assert (tmp_path / "elsewhere" / "weights").is_file()


def test_a_seal_of_another_step_is_damage(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / "checkpoint-10")
    warnings: list[str] = []
    assert newest_sound(tmp_path, warnings.append) == Checkpoint(tmp_path / "checkpoint-5", 5, None)
    assert warnings == [f"checkpoint {tmp_path / 'checkpoint-10'} is damaged (seal.json is of step 5): not used"]
    prune(tmp_path, keep=1)
    assert (tmp_path / "checkpoint-10" / "weights").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "10"},
        {"step": None},
        {"step": True},
        {"eval_loss": "1.5"},
        {"files": {}},
        {"files": []},
        {"files": {"weights": 100}},
        {"files": {"weights": [100]}},
        {"files": {"weights": [100, "0"]}},
    ],
    ids=str,
)
def test_a_seal_of_wrong_types_is_damage(tmp_path: Path, changes: dict[str, object]) -> None:
    write_checkpoint(tmp_path, 10)
    path = tmp_path / "checkpoint-10" / "seal.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    warnings: list[str] = []
    assert newest_sound(tmp_path, warnings.append) is None
    assert warnings == [f"checkpoint {path.parent} is damaged (seal.json is missing or broken): not used"]


def test_a_loss_that_is_not_finite_is_not_the_best(tmp_path: Path) -> None:
    for step, loss in enumerate([float("nan"), 2.0, 1.0, float("-inf"), 3.0]):
        write_checkpoint(tmp_path, step, loss)
    prune(tmp_path, keep=1)
    assert steps(tmp_path) == [2, 4]


def test_leavings_are_cleared(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    for name in (".checkpoint-7.partial", ".checkpoint-3.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    clear_leavings(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("name", ["model.safetensors", "loss_sum.json", "state/.metadata", "draws_0.pt"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    shutil.copytree(tiny_run, tmp_path / "run")
    for entry in ("summary.json", "model/model.safetensors"):
        (tmp_path / "run" / entry).unlink()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    truncate(tmp_path / "run" / "checkpoints" / "checkpoint-12" / name)
    train(recipe)
    messages = capsys.readouterr().err
    assert f"checkpoint-12 is damaged ({name} has " in messages
    assert "going on after step 8 of 12" in messages
    assert comparable(tmp_path / "run") == comparable(tiny_run)
    assert steps(tmp_path / "run" / "checkpoints") == [8, 12]


def test_a_run_keeps_the_best_checkpoint(tmp_path: Path, tiny_data: PreparedData) -> None:
    overrides = ("training.save_every=1", "training.eval_every=3", "training.learning_rate=0.2", "training.seed=1")
    recipe = tiny_recipe(tmp_path, tiny_data.path, *overrides)
    train(recipe, progress=False)
    evaluated = {row["step"]: row["eval_loss"] for row in comparable(tmp_path / "run") if "eval_loss" in row}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert steps(tmp_path / "run" / "checkpoints") == sorted({best, 11, 12})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    small_disk: Path, tmp_path: Path, tiny_run: Path, tiny_data: PreparedData
) -> None:
    recipe = tiny_recipe(small_disk, tiny_data.path, "training.save_every=2")
    with pytest.raises(KeyboardInterrupt):
        train_with(recipe, Kill(at=5))
    run = small_disk / "run"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 30_000))
    with pytest.raises(RunError, match=r"no space left on the disk of .*; the last checkpoint is .*checkpoint-4$"):
        train(recipe, progress=False)
    assert steps(run / "checkpoints")[-1] == 4
    filler.unlink()
    train(recipe, progress=False)
    (tmp_path / "whole").mkdir()
    whole = tiny_recipe(tmp_path / "whole", tiny_data.path, "training.save_every=2")
    train(whole, progress=False)
    assert comparable(run) == comparable(tmp_path / "whole" / "run")


def test_a_full_disk_for_metrics_stops_the_run_too(small_disk: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(small_disk, tiny_data.path)
    with pytest.raises(KeyboardInterrupt):
        train_with(recipe, Kill(at=5))
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(RunError, match="no space left on the disk of"):
        train(recipe, progress=False)
    assert json.loads((small_disk / "run" / "run.json").read_text())["data"]
