"""Evaluate a model on benchmarks at several budgets, keeping what every document scored."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from thoughtbubbles.evaluation.benchmarks import TIERS, Benchmark, check_files, data_identity, load_benchmark
from thoughtbubbles.evaluation.harness import adapter, require_harness
from thoughtbubbles.evaluation.records import EvaluationFolder, hash_files
from thoughtbubbles.evaluation.scoring import quiet_harness, run_task
from thoughtbubbles.model.budget import budget_text, parse_budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.loading import find_model, load_config, load_model, load_tokenizer
from thoughtbubbles.recipes.values import check_known
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.progress import say


@dataclass(frozen=True)
class Options:
    """What to evaluate on and how; all but the batch size and the budgets can change a score.

    Attributes:
        benchmarks: which.
        data_dir: folder of their files; None takes the harness's own from the hub.
        tier: how many documents: `smoke`, `small` or `full`.
        limit: so many documents of each benchmark in place of the tier's.
        budgets: streams per token; None is the model's own.
        num_fewshot: worked examples before each document, in place of the task's own number.
        use_cache: False recomputes the prefix for every generated token.
        batch_size: texts at a time.
    """

    benchmarks: Sequence[Benchmark]
    data_dir: Path | None = None
    tier: str = "small"
    limit: int | None = None
    budgets: Sequence[Fraction] | None = None
    num_fewshot: int | None = None
    use_cache: bool = True
    batch_size: int = 8

    def settings(self) -> dict[str, Any]:
        """What two calls into one folder must have in common."""
        return {
            "documents": f"tier {self.tier}" if self.limit is None else f"limit {self.limit}",
            "num_fewshot": self.num_fewshot,
            "use_cache": self.use_cache,
        }


def parse_budgets(text: str) -> list[Fraction]:
    """Budgets from a list with commas, each once.

    Raises:
        InputError: for one that is no budget.
    """
    try:
        return list(dict.fromkeys(parse_budget(part.strip()) for part in text.split(",")))
    except ValueError as error:
        raise InputError(f"--{error}") from None


def evaluate(model: str, output: Path, options: Options, progress: bool = True) -> EvaluationFolder:
    """Evaluate a model into a folder; what the folder holds already is not done again.

    Args:
        model: a run's folder, a model's folder, or a hub name.
        output: the folder.
        progress: say what is done, on standard error.

    Raises:
        InputError: for a model, documents or options that cannot be used, or a folder that holds something else.
    """
    require_harness()
    check_known(options.tier, TIERS, "tier", InputError)
    if options.data_dir is not None:
        check_files(options.benchmarks, options.data_dir)
    config = load_config(model)
    budgets = choose_budgets(config, options.budgets, progress)
    tokenizer = load_tokenizer(model)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"model {model}: its tokenizer has {len(tokenizer)} tokens, expected at most the {config.vocab_size} of "
            "its vocab_size"
        )
    folder = EvaluationFolder(output)
    with folder.opened(_settings(model, config, options)):
        todo = [(each, left) for each in options.benchmarks if (left := _left(folder, each, budgets, options))]
        if not todo:
            return folder
        with quiet_harness(progress):
            lm = adapter()(
                load_model(model), use_cache=options.use_cache, tokenizer=tokenizer, batch_size=options.batch_size
            )
            for benchmark, left in todo:
                _evaluate_task(lm, benchmark, left, options, folder, progress)
    return folder


def _left(
    folder: EvaluationFolder, benchmark: Benchmark, budgets: Sequence[Fraction], options: Options
) -> list[Fraction]:
    """The budgets at which a benchmark is not done yet."""
    left = []
    for budget in budgets:
        path = folder.file(benchmark.name, budget_text(budget))
        if not path.exists():
            left.append(budget)
        elif folder.read(path).data != data_identity(benchmark, options.data_dir):
            raise InputError(f"{path} is of other files of {benchmark.name}: expected another --output")
    return left


def choose_budgets(config: ThoughtbubblesConfig, asked: Sequence[Fraction] | None, progress: bool) -> list[Fraction]:
    """The budgets to evaluate at: those asked for, or the model's own; 1 alone where a budget has no effect.

    Raises:
        InputError: for one that the model cannot have.
    """
    if not (config.gated_layers or config.copied_layers):
        if asked and list(asked) != [1]:
            say("the model is dense: its budget is 1", progress)
        return [Fraction(1)]
    try:
        return [config.exact_budget(budget) for budget in asked] if asked else [config.exact_budget()]
    except ValueError as error:
        raise InputError(f"--{error}") from None


def _settings(model: str, config: ThoughtbubblesConfig, options: Options) -> dict[str, Any]:
    name = find_model(model)
    weights = list(Path(name).glob("*.safetensors"))
    facts = config.to_diff_dict()
    for unstable in ("transformers_version", "_name_or_path"):
        facts.pop(unstable, None)
    return {
        "model": model,
        "config_hash": hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:16],
        "weights_hash": hash_files(weights)[:16] if weights else str(getattr(config, "_commit_hash", None)),
        "routing": config.routing,
        "own_budget": budget_text(config.exact_budget()),
        **options.settings(),
    }


def _evaluate_task(
    lm: Any,
    benchmark: Benchmark,
    budgets: Sequence[Fraction],
    options: Options,
    folder: EvaluationFolder,
    progress: bool,
) -> None:
    limit = benchmark.limit(options.tier) if options.limit is None else options.limit
    loaded = load_benchmark(benchmark, options.data_dir, options.num_fewshot)
    for budget in budgets:
        say(f"{benchmark.name} at budget {budget_text(budget)}", progress)
        lm.budget, lm.truncated = budget, 0
        record = run_task(lm, loaded, budget, limit, progress)
        if record.truncated:
            say(f"{benchmark.name}: {record.truncated:,} texts did not fit the model, their starts are cut", progress)
        folder.write(record)
