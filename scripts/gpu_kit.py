"""Pack what scripts/gpu.py needs on a machine without a network.

python scripts/gpu_kit.py kit --data runs/books-8k --installed there.txt --wheels kit/wheels

A kit holds the prepared data of recipes/compare/books-gpu.yaml, compressed; what the slow reference says of the cases
of the part `correct`, which takes minutes here and would take them there; and the Python packages that the other
machine lacks, as wheels. `there.txt` is what `python3 -m pip list --format=freeze` prints there.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "scripts", "")]

from gpu_parts.cases import REFERENCES_NAME, TOY, all_cases, make_reference, name_of, write_references  # noqa: E402
from gpu_parts.kit import DATA_NAME, KIT_NAME, checksum, pack_file, read_kit  # noqa: E402
from thoughtbubbles.data import prepare  # noqa: E402
from thoughtbubbles.support.files import write_text  # noqa: E402
from thoughtbubbles.support.machine import describe_machine  # noqa: E402

MOST_BYTES = 40 << 20
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    """Pack."""
    options = parse_arguments()
    options.kit.mkdir(parents=True, exist_ok=True)
    pack_references(options.kit, TOY if options.toy else None)
    data = toy_data(options.kit) if options.toy else options.data
    missing = missing_packages(options.installed, options.python)
    files = {} if data is None else pack_data(data, options.kit)
    facts = {"files": files, "packages": missing, "machine": describe_machine()}
    if options.wheels is not None:
        download(missing, options.wheels, options.python)
    write_text(options.kit / KIT_NAME, json.dumps(facts, indent=1) + "\n")
    size = sum(path.stat().st_size for path in options.kit.rglob("*") if path.is_file())
    print(f"{options.kit}: {size / 2**20:.1f} MiB; packages to bring: {', '.join(missing) or 'none'}")
    if size > MOST_BYTES:
        raise SystemExit(f"{options.kit} is larger than {MOST_BYTES >> 20} MiB: expected less data")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path, help="folder to pack into")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--data", type=Path, help="folder that `thoughtbubbles prepare` wrote; without it no comparison")
    given.add_argument("--toy", action="store_true", help="little of everything, on the source of this package")
    parser.add_argument("--installed", type=Path, help="what pip lists on the other machine, a package a line")
    parser.add_argument("--wheels", type=Path, help="folder to download the missing packages to")
    parser.add_argument("--python", default="3.12", help="of the other machine [%(default)s]")
    return parser.parse_args()


def pack_references(kit: Path, count: int | None) -> None:
    """What the reference says of the first `count` cases, or of all."""
    cases = all_cases()[:count]
    if count is None:
        with ProcessPoolExecutor() as pool:
            found = list(pool.map(make_reference, cases))
    else:
        found = [make_reference(case) for case in cases]
    write_references(kit / REFERENCES_NAME, dict(zip(map(name_of, cases), found, strict=True)))


def toy_data(kit: Path) -> Path:
    """A small prepared folder."""
    folder = kit / ".prepared"
    prepare(
        folder,
        [str(ROOT / "src" / "thoughtbubbles" / "*.py")],
        vocab_size=512,
        block_size=64,
        limit_tokens=60_000,
        progress=False,
    )
    return folder


def pack_data(folder: Path, kit: Path) -> dict[str, str]:
    """The checksum of each file of a prepared folder, by its path in the kit; what is packed there already is left."""
    before = read_kit(kit)["files"] if (kit / KIT_NAME).exists() else {}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    packed = {f"{DATA_NAME}/{path.relative_to(folder).as_posix()}": checksum(path) for path in files}
    if packed != before:
        shutil.rmtree(kit / DATA_NAME, ignore_errors=True)
        for name, path in zip(packed, files, strict=True):
            pack_file(path, kit / name)
    if folder.parent == kit:
        shutil.rmtree(folder)
    return packed


def missing_packages(installed: Path | None, python: str) -> list[str]:
    """What this package needs, directly or not, and the other machine lacks, as NAME==VERSION of this machine."""
    if installed is None:
        return []
    there = {}
    for line in installed.read_text(encoding="utf-8").splitlines():
        name, _, found = line.strip().partition("==")
        if name and not name.startswith("#"):
            there[canonicalize_name(name)] = found
    missing: dict[str, None] = {}
    waiting = list(needs("thoughtbubbles", python))
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        if name in missing or (name in there and (not there[name] or need.specifier.contains(there[name], True))):
            continue
        missing[name] = None
        waiting += needs(name, python)
    return sorted(f"{name}=={version(name)}" for name in missing)


def needs(name: str, python: str) -> Iterator[Requirement]:
    """What a package that is installed here requires on the other machine."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    try:
        stated = requires(name) or []
    except PackageNotFoundError:
        return
    for need in map(Requirement, stated):
        if need.marker is None or need.marker.evaluate(environment):
            yield need


def download(packages: list[str], folder: Path, python: str) -> None:
    """Wheels of the packages for the other machine's Python."""
    if not packages:
        return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
    command += ["--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*map(str, command), *packages], check=True)


if __name__ == "__main__":
    main()
