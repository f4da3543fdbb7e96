"""The benchmarks that `thoughtbubbles evaluate` knows: their names, files, tiers and clusters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thoughtbubbles.evaluation.localdata import find_file
from thoughtbubbles.evaluation.records import hash_files
from thoughtbubbles.recipes.values import check_known
from thoughtbubbles.support.errors import InputError, RunError, one_line
from thoughtbubbles.support.sampling import spread

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

TIERS = ("smoke", "small", "full")
LOCAL_TASKS = Path(__file__).parent / "tasks"
# The seed by which the harness draws worked examples.
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: as users say it.
        task: the harness's name, of a task or of a group.
        folder: where the harness keeps it, below lm_eval/tasks; None where it is ours alone, of the authors' protocol.
        files: that --data-dir has to hold.
        documents: of the tiers `smoke` and `small`; `full` is all.
        headline: the metric to plot.
        cluster_field: the field of a document that says which group of alike ones it is from.
    """

    name: str
    task: str
    folder: str | None
    files: tuple[str, ...]
    documents: tuple[int, int]
    headline: str
    cluster_field: str | None = None

    def limit(self, tier: str) -> int | None:
        """Documents of a tier; None is all."""
        return dict(zip(TIERS, (*self.documents, None), strict=True))[tier]


BENCHMARKS: Mapping[str, Benchmark] = {
    each.name: each
    for each in (
        Benchmark("lambada", "lambada_openai", "lambada", ("lambada",), (64, 1000), "acc"),
        Benchmark("hellaswag", "hellaswag", "hellaswag", ("hellaswag",), (64, 1000), "acc_norm"),
        # Multiples of the 67 paradigms, so that each has as many pairs.
        Benchmark("blimp", "blimp", "blimp", ("blimp",), (134, 3350), "acc", "uid"),
        Benchmark("piqa", "piqa", "piqa", ("piqa",), (64, 1000), "acc_norm"),
        Benchmark("arc_easy", "arc_easy", "arc", ("arc_easy",), (64, 1000), "acc_norm"),
        Benchmark("arc_challenge", "arc_challenge", "arc", ("arc_challenge",), (64, 1000), "acc_norm"),
        Benchmark("gsm8k", "gsm8k", "gsm8k", ("gsm8k-train", "gsm8k-test"), (16, 200), "exact_match,strict-match"),
        Benchmark("gsm8k_bare", "gsm8k_bare", None, ("gsm8k-test",), (16, 200), "exact_match"),
        Benchmark("wikitext", "wikitext", "wikitext", ("wikitext2-test.txt",), (2, 20), "word_perplexity"),
    )
}


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark with its documents.

    Attributes:
        benchmark: which.
        tasks: of the harness; several where it is a group, whose members are its clusters.
        version: of the task, or of the group.
        data: identity of the files of its documents; `hub` where they are the harness's own.
    """

    benchmark: Benchmark
    tasks: Mapping[str, "ConfigurableTask"]
    version: str
    data: str

    def samples(self, limit: int | None) -> dict[str, list[int]]:
        """The documents to evaluate: `limit` in all, spread evenly over the whole and over the tasks of a group."""
        share = None if limit is None else max(1, limit // len(self.tasks))
        return {name: spread(len(task.eval_docs), share) for name, task in self.tasks.items()}


def parse_tasks(text: str) -> list[Benchmark]:
    """Benchmarks from a list of names with commas.

    Raises:
        InputError: for an unknown name, with the nearest known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"--tasks {text!r}: expected names with commas between, of {', '.join(BENCHMARKS)}")
    for name in names:
        check_known(name, tuple(BENCHMARKS), "task", InputError)
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]


def check_files(benchmarks: Sequence[Benchmark], data_dir: Path) -> None:
    """Check that a folder has the files of some benchmarks, before anything is loaded.

    Raises:
        InputError: no such folder, or a file is missing.
    """
    for benchmark in benchmarks:
        for stem in benchmark.files:
            find_file(data_dir, stem)


def data_identity(benchmark: Benchmark, data_dir: Path | None) -> str:
    """A hash of a benchmark's files in a folder; `hub` without one."""
    return "hub" if data_dir is None else hash_files([find_file(data_dir, stem) for stem in benchmark.files])


def load_benchmark(benchmark: Benchmark, data_dir: Path | None, num_fewshot: int | None = None) -> LoadedBenchmark:
    """Open a benchmark, from a folder or, without one, from the hub as the harness does.

    Args:
        num_fewshot: worked examples before each document, in place of the task's own number.

    Raises:
        InputError: documents that cannot be had, or worked examples asked for where there are none.
    """
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    theirs = data_dir is None and benchmark.folder is not None
    tasks_folder = Path(str(lm_eval.tasks.__file__)).parent / str(benchmark.folder) if theirs else LOCAL_TASKS
    metadata: dict[str, Any] = {} if data_dir is None else {"data_dir": str(data_dir)}
    manager = TaskManager(include_path=tasks_folder, include_defaults=False, metadata=metadata)
    try:
        loaded = manager.load([benchmark.task])
    except (InputError, RunError):
        raise
    except Exception as error:  # the hub and its libraries raise anything
        raise InputError(f"task {benchmark.name}: its documents cannot be had: {one_line(error)}") from error
    tasks: dict[str, ConfigurableTask] = {}
    for name, task in loaded["tasks"].items():
        assert isinstance(task, ConfigurableTask)
        if num_fewshot and task.config.num_fewshot != 0 and not task.has_training_docs():
            raise InputError(f"--num-fewshot {num_fewshot}: expected 0, since {benchmark.name} has no examples to show")
        _prepare(task, num_fewshot)
        tasks[name] = task
    group = loaded.get("groups", {}).get(benchmark.task)
    version = next(iter(tasks.values())).VERSION if group is None else group.version
    return LoadedBenchmark(benchmark, tasks, str(version), data_identity(benchmark, data_dir))


def _prepare(task: "ConfigurableTask", num_fewshot: int | None) -> None:
    """What the harness's `simple_evaluate` does to a task: the number and the draw of its worked examples."""
    own = task.config.num_fewshot
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
