"""Whether extra computation pays, in words, and the variants that it takes."""

from pathlib import Path

import numpy as np
import pytest

from tests.comparison.conftest import tiny_comparison
from thoughtbubbles.comparison.compare import Tuned, look
from thoughtbubbles.comparison.control import Trial, control_lines, rate_caveat
from thoughtbubbles.comparison.measuring import measure_run
from thoughtbubbles.comparison.pages import markdown, status
from thoughtbubbles.comparison.results import Report, build_report
from thoughtbubbles.comparison.runs import RunPlanner
from thoughtbubbles.comparison.tables import prices_table
from thoughtbubbles.data import PreparedData
from thoughtbubbles.model.accounting import count_parameters, training_flops
from thoughtbubbles.recipes.training import RecipeError
from thoughtbubbles.support.statistics import Estimate, paired_difference
from thoughtbubbles.training.run import train

BETTER, WORSE, UNSURE = (-0.05, -0.02), (0.02, 0.05), (-0.03, 0.01)
NOTHING, DEPTH = "Nothing about forks follows.", "this setting asks for depth, which forks don't give"


def trial(kind: str, ends: tuple[float, float], seeds: int = 3) -> Trial:
    return Trial(kind, f"a {kind} one", kind, Estimate(sum(ends) / 2, *ends, seeds, 9))


@pytest.mark.parametrize(
    ("ends", "seeds", "verdict"),
    [
        (BETTER, 3, "pays"),
        (WORSE, 3, "doesn't pay"),
        (UNSURE, 3, "can't tell"),
        ((0.0, 0.0), 3, "doesn't pay"),
        ((-0.1, 0.0), 3, "can't tell"),
        (BETTER, 2, "can't tell"),
        (WORSE, 1, "can't tell"),
    ],
)
def test_a_trial_in_a_word(ends: tuple[float, float], seeds: int, verdict: str) -> None:
    made = trial("serial", ends, seeds)
    assert made.verdict == verdict
    assert f"serial (a serial one) {verdict}, loss {sum(ends) / 2:+.4f} [" in control_lines([made])[0]
    assert ("of the 3 that it takes" in control_lines([made])[0]) == (seeds < 3)


def test_differences_of_seeds_become_a_verdict() -> None:
    """A gain that three seeds share, one that they don't, and the first with two seeds."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.001, (3, 40))
    shared = Trial("looped", "", "serial", paired_difference(noise - 0.1, np.zeros((3, 40))))
    apart = noise + np.array([[-0.3], [0.1], [-0.1]])
    split = Trial("looped", "", "serial", paired_difference(apart, np.zeros((3, 40))))
    few = Trial("looped", "", "serial", paired_difference(noise[:2] - 0.1, np.zeros((2, 40))))
    assert [each.verdict for each in (shared, split, few)] == ["pays", "can't tell", "can't tell"]


@pytest.mark.parametrize(
    ("serial", "parallel", "words"),
    [
        (BETTER, BETTER, "Parallel computation pays here, and forks are that"),
        (WORSE, BETTER, "Parallel computation pays here, and forks are that"),
        (BETTER, WORSE, f"Serial computation alone pays here: {DEPTH}."),
        (BETTER, UNSURE, f"Serial computation alone is shown to pay here: {DEPTH}."),
        (WORSE, WORSE, f"No extra computation that was tried pays here. {NOTHING}"),
        (UNSURE, WORSE, f"No extra computation is shown to pay here. {NOTHING}"),
        (WORSE, UNSURE, f"No extra computation is shown to pay here. {NOTHING}"),
        (None, BETTER, "Parallel computation pays here, and forks are that"),
        (None, WORSE, f"No extra computation that was tried pays here. {NOTHING}"),
        (BETTER, None, "Serial computation pays here; parallel, which is what forks are, was not tried"),
    ],
)
def test_what_follows_for_forks(
    serial: tuple[float, float] | None, parallel: tuple[float, float] | None, words: str
) -> None:
    trials = [trial(kind, ends) for kind, ends in (("serial", serial), ("parallel", parallel)) if ends is not None]
    assert control_lines(trials)[1].startswith(words)


def test_with_fewer_seeds_nothing_follows() -> None:
    assert control_lines([trial("serial", BETTER, 2), trial("parallel", BETTER, 2)])[1].endswith(NOTHING)


def test_one_of_several_parallel_ones_is_enough() -> None:
    lines = control_lines([trial("parallel", WORSE), trial("parallel", BETTER), trial("serial", UNSURE)])
    assert lines[1].startswith("Parallel computation pays here")


def test_a_comparison_without_controls_says_so() -> None:
    (line,) = control_lines([])
    assert "was not asked" in line
    assert line.endswith(NOTHING)


def test_rates_that_may_not_be_the_best_are_said() -> None:
    inner, edge = Tuned({1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0}, 2e-3), Tuned({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}, 1e-3)
    tuned = {"dense": inner, "looped": inner, "edge": edge, "few": Tuned({1e-3: 2.0, 2e-3: 1.0}, 2e-3)}
    own = {"dense": "dense"}
    assert rate_caveat({**own, "looped": "looped"}, tuned) == ""
    assert rate_caveat({**own, "looped": "looped"}, {}) == "at a learning rate that was not tuned"
    assert rate_caveat({**own, "looped": "dense"}, tuned) == "looped at the learning rate of dense"
    assert rate_caveat({**own, "edge": "edge"}, tuned) == "edge at a learning rate at the edge of those tried"
    assert rate_caveat({**own, "few": "few"}, tuned) == "few at the better of 2 learning rates alone"


# --- Of finished runs ---

VARIANTS = "[dense, looped, copy-average, causal, causal-half, dense-flops, deeper, wider]"


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory, tiny_data: PreparedData) -> RunPlanner:
    folder = tmp_path_factory.mktemp("controls")
    made = RunPlanner(tiny_comparison(folder, tiny_data.path, "seeds=[0, 1, 2]", "training.steps=2", variants=VARIANTS))
    for run in made.runs({}):
        if run.variant in ("dense", "looped") or run.seed == 0:
            train(run.recipe, progress=False)
            measure_run(run.folder, made.data, made.comparison.evaluation)
    return made


@pytest.fixture(scope="module")
def report(planner: RunPlanner) -> Report:
    return build_report(planner, look(planner))


def test_the_first_line_of_a_report_is_the_controls(report: Report) -> None:
    assert [(each.name, each.kind) for each in report.trials] == [("looped", "serial"), ("copy-average", "parallel")]
    looped, copies = report.trials
    assert looped.difference == report.find("looped").to_baseline
    assert (looped.difference.seeds, copies.difference.seeds) == (3, 1)
    assert copies.verdict == "can't tell"
    line = status(report)[0]
    assert line.startswith("Extra computation, dense's parameters at equal tokens: serial (dense, all layers twice) ")
    assert f"all layers twice) {looped.verdict}, loss " in line
    assert f"[{looped.difference.low:+.4f}, {looped.difference.high:+.4f}] nats, 3 seeds" in line
    assert markdown(report, {}).splitlines()[2] == line


def test_looped_is_dense_with_more_computation(planner: RunPlanner) -> None:
    runs = {run.variant: run for run in planner.runs({})}
    dense, looped = runs["dense"].config, runs["looped"].config
    assert (looped.routing, looped.num_loops) == ("none", 2)
    assert count_parameters(looped) == count_parameters(dense)
    assert runs["looped"].recipe.training.steps == runs["dense"].recipe.training.steps


def test_deeper_and_wider_cost_what_causal_does(planner: RunPlanner, report: Report) -> None:
    runs = {run.variant: run for run in planner.runs({})}
    dense, causal = runs["dense"].config, runs["causal"].config
    target = training_flops(causal, 16)
    for name, fields in (
        ("deeper", ("num_hidden_layers",)),
        ("wider", ("hidden_size", "intermediate_size", "head_dim")),
    ):
        config = runs[name].config
        changed = {field for field, value in config.to_dict().items() if value != dense.to_dict()[field]}
        assert changed == set(fields)
        assert runs[name].recipe.training.steps == runs["causal"].recipe.training.steps
        step = 1 if name == "deeper" else 2 * dense.num_attention_heads
        for size in (getattr(config, fields[0]) - step, getattr(config, fields[0]) + step):
            other = type(config)(**{**config.to_dict(), "head_dim": None, fields[0]: size})
            other.intermediate_size = round(dense.intermediate_size * other.hidden_size / dense.hidden_size)
            # No neighbour comes nearer.
            assert abs(training_flops(config, 16) - target) <= abs(training_flops(other, 16) - target)
    prices = {price.ours: price for price in report.prices}
    assert len(prices) == 3
    for name in ("deeper", "wider"):
        price = prices[planner.comparison.variants[name].title]
        assert price.theirs == "causal, budget 2"
        assert price.times_flops == pytest.approx(training_flops(runs[name].config, 16) / target)
        assert price.difference.seeds == 1
    assert len(prices_table(report).rows) == 3


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            "{like: dense, flops_of: causal, spend: heads}",
            "variants.x.spend='heads': expected one of tokens",
        ),
        ("{like: dense, spend: layers}", "variants.x.spend=layers: expected flops_of"),
        (
            "{like: causal, flops_of: dense, spend: width}",
            "variants.x.flops_of=dense: expected a variant that",
        ),
    ],
)
def test_what_cannot_be_spent(tmp_path: Path, tiny_data: PreparedData, variant: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        RunPlanner(tiny_comparison(tmp_path, tiny_data.path, variants=f"{{dense: , causal: , x: {variant}}}"))
    assert message in str(error.value)
