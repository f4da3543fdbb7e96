"""The whole system on one GPU, in one command: what runs, whether it is right, how fast, and a small comparison.

python scripts/gpu.py --output runs/gpu runs the parts below in order, each in a process of its own for as long as it
may take, and keeps what each has found in OUTPUT/PART.json. A part that fails stops no other one; a second call does
what is left. Without a network, scripts/gpu_kit.py packs what is needed beforehand.

facts       the device, versions, its fastest matrix product and copy
correct     the fast paths against the slow reference, in float32, bfloat16, cached and compiled
training    time, throughput and memory of training steps of the paper's shapes
compare     recipes/compare/books-gpu.yaml, as many of its runs as the time allows
llama       a Llama's block of ours beside transformers' own: the same numbers, the time of a step
attention   ways to attend with a bias of the key, by time and error
decoding    time of a decoding step, ours and others'
"""

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "scripts")]

from gpu_parts.report import Report  # noqa: E402 - the package need not be installed

LIMITS = {
    "facts": 20.0,
    "correct": 90.0,
    "training": 120.0,
    "compare": 300.0,
    "llama": 60.0,
    "attention": 40.0,
    "decoding": 45.0,
}
"""Seconds of each part, in the order in which they run."""
GRACE = 15.0
"""Seconds that a part which overruns has before it is killed."""
LEAST = 5.0
PIECE_BYTES = 15 << 20
ARCHIVE = "results.tar.gz"
KEPT = ("*.json", "*.log", "compare/report.*", "compare/runs/*/*/*.json*", "compare/runs/*/*/recipe.yaml")
MODEL = "model/**/*"
MOST_BYTES = 60 << 20


def main() -> None:
    """Run the parts; exit code 1 if one failed, or in a rehearsal if anything is left."""
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    if options.rehearse and not (options.kit / "kit.json").exists():
        options.kit = pack_toy_kit(options.output)
    for part in options.parts:
        run(part, end - time.monotonic(), options)
    reports = {part: Report.read(options.output / f"{part}.json") for part in options.parts}
    say_what_is_left(reports)
    if options.archive is not None:
        archive(options.output, options.archive)
    wanted = all(report.is_done for report in reports.values())
    if any(report.failed or report.running for report in reports.values()) or (options.rehearse and not wanted):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results; what is there is not redone")
    parser.add_argument("--parts", type=parts, default=list(LIMITS), help="some of them, as in facts,training [all]")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all of them together [%(default)s]")
    parser.add_argument("--kit", type=Path, default=Path("kit"), help="folder that scripts/gpu_kit.py packed [kit]")
    parser.add_argument("--archive", type=Path, help="folder to which results are packed, in pieces of 15 MiB at most")
    parser.add_argument(
        "--rehearse", action="store_true", help="everything at toy size on the CPU; nothing may be left"
    )
    options = parser.parse_args()
    options.output, options.kit = options.output.resolve(), options.kit.resolve()
    return options


def parts(text: str) -> list[str]:
    """Names of parts, in the order in which they run."""
    names = text.split(",")
    if unknown := set(names) - LIMITS.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(LIMITS)}")
    return [name for name in LIMITS if name in names]


def pack_toy_kit(output: Path) -> Path:
    """What a rehearsal needs where nothing was packed: a few references and little data."""
    kit = output / "kit"
    if not (kit / "kit.json").exists():
        command = [sys.executable, str(ROOT / "scripts" / "gpu_kit.py"), str(kit), "--toy"]
        subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return kit


def run(part: str, left: float, options: argparse.Namespace) -> None:
    """Run a part in a process of its own, unless it is done or no time is left, and print what came of it."""
    path = options.output / f"{part}.json"
    if Report.read(path).is_done:
        print(f"{part:<10} done before", flush=True)
        return
    if left < LEAST:
        return
    seconds = left if options.rehearse else min(LIMITS[part], left)
    command = [sys.executable, "-m", f"gpu_parts.{part}", "--output", str(options.output), "--kit", str(options.kit)]
    command += ["--seconds", f"{seconds:.1f}", *(["--rehearse"] if options.rehearse else [])]
    with (options.output / f"{part}.log").open("a", encoding="utf-8") as log:
        note = "" if ended(command, log, seconds + GRACE) else f", killed after {seconds + GRACE:.0f} s"
    print(f"{part:<10} {Report.read(path).line()}{note}", flush=True)


def ended(command: list[str], log: IO[str], seconds: float) -> bool:
    """Whether a command ended by itself; if not, it is killed with all that it started."""
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), cwd=ROOT, start_new_session=True)
    try:
        process.wait(timeout=seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment() -> dict[str, str]:
    """That of a part: the package, its siblings and the helpers of the tests from this checkout, no network."""
    folders = [ROOT / "src", ROOT / "scripts", ROOT / "benchmarks", ROOT]
    folders += [Path(each).resolve() for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONUNBUFFERED": "1"}


def say_what_is_left(reports: dict[str, Report]) -> None:
    """Name what failed, was killed at work, or found no time."""
    for part, report in reports.items():
        for item, line in report.failed.items():
            print(f"failed: {part}: {item}: {line}")
        if report.running is not None:
            print(f"stopped at: {part}: {report.running}")
        if not report.items and not report.failed:
            print(f"left: {part}: all of it; see {part}.log")
        elif report.left:
            print(f"left: {part}: {', '.join(report.left)}")


def archive(output: Path, target: Path) -> None:
    """Pack JSONs, logs, metrics and the smallest trained model into pieces that are small enough to carry."""
    target.mkdir(parents=True, exist_ok=True)
    whole = output / ARCHIVE
    with tarfile.open(whole, "w:gz") as packed:
        for path in kept_files(output):
            packed.add(path, path.relative_to(output))
    content = whole.read_bytes()
    for old in target.glob(f"{ARCHIVE}.*"):
        old.unlink()
    for number, first in enumerate(range(0, len(content), PIECE_BYTES)):
        (target / f"{ARCHIVE}.{number:02}").write_bytes(content[first : first + PIECE_BYTES])
    print(f"{len(content) / 2**20:.1f} MiB of results in {target}: cat {ARCHIVE}.* | tar xz")


def kept_files(output: Path) -> Iterator[Path]:
    """What goes into the archive."""
    files = [path for pattern in KEPT for path in sorted(output.glob(pattern)) if path.is_file()]
    model = [path for path in sorted(output.glob(MODEL)) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    if size + sum(path.stat().st_size for path in model) <= MOST_BYTES:
        files += model
    elif model:
        print(f"left out of the archive: {output / 'model'}, which is too large")
    yield from files


if __name__ == "__main__":
    main()
