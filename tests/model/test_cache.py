"""Decoding with a cache against the full forward and the reference (method: Cache, Near ties)."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, TextStreamer, pipeline

from tests.helpers import LEFT_TO_RIGHT, OTHER_BLOCKS, of_whole_models, set_thresholds
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.memory import BLOCK, RowBuffer
from thoughtbubbles.model.reference import reference_forward

LENGTH = 23
BUDGETS = [1, 1.5, 2, 4]
every_rule = pytest.mark.parametrize("rules", LEFT_TO_RIGHT, ids=str)


def make(dtype: torch.dtype = torch.float64, **fields: object) -> Any:
    torch.manual_seed(0)
    config = ThoughtbubblesConfig(
        **{
            "vocab_size": 31,
            "hidden_size": 32,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "fork_layers": [1, 2, 3],
            "budget": 1.5,
            "initializer_range": 0.2,
            "max_position_embeddings": 512,
            **fields,
        }
    )
    model = ThoughtbubblesForCausalLM(config).to(dtype)
    set_thresholds(model)
    return model.eval()


def ids_and_mask(rows: int) -> tuple[Tensor, Tensor]:
    """Rows padded left, right, with holes and not at all."""
    ids = torch.randint(31, (rows, LENGTH), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((slice(0, 5), slice(19, 23), slice(7, 10), slice(0, 17))[: rows - 1]):
        mask[row, padding] = 0
    return ids, mask


@torch.no_grad()
def in_chunks(model, ids: Tensor, mask: Tensor | None, chunks: list[int], cache: StreamCache | None = None) -> Tensor:
    """Logits of passes over so many columns at a time."""
    cache = StreamCache() if cache is None else cache
    logits, done = [], cache.get_seq_length()
    for chunk in chunks:
        seen = None if mask is None else mask[:, : done + chunk]
        out = model(ids[:, done : done + chunk], attention_mask=seen, cache=cache)
        assert out.cache is cache
        logits.append(out.logits)
        done += chunk
    assert cache.get_seq_length() == done
    return torch.cat(logits, dim=1)


def agree(actual: Tensor, expected: Tensor, mask: Tensor | None, tolerance: float = 1e-9) -> bool:
    difference = (actual - expected).abs()
    return bool((difference if mask is None else difference[mask.bool()]).max() < tolerance)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("rows", "attenuation"), [(1, "paper"), (5, "paper"), (5, "released"), (5, "none")])
def test_each_step_gives_the_logits_of_the_full_forward(budget: float, attenuation: str, rows: int) -> None:
    model = make(budget=budget, attenuation=attenuation)
    ids, mask = ids_and_mask(rows)
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
    assert agree(in_chunks(model, ids, mask, [1] * LENGTH), full, mask)
    assert agree(in_chunks(model, ids, mask, [LENGTH]), full, mask)
    assert agree(in_chunks(model, ids, mask, [9, 1, 1, 5, 7]), full, mask)


@every_rule
@pytest.mark.parametrize(("rows", "attenuation"), [(1, "paper"), (5, "released")])
def test_each_step_by_other_rules(rules: dict[str, Any], attenuation: str, rows: int) -> None:
    model = make(attenuation=attenuation, **rules)
    ids, mask = ids_and_mask(rows)
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
    assert agree(in_chunks(model, ids, mask, [1] * LENGTH), full, mask)
    assert agree(in_chunks(model, ids, mask, [LENGTH]), full, mask)
    assert agree(in_chunks(model, ids, mask, [9, 1, 1, 5, 7]), full, mask)


@pytest.mark.parametrize("merge", ["residual", "residual-normed", "probability", "root"])
@pytest.mark.parametrize("routing", ["causal", "threshold", "none", "random", "uniform", "copy", "pause"])
def test_every_merge_and_the_dense_model(merge: str, routing: str) -> None:
    model = make(merge=merge, routing=routing, budget=2 if routing in ("copy", "pause") else 1.5)
    ids, mask = ids_and_mask(4)
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
    assert agree(in_chunks(model, ids, mask, [4, 1, 1, 8, 1, 8]), full, mask)


@pytest.mark.parametrize("attenuation", ["paper", "released", "none"])
@pytest.mark.parametrize("block", OTHER_BLOCKS, ids=["llama", "neox", "both"])
def test_each_step_by_other_blocks(block: dict[str, Any], attenuation: str) -> None:
    """Chunks, steps alone, and rows that wait for each other: queries that share a key stand behind each other."""
    model = make(attenuation=attenuation, **block)
    for rows in (1, 4):
        ids, mask = ids_and_mask(rows)
        with torch.no_grad():
            full = model(ids, attention_mask=mask).logits
        assert agree(in_chunks(model, ids, mask, [9, 1, 1, 5, *[1] * (LENGTH - 16)]), full, mask)


@every_rule
def test_each_step_by_other_rules_gives_the_logits_of_the_reference(rules: dict[str, Any]) -> None:
    model = make(**rules)
    ids, mask = ids_and_mask(2)
    reference = reference_forward(model.config, dict(model.state_dict()), ids, mask)
    assert agree(in_chunks(model, ids, mask, [6, *[1] * (LENGTH - 6)]), reference.logits, mask)


@pytest.mark.parametrize("attenuation", ["paper", "released"])
def test_each_step_gives_the_logits_of_the_reference(attenuation: str) -> None:
    model = make(attenuation=attenuation)
    ids, mask = ids_and_mask(2)
    reference = reference_forward(model.config, dict(model.state_dict()), ids, mask)
    assert agree(in_chunks(model, ids, mask, [6, *[1] * (LENGTH - 6)]), reference.logits, mask)


@of_whole_models
@given(splits=st.lists(st.integers(1, 9), min_size=1, max_size=12), budget=st.sampled_from([1, 1.2, 1.5, 2, 3.25]))
def test_any_split_into_chunks(splits: list[int], budget: float) -> None:
    model = make(budget=budget)
    splits = [split for index, split in enumerate(splits) if sum(splits[: index + 1]) <= LENGTH] or [LENGTH]
    ids, mask = ids_and_mask(3)
    ids, mask = ids[:, : sum(splits)], mask[:, : sum(splits)]
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
    assert agree(in_chunks(model, ids, mask, splits), full, mask)


@every_rule
def test_passes_of_padding_alone(rules: dict[str, Any]) -> None:
    model = make(**rules)
    ids, mask = ids_and_mask(5)
    mask[:, :3] = mask[:, 9:11] = 0
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
    assert agree(in_chunks(model, ids, mask, [2, 1, 6, 1, 1, 12]), full, mask)


def test_bfloat16_keeps_the_bias_precise() -> None:
    model = make(torch.bfloat16)
    ids, _ = ids_and_mask(1)
    with torch.no_grad():
        full = model(ids, budget=1).logits
        cache = StreamCache()
        steps = [model(ids[:, i : i + 1], cache=cache, budget=1).logits for i in range(LENGTH)]
    assert (torch.cat(steps, 1) - full).norm() / full.norm() < 0.02


def greedy(model, ids: Tensor, mask: Tensor | None = None, **arguments: object) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    out: Tensor = model.generate(
        ids, attention_mask=mask, do_sample=False, pad_token_id=0, eos_token_id=None, **arguments
    )
    return out


@pytest.mark.parametrize(
    ("rows", "budget", "tokens"),
    [
        *((rows, budget, 40) for rows, budget in ((1, 2), (5, 1.5), (5, 4))),
        *(pytest.param(rows, budget, 200, marks=pytest.mark.long) for rows in (1, 5) for budget in BUDGETS),
    ],
)
def test_greedy_tokens_are_those_of_recomputing(budget: float, rows: int, tokens: int) -> None:
    model = make(torch.float32)
    ids, mask = ids_and_mask(rows)
    ids, mask = ids[:, :12], mask[:, :12].clone()
    mask[:, -1] = 1
    arguments = {"max_new_tokens": tokens, "budget": budget}
    assert torch.equal(greedy(model, ids, mask, **arguments), greedy(model, ids, mask, use_cache=False, **arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"do_sample": True, "top_p": 0.8, "temperature": 1.3},
        {"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.3},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=str,
)
def test_generate_is_the_same_with_and_without_the_cache(arguments: dict[str, object]) -> None:
    model = make()
    ids, mask = ids_and_mask(3)
    ids, mask = ids[:, :8], torch.ones_like(mask[:, :8])
    mask[0, :3] = 0
    made = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        common = {"max_new_tokens": 12, "pad_token_id": 0, "use_cache": use_cache, "do_sample": False}
        made.append(model.generate(ids, attention_mask=mask, **{**common, **arguments}))
    assert torch.equal(*made)


@pytest.mark.parametrize(
    "rules", [LEFT_TO_RIGHT[0], *(pytest.param(rules, marks=pytest.mark.long) for rules in LEFT_TO_RIGHT[1:])], ids=str
)
def test_beams_by_other_rules_are_the_same_with_and_without_the_cache(rules: dict[str, Any]) -> None:
    model = make(**rules)
    ids, mask = ids_and_mask(3)
    ids, mask = ids[:, :8], torch.ones_like(mask[:, :8])
    mask[0, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 20, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments))


def test_generate_uses_the_cache_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = make(), []
    forward = model.model.forward

    def count(**arguments):
        widths.append(arguments["input_ids"].shape[1])
        return forward(**arguments)

    monkeypatch.setattr(model.model, "forward", count)
    greedy(model, ids_and_mask(1)[0], max_new_tokens=5)
    assert widths == [LENGTH, 1, 1, 1, 1]


def test_assisted_decoding_and_prompt_lookup_are_greedy() -> None:
    model, assistant = make(), make(routing="none", num_hidden_layers=2, fork_layers=[])
    ids = ids_and_mask(1)[0]
    expected = greedy(model, ids, max_new_tokens=40, use_cache=False)
    assert torch.equal(greedy(model, ids, max_new_tokens=40, assistant_model=assistant), expected)
    assert torch.equal(greedy(model, ids, max_new_tokens=40, prompt_lookup_num_tokens=3), expected)


def test_streamer_stop_strings_and_pipeline(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from thoughtbubbles.model.loading import load_model, load_tokenizer

    model: Any = load_model(tiny_run, "cpu")
    tokenizer: Any = load_tokenizer(tiny_run)
    row = tokenizer("the", return_tensors="pt")
    arguments = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    out = model.generate(**row, streamer=TextStreamer(tokenizer, skip_special_tokens=True), **arguments)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == text.strip()
    stop = tokenizer.decode(out[0, 3])
    stopped = model.generate(**row, stop_strings=[stop], tokenizer=tokenizer, **arguments)
    assert stopped.shape[1] <= 4
    make_pipeline: Any = pipeline
    pipe = make_pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert pipe("the", max_new_tokens=9, do_sample=False)[0]["generated_text"] == text


@pytest.mark.parametrize(
    ("rules", "keep"),
    [*(({}, keep) for keep in (0, 1, 9, 22)), *((rules, 9) for rules in LEFT_TO_RIGHT)],
    ids=str,
)
def test_crop_forgets_the_last_columns(keep: int, rules: dict[str, Any]) -> None:
    model = make(**rules)
    ids, mask = ids_and_mask(4)
    cache = StreamCache()
    in_chunks(model, ids, mask, [LENGTH], cache)
    cache.crop(keep - LENGTH)
    assert cache.get_seq_length() == keep
    other = torch.cat([ids[:, :keep], ids.flip(1)[:, keep:]], dim=1)
    with torch.no_grad():
        full = model(other, attention_mask=mask).logits
    rest = in_chunks(model, other, mask, [1] * (LENGTH - keep), cache)
    assert agree(rest, full[:, keep:], mask[:, keep:])


def test_crop_of_nothing_and_a_positive_number() -> None:
    cache = StreamCache()
    cache.crop(-3)
    in_chunks(make(), ids_and_mask(1)[0], None, [5], cache)
    cache.crop(0)
    assert cache.get_seq_length() == 5
    with pytest.raises(ValueError, match="tokens_to_remove=3: expected the negative"):
        cache.crop(3)


@pytest.mark.parametrize("rules", [{}, *LEFT_TO_RIGHT], ids=str)
def test_rows_can_be_reordered_selected_and_repeated(rules: dict[str, Any]) -> None:
    model = make(**rules)
    ids, mask = ids_and_mask(4)
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0, 3])), [2, 0, 0, 3]),
        (lambda cache: cache.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    ):
        cache = StreamCache()
        in_chunks(model, ids, mask, [6, 5], cache)
        change(cache)
        rest = in_chunks(model, ids[rows], mask[rows], [1, 4, 1, 6], cache)
        assert agree(rest, full[rows][:, 11:], mask[rows][:, 11:])


def test_reset_forgets_everything() -> None:
    model, cache = make(), StreamCache()
    ids, mask = ids_and_mask(3)
    in_chunks(model, ids, mask, [7], cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.is_initialized) == (0, 0, False)
    with torch.no_grad():
        full = model(ids[:2], attention_mask=mask[:2], budget=2).logits
        again = model(ids[:2], attention_mask=mask[:2], budget=2, cache=cache).logits
    assert agree(again, full, mask[:2])


def test_memory_grows_in_blocks_with_the_streams_that_live() -> None:
    narrow, wide = StreamCache(), StreamCache()
    model, ids = make(torch.float32, fork_layers=[1]), torch.randint(31, (1, 300))
    with torch.no_grad():
        model(ids, cache=narrow, budget=1)
        model(ids, cache=wide, budget=2)
    assert narrow.attention[2].keys.data.shape[2] == 3 * BLOCK
    assert wide.attention[2].keys.data.shape[2] == 5 * BLOCK
    assert wide.attention[2].lengths == [600]
    assert wide.attention[0].lengths == [300]


def test_row_buffer_lays_rows_at_their_own_places() -> None:
    buffer = RowBuffer(1)
    buffer.write(torch.tensor([[1, 2, 3], [4, 5, 6]]), [0, 0])
    buffer.write(torch.tensor([[7, 8], [9, 10]]), [3, 1])
    assert buffer.read(5).tolist() == [[1, 2, 3, 7, 8], [4, 9, 10, 0, 0]]


@pytest.mark.parametrize(
    ("rules", "own"),
    [({"routing": "causal"}, {"routing": "topk"}), ({"routing": "random"}, {"random_rule": "topk"})],
    ids=["topk", "random-topk"],
)
def test_a_topk_model_decodes_causally_and_says_so_once(
    caplog: pytest.LogCaptureFixture, rules: dict[str, Any], own: dict[str, Any]
) -> None:
    model, causal = make(budget=2, **{**rules, **own}), make(budget=2, **rules)
    model.load_state_dict(causal.state_dict())
    ids = ids_and_mask(1)[0]
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        assert torch.equal(greedy(model, ids, max_new_tokens=12), greedy(causal, ids, max_new_tokens=12))
        greedy(model, ids, max_new_tokens=3)
    finally:
        library.removeHandler(caplog.handler)
    assert sum("routes causally" in record.message for record in caplog.records) <= 1
    recomputed = greedy(model, ids, max_new_tokens=6, use_cache=False)
    for end in range(LENGTH, LENGTH + 6):
        assert model(recomputed[:, :end]).logits[0, -1].argmax() == recomputed[0, end]


def test_forward_makes_a_cache_only_if_asked() -> None:
    model, ids = make(), ids_and_mask(1)[0]
    assert model(ids).cache is None
    assert model(ids, use_cache=False).cache is None
    assert isinstance(model(ids, use_cache=True).cache, StreamCache)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_either_name_of_a_cache(name: str) -> None:
    model, ids = make(), ids_and_mask(1)[0]
    whole, expected = model(ids).logits, greedy(model, ids, max_new_tokens=5)
    given = StreamCache()
    model(ids[:, :9], **{name: given})
    out = model(ids[:, 9:], **{name: given})
    assert out.cache is out.past_key_values is given
    torch.testing.assert_close(out.logits, whole[:, 9:])
    given.crop(-1)
    assert torch.equal(greedy(model, ids, max_new_tokens=5, **{name: given}), expected)
    assert given.get_seq_length() == LENGTH + 4


class TestBadInput:
    def cache(self, **fields: object) -> StreamCache:
        cache = StreamCache()
        in_chunks(make(**fields), *ids_and_mask(3), [8], cache)
        return cache

    def test_another_budget(self) -> None:
        with pytest.raises(ValueError, match="budget=2: expected 3/2, with which the cache was filled"):
            make()(torch.ones(3, 1, dtype=torch.int64), cache=self.cache(), budget=2)

    def test_another_batch(self) -> None:
        with pytest.raises(ValueError, match="batch of 2 rows: expected 3, those of the cache"):
            make()(torch.ones(2, 1, dtype=torch.int64), cache=self.cache())

    def test_another_model(self) -> None:
        with pytest.raises(
            ValueError, match=r"model with \{'head_dim': 16, 'hidden_size': 32, 'intermediate_size': 128\}"
        ):
            make(hidden_size=16)(torch.ones(3, 1, dtype=torch.int64), cache=self.cache())

    @pytest.mark.parametrize(
        ("field", "other"),
        [
            ("attenuation", "released"),
            ("attenuation", "none"),
            ("merge", "root"),
            ("gate_scores", "forks"),
            ("gate_scores", "fixed"),
            ("fork_embedding", "relative"),
            ("fork_content", "attended"),
            ("fork_layers", [1, 2, 4]),
            ("routing", "threshold"),
            ("routing", "uniform"),
            ("routing_seed", 7),
            ("rope_theta", 500.0),
            ("layer_norm_eps", 1e-3),
            ("hidden_act", "relu"),
            ("num_key_value_heads", 1),
            ("head_dim", 10),
            ("mlp", "gated"),
            ("norm", "rmsnorm"),
            ("qk_norm", True),
            ("parallel_residual", True),
            ("partial_rotary_factor", 0.5),
            ("rope_parameters", {"rope_type": "linear", "factor": 2.0}),
        ],
    )
    def test_another_setting(self, field: str, other: object) -> None:
        with pytest.raises(ValueError, match=rf"filled by a model with \{{'{field}': .*, expected \{{'{field}': "):
            make(**{field: other})(torch.ones(3, 1, dtype=torch.int64), cache=self.cache())

    @pytest.mark.parametrize(
        ("change", "before"),
        [
            (lambda config: setattr(config, "attenuation", "none"), r"\{'attenuation': 'paper'\}"),
            (lambda config: config.fork_layers.append(4), r"\{'fork_layers': \[1, 2, 3\]\}"),
        ],
        ids=["replaced", "in-place"],
    )
    def test_a_setting_changed_under_way(self, change: Callable[[Any], None], before: str) -> None:
        model, cache = make(), StreamCache()
        ids = torch.ones(1, 2, dtype=torch.int64)
        model(ids, cache=cache)
        change(model.config)
        with pytest.raises(ValueError, match=f"model with {before}"):
            model(ids, cache=cache)

    def test_a_model_that_copies(self) -> None:
        with pytest.raises(ValueError, match=r"model with \{'routing': 'none'\}"):
            make(routing="copy", budget=1)(
                torch.ones(3, 1, dtype=torch.int64), cache=self.cache(routing="none", budget=1)
            )

    def test_another_class(self) -> None:
        with pytest.raises(ValueError, match="DynamicCache: expected a StreamCache"):
            make()(torch.ones(3, 1, dtype=torch.int64), cache=DynamicCache())

    def test_two_caches(self) -> None:
        with pytest.raises(ValueError, match="cache and past_key_values: expected one of the two"):
            make()(torch.ones(3, 1, dtype=torch.int64), cache=self.cache(), past_key_values=self.cache())

    def test_another_implementation(self) -> None:
        with pytest.raises(ValueError, match="cache_implementation='quantized': expected None, 'dynamic' or 'static'"):
            make().generate(torch.ones(1, 3, dtype=torch.int64), cache_implementation="quantized", max_new_tokens=2)

    def test_mask_without_the_past(self) -> None:
        ones = torch.ones(3, 1, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 1\): expected \(3, 9\)"):
            make()(ones, attention_mask=ones, cache=self.cache())

    def test_longer_than_the_longest_row(self) -> None:
        model = make(max_position_embeddings=10)
        cache = StreamCache()
        model(torch.ones(1, 8, dtype=torch.int64), cache=cache)
        with pytest.raises(ValueError, match="input of 11 tokens: expected at most max_position_embeddings=10"):
            model(torch.ones(1, 3, dtype=torch.int64), cache=cache)
        assert cache.get_seq_length() == 8

    def test_budget_below_1(self) -> None:
        with pytest.raises(ValueError, match=r"budget=0\.5: expected"):
            make().generate(torch.ones(1, 3, dtype=torch.int64), budget=0.5, max_new_tokens=2)

    def test_gradient_checkpointing(self) -> None:
        model = make().train()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with pytest.raises(ValueError, match="expected none while gradient checkpointing"):
            model(torch.ones(1, 3, dtype=torch.int64), use_cache=True)
