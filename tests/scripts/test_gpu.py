"""scripts/gpu.py and scripts/gpu_kit.py: a rehearsal, and what happens to items, kits and archives."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from tests.run_fixtures import tiny_recipe
from thoughtbubbles.data import PreparedData
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.training.folder import check_same_run

ROOT = Path(__file__).parents[2]
PARTS = ("facts", "correct", "training", "compare", "llama", "attention", "decoding")


@pytest.fixture(scope="module", autouse=True)
def script_folders() -> Iterator[None]:
    """The scripts are modules of folders that a part's process has on its path."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("benchmarks", "scripts"):
            patch.syspath_prepend(str(ROOT / folder))
        yield


@pytest.fixture
def driver() -> ModuleType:
    from gpu_parts import driver

    return driver


def gpu(*arguments: object, root: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(root / "scripts" / "gpu.py"), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_a_short_rehearsal(tmp_path: Path) -> None:
    """By a checkout that was copied to an empty folder, with nothing beside it."""
    root = tmp_path / "copy"
    for folder in ("src", "scripts", "benchmarks", "tests", "recipes"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    output, pieces = tmp_path / "output", tmp_path / "pieces"
    rehearse = (
        "--rehearse",
        "--output",
        output,
        "--kit",
        tmp_path / "absent",
        "--parts",
        "facts,correct",
        "--minutes",
        9,
    )
    done = gpu(*rehearse, "--archive", pieces, root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {part: json.loads((output / f"{part}.json").read_text()) for part in ("facts", "correct")}
    assert found["facts"]["items"]["matmul"]["bfloat16"] > 0
    assert len(found["correct"]["items"]) == 5
    assert not any(report["failed"] or report["left"] for report in found.values())
    content = b"".join(path.read_bytes() for path in sorted(pieces.iterdir()))
    assert content == (output / "results.tar.gz").read_bytes()
    again = gpu(*rehearse, root=root)
    assert again.stdout.splitlines() == [f"{part:<10} done before" for part in found]


@pytest.mark.long
def test_a_whole_rehearsal(tmp_path: Path) -> None:
    done = gpu("--rehearse", "--output", tmp_path, "--kit", tmp_path / "absent", "--minutes", 9)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(PARTS)
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_unknown_parts_are_named(tmp_path: Path) -> None:
    done = gpu("--rehearse", "--output", tmp_path, "--parts", "facts,dance")
    assert done.returncode == 2
    assert "dance: expected some of facts, correct" in done.stderr


def setting_of(driver: ModuleType, output: Path, seconds: float) -> object:
    return driver.Setting(output, output, True, time.monotonic() + seconds)


def test_items_that_fail_or_find_no_time_stop_no_other(driver: ModuleType, tmp_path: Path) -> None:
    from gpu_parts.report import Report

    def fail() -> dict[str, object]:
        raise RuntimeError("no such kernel\nsecond line")

    calls: list[str] = []

    def item(name: str, seconds: float, **figures: object) -> object:
        def work() -> dict[str, object]:
            calls.append(name)
            return figures

        return driver.Item(name, seconds, work)

    path = tmp_path / "part.json"
    items = [item("long", 100), driver.Item("broken", 0, fail), item("off", 0, faults=["a is 2"]), item("good", 0, a=1)]
    report = driver.carry_out(items, setting_of(driver, tmp_path, 50), path)
    assert report.left == ["long"]
    assert report.failed == {"broken": "RuntimeError: no such kernel", "off": "a is 2"}
    assert report.items["good"] == {"a": 1}
    assert not report.is_done
    # A second call does what is left and what failed, and nothing else.
    calls.clear()
    report = driver.carry_out([*items[:1], item("broken", 0), *items[2:]], setting_of(driver, tmp_path, 200), path)
    assert calls == ["long", "broken", "off"]
    assert report.failed == {"off": "a is 2"}
    assert Report.read(path) == report


def test_what_a_killed_part_was_at_comes_last(driver: ModuleType, tmp_path: Path) -> None:
    from gpu_parts.report import Report

    path, calls = tmp_path / "part.json", []
    Report(running="hangs").write(path)

    def work(name: str) -> dict[str, object]:
        calls.append(name)
        return {}

    items = [driver.Item(name, 0, partial(work, name)) for name in ("hangs", "works")]
    driver.carry_out(items, setting_of(driver, tmp_path, 50), path)
    assert calls == ["works", "hangs"]


def test_a_part_that_overruns_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    import gpu

    sleeper = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
    with (tmp_path / "log").open("w") as log:
        assert not gpu.ended([sys.executable, "-c", f"{sleeper}; import time; time.sleep(60)"], log, 2)
        assert gpu.ended([sys.executable, "-c", "pass"], log, 60)
    grandchild = int((tmp_path / "log").read_text())
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE


def test_a_kit_comes_back_byte_by_byte_or_not_at_all(tmp_path: Path) -> None:
    from gpu_kit import pack_data
    from gpu_parts.kit import unpack_folder

    source, kit = tmp_path / "source", tmp_path / "kit"
    (source / "train").mkdir(parents=True)
    (source / "train" / "ids").write_bytes(bytes(range(256)) * 300)
    (source / "manifest.json").write_text("{}")
    (kit).mkdir()
    (kit / "kit.json").write_text(json.dumps({"files": pack_data(source, kit)}))
    unpacked = unpack_folder(kit, "data", tmp_path / "unpacked")
    for path in ("train/ids", "manifest.json"):
        assert (unpacked / path).read_bytes() == (source / path).read_bytes()
    packed = kit / "data" / "manifest.json.bz2"
    packed.rename(packed.with_suffix(".gone"))
    pack_data(source, kit)
    assert not packed.exists(), "what has not changed is not packed again"
    (source / "manifest.json").write_text("{ }")
    pack_data(source, kit)
    assert packed.exists()
    (kit / "kit.json").write_text((kit / "kit.json").read_text().replace('"data/train/ids": "', '"data/train/ids": "0'))
    with pytest.raises(ValueError, match="is not what was packed"):
        unpack_folder(kit, "data", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="has no models"):
        unpack_folder(kit, "models", tmp_path / "models")


def test_packages_that_another_machine_lacks(tmp_path: Path) -> None:
    from gpu_kit import missing_packages, needs

    everything = {"torch", "thoughtbubbles"}
    waiting = ["thoughtbubbles"]
    while waiting:
        new = {need.name.lower().replace("_", "-") for need in needs(waiting.pop(), "3.12")} - everything
        everything |= new
        waiting += new
    installed = tmp_path / "there.txt"
    there = sorted(everything - {"datasets", "dill", "multiprocess"})
    installed.write_text("# by pip\n" + "\n".join(there))
    missing = [each.partition("==")[0] for each in missing_packages(installed, "3.12")]
    assert missing == ["datasets", "dill", "multiprocess"]
    installed.write_text("\n".join([*there, "datasets==1.0", "dill", "multiprocess"]))  # too old
    assert [each.partition("==")[0] for each in missing_packages(installed, "3.12")] == ["datasets"]


def test_an_archive_is_cut_into_pieces_and_a_large_model_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    output = tmp_path / "output"
    (output / "model").mkdir(parents=True)
    (output / "facts.json").write_text("{}")
    (output / "model" / "weights").write_bytes(os.urandom(5000))
    monkeypatch.setattr(gpu, "PIECE_BYTES", 2000)
    gpu.archive(output, tmp_path / "pieces")
    assert [path.name for path in sorted((tmp_path / "pieces").iterdir())] == [f"results.tar.gz.0{n}" for n in range(3)]
    monkeypatch.setattr(gpu, "MOST_BYTES", 100)
    gpu.archive(output, tmp_path / "pieces")
    assert len(list((tmp_path / "pieces").iterdir())) == 1
    assert "left out of the archive" in capsys.readouterr().out


def test_runs_are_taken_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    from gpu_parts.compare import next_runs

    content = {"seeds": [0, 1], "variants": dict.fromkeys("abcdef"), "baseline": "a"}

    def finish(*runs: str) -> None:
        for run in runs:
            folder = tmp_path / "runs" / run[0] / f"seed-{run[1]}"
            folder.mkdir(parents=True)
            (folder / "measurements.json").touch()

    assert next_runs(content, tmp_path) == {"seeds": [0], "variants": dict.fromkeys("abcd")}
    finish("a0", "b0", "d0")
    assert next_runs(content, tmp_path) == {"seeds": [0], "variants": dict.fromkeys("abcdef")}
    finish("c0", "e0", "f0", "b1")
    assert next_runs(content, tmp_path) == {"seeds": [0, 1], "variants": dict.fromkeys("abcde")}
    finish("a1", "c1", "d1", "e1", "f1")
    assert next_runs(content, tmp_path) == {}


def test_runs_of_another_machine_go_on_where_they_are_brought(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData
) -> None:
    from gpu_parts.compare import take_over

    shutil.copytree(tiny_run, tmp_path / "done" / "dense" / "seed-0", ignore=shutil.ignore_patterns("checkpoints"))
    data = tmp_path / "data"
    shutil.copytree(tiny_data.path, data)
    take_over(tmp_path / "done", tmp_path / "runs", data)
    taken = tmp_path / "runs" / "dense" / "seed-0"
    (tmp_path / "recipe").mkdir()
    recipe = tiny_recipe(tmp_path / "recipe", data, f"training.output={taken}")
    check_same_run(recipe, load_run_data(recipe, progress=False), taken)
    (tmp_path / "done" / "dense" / "seed-0" / "run.json").write_text('{"data": "other"}')
    take_over(tmp_path / "done", tmp_path / "none", data)
    assert not (tmp_path / "none").exists()
