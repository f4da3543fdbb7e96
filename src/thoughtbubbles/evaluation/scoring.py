"""A benchmark at one budget: the harness's evaluator and the other protocols, down to a record of every document."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from thoughtbubbles.data.sources.hub import quiet_datasets
from thoughtbubbles.evaluation.benchmarks import Benchmark, LoadedBenchmark
from thoughtbubbles.evaluation.protocols import measure_documents
from thoughtbubbles.evaluation.records import MetricRecord, TaskRecord, provenance
from thoughtbubbles.model.budget import budget_text


@contextmanager
def quiet_harness(progress: bool) -> Iterator[None]:
    """No warnings of the harness, which are for those who write tasks; without progress no bars of it either."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet_datasets(), nullcontext() if progress else redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def run_task(
    lm: Any, loaded: LoadedBenchmark, budget: Fraction, limit: int | None, progress: bool = False
) -> TaskRecord:
    """A benchmark's record at one budget, by the harness's evaluator and by our own protocols.

    Args:
        lm: the adapter's instance, at that budget.
        loaded: the benchmark.
        budget: for the record.
        limit: documents, evenly spread; None is all.
        progress: show bars of ours.
    """
    from lm_eval.evaluator import evaluate as run_harness

    benchmark = loaded.benchmark
    results = run_harness(lm, {"tasks": dict(loaded.tasks)}, samples=loaded.samples(limit), bootstrap_iters=0)
    assert results is not None
    rows = [_Rows(name, results["samples"][name]) for name in loaded.tasks]
    first = next(iter(loaded.tasks.values()))
    samples = [sample for part in rows for sample in part.of_each_document]
    documents = [sample["doc"] for sample in samples]
    leaks = lm.model.config.leaks
    metrics = _harness_metrics(first, rows, leaks, "authors" if benchmark.folder is None else "harness")
    metrics += [
        MetricRecord(each.protocol, each.metric, "mean", True, leaks, each.values)
        for each in measure_documents(benchmark.name, lm, documents, progress)
    ]
    return TaskRecord(
        task=benchmark.name,
        budget=budget_text(budget),
        version=loaded.version,
        data=loaded.data,
        num_fewshot=int(first.config.num_fewshot or 0),
        documents=[f"{part.task}/{sample['doc_id']}" for part in rows for sample in part.of_each_document],
        clusters=_clusters(benchmark, rows),
        metrics=metrics,
        generations=[sample["resps"][0][0] for sample in samples] if first.OUTPUT_TYPE == "generate_until" else None,
        truncated=lm.truncated,
        made_with={**provenance(), "batch_size": str(lm.batch_size)},
    )


@dataclass(frozen=True)
class _Rows:
    """What the harness logged of one of its tasks: a sample for each filter and document.

    Attributes:
        task: its name.
        samples: all of them.
    """

    task: str
    samples: Sequence[Mapping[str, Any]]

    @property
    def filters(self) -> list[str]:
        return list(dict.fromkeys(sample["filter"] for sample in self.samples))

    def by(self, name: str) -> list[Mapping[str, Any]]:
        """Those of one filter, in the order of the documents."""
        return sorted((each for each in self.samples if each["filter"] == name), key=lambda each: each["doc_id"])

    @property
    def of_each_document(self) -> list[Mapping[str, Any]]:
        return self.by(self.filters[0])


def _harness_metrics(task: Any, rows: Sequence[_Rows], leaks: bool, protocol: str) -> list[MetricRecord]:
    """The metrics of a task that the harness evaluates; what it generates token by token never leaks."""
    filters = rows[0].filters
    found = []
    for name in filters:
        samples = [sample for part in rows for sample in part.by(name)]
        for metric in samples[0]["metrics"]:
            values = [sample[metric] for sample in samples]
            weighted = isinstance(values[0], tuple)
            found.append(
                MetricRecord(
                    protocol=protocol,
                    metric=metric if len(filters) == 1 else f"{metric},{name}",
                    kind=task.aggregation()[metric].__name__,
                    higher_is_better=bool(task.higher_is_better()[metric]),
                    leaks=leaks and task.OUTPUT_TYPE != "generate_until",
                    values=[float(value[0] if weighted else value) for value in values],
                    weights=[float(value[1]) for value in values] if weighted else None,
                )
            )
    return found


def _clusters(benchmark: Benchmark, rows: Sequence[_Rows]) -> list[str] | None:
    if len(rows) > 1:
        return [part.task for part in rows for _ in part.of_each_document]
    if benchmark.cluster_field is None:
        return None
    return [str(sample["doc"][benchmark.cluster_field]) for sample in rows[0].of_each_document]
