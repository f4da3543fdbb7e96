"""The folder of an evaluation: what every document scored, and what the call was about."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from thoughtbubbles.support.errors import InputError, one_line
from thoughtbubbles.support.files import made_folder, write_text
from thoughtbubbles.support.folders import Marks, has_keys, output_folder
from thoughtbubbles.support.machine import describe_machine
from thoughtbubbles.support.statistics import Scores

SETTINGS_NAME = "settings.json"
DOCUMENTS_NAME = "documents"
# What says that a folder is one of an evaluation.
MARKS: Marks = {SETTINGS_NAME: ("model", "config_hash", "weights_hash")}


@dataclass(frozen=True)
class MetricRecord:
    """A metric, document by document.

    Attributes:
        protocol: `harness`, `authors` or `gold`.
        metric: its name; with a comma and the filter where the harness has several.
        kind: how documents are aggregated, one of `statistics.KINDS`.
        higher_is_better: whether more is better.
        leaks: whether the scores saw later tokens (routing `topk` in one forward).
        values: of each document.
        weights: what they are divided by; None is 1.
    """

    protocol: str
    metric: str
    kind: str
    higher_is_better: bool
    leaks: bool
    values: list[float]
    weights: list[float] | None = None


@dataclass(frozen=True)
class TaskRecord:
    """A task at a budget: a file of its own, so that an interrupted call does not do it again.

    Attributes:
        task: name of the benchmark.
        budget: streams per token, as text.
        version: the harness's, of the task.
        data: identity of the files of its documents; `hub` where they are the harness's own.
        num_fewshot: worked examples before each document.
        documents: names of the documents, in their order.
        clusters: of which group of alike documents each is; None where there are no groups.
        metrics: what was measured.
        generations: what the model wrote for each document, if it did.
        truncated: texts whose left end did not fit the model.
        made_with: versions, commit, batch size.
    """

    task: str
    budget: str
    version: str
    data: str
    num_fewshot: int
    documents: list[str]
    clusters: list[str] | None
    metrics: list[MetricRecord]
    generations: list[str] | None
    truncated: int
    made_with: dict[str, str]

    def scores(self, metric: MetricRecord) -> Scores:
        """A metric as statistics take it."""
        weights = metric.weights or [1.0] * len(metric.values)
        return Scores.of(metric.kind, list(zip(metric.values, weights, strict=True)), self.clusters)

    def find(self, protocol: str, metric: str) -> MetricRecord | None:
        """The metric of a name, if it was measured."""
        return next((each for each in self.metrics if (each.protocol, each.metric) == (protocol, metric)), None)


@dataclass(frozen=True)
class EvaluationFolder:
    """The folder of an evaluation: settings.json and documents/TASK-budget-B.json.

    Attributes:
        path: the folder.
    """

    path: Path

    @contextmanager
    def opened(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Begin an evaluation, or go on with one of the same settings; one that nothing came of leaves nothing.

        Raises:
            InputError: the folder holds something else, or an evaluation of other settings; saying what differs.
            RunError: the disk is full or broken.
        """
        with output_folder(self.path, MARKS):
            begun = self.path / SETTINGS_NAME
            if begun.exists():
                self._check_same(settings)
            else:
                write_text(begun, json.dumps(dict(settings), indent=2) + "\n")
            try:
                yield
            except BaseException:
                if not (self.path / DOCUMENTS_NAME).exists():
                    begun.unlink()
                raise

    def _check_same(self, settings: Mapping[str, Any]) -> None:
        changed = [
            f"{name}: {self.settings.get(name)} is now {value}"
            for name, value in settings.items()
            if name != "model" and self.settings.get(name) != value  # a model may be moved
        ]
        if changed:
            raise InputError(f"--output {self.path} holds an evaluation of other settings: {'; '.join(changed)}")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the evaluation is about.

        Raises:
            InputError: it is not the folder of an evaluation.
        """
        if not has_keys(self.path / SETTINGS_NAME, MARKS[SETTINGS_NAME]):
            raise InputError(
                f"{self.path}: expected the folder of an evaluation, which `thoughtbubbles evaluate --output` wrote"
            )
        found: dict[str, Any] = json.loads((self.path / SETTINGS_NAME).read_text(encoding="utf-8"))
        return found

    def file(self, task: str, budget: str) -> Path:
        """Where a task at a budget is kept."""
        return self.path / DOCUMENTS_NAME / f"{task}-budget-{budget.replace('/', '_')}.json"

    def write(self, record: TaskRecord) -> None:
        """Keep a task's record, whole or not at all."""
        path = self.file(record.task, record.budget)
        with made_folder(path.parent):
            write_text(path, json.dumps(asdict(record)) + "\n")

    def read(self, path: Path) -> TaskRecord:
        """A task's record.

        Raises:
            InputError: it is damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return TaskRecord(**{**content, "metrics": [MetricRecord(**each) for each in content["metrics"]]})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(
                f"{path} is damaged: {one_line(error)}; remove it, and `evaluate` measures it again"
            ) from error

    def records(self, tasks: Sequence[str]) -> list[TaskRecord]:
        """All that there are, in the order of `tasks` and of budgets."""
        found = [self.read(path) for path in sorted((self.path / DOCUMENTS_NAME).glob("*.json"))]
        return sorted(found, key=lambda each: (tasks.index(each.task), Fraction(each.budget)))


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 of files' contents, in the order of their names."""
    content = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()


def provenance() -> dict[str, str]:
    """Commit of the source, where it is a checkout, the machine and versions."""
    return {**describe_machine(), "lm_eval": version("lm_eval")}
