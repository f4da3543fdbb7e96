from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.evaluation.generation import Sampling, generate_text
from thoughtbubbles.inspection.bubbles import final_bubbles, mark_bubbles
from thoughtbubbles.model.loading import load_model, load_tokenizer
from thoughtbubbles.support.text import RECORD

GREEDY = Sampling(temperature=0)


@pytest.fixture
def model(tiny_run: Path) -> ThoughtbubblesForCausalLM:
    return load_model(tiny_run, "cpu")


@pytest.fixture
def tokenizer(tiny_run: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_run)


def test_greedy_text_is_the_argmax_of_each_prefix(model, tokenizer) -> None:
    made = generate_text(model, tokenizer, "the", 6, GREEDY)
    ids = [tokenizer.bos_token_id, *tokenizer.encode("the", add_special_tokens=False)]
    assert made.prompt_tokens == len(ids)
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert made.ids == ids
    assert made.continuation == tokenizer.decode(ids[made.prompt_tokens :], skip_special_tokens=True)


@pytest.mark.parametrize("several", [False, True])
def test_a_text_ends_where_the_models_own_settings_say(
    model, tokenizer, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    whole = generate_text(model, tokenizer, "the", 6, GREEDY)
    written = whole.ids[whole.prompt_tokens :]
    end = written[2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [0, end] if several else end)
    made = generate_text(model, tokenizer, "the", 6, GREEDY)
    assert made.ids[made.prompt_tokens :] == written[: written.index(end) + 1] != written


def test_sampling_repeats_for_a_seed_and_stops_at_the_longest_row(model, tokenizer) -> None:
    made = [generate_text(model, tokenizer, "the", 1000, Sampling(1.0), seed=seed) for seed in (3, 3, 4)]
    assert made[0] == made[1] != made[2]
    assert all(len(each.ids) <= model.config.max_position_embeddings for each in made)


def test_the_rows_end_is_said(model, tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    made = generate_text(model, tokenizer, "the", 1000, Sampling(temperature=0))
    ended = made.ids[-1] == tokenizer.eos_token_id
    said = [record.getMessage() for record in caplog.records]
    assert said == ([] if ended else ["stopped at the end of the longest row: 16 tokens (max_position_embeddings)"])
    assert ended or len(made.ids) == 16


@pytest.mark.parametrize("sampling", [Sampling(1.5, top_k=1), Sampling(1.5, top_p=1e-6), Sampling(1.5, min_p=1.0)])
def test_narrow_sampling_is_greedy(model, tokenizer, sampling: Sampling) -> None:
    assert (
        generate_text(model, tokenizer, "the", 8, sampling).ids == generate_text(model, tokenizer, "the", 8, GREEDY).ids
    )


def test_repetition_penalty_changes_what_is_chosen(model, tokenizer) -> None:
    strict = Sampling(temperature=0, repetition_penalty=50.0)
    ids = generate_text(model, tokenizer, "the", 8, strict).ids
    assert len(set(ids)) == len(ids)
    assert ids != generate_text(model, tokenizer, "the", 8, GREEDY).ids


def test_prompt_too_long(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="expected at most 15, separator included"):
        generate_text(model, tokenizer, "zq" * 40)


def test_empty_prompt_needs_a_token_to_start_with(model, tokenizer) -> None:
    assert generate_text(model, tokenizer, "", 2).prompt_tokens == 1
    tokenizer.bos_token = tokenizer.eos_token = None
    del tokenizer.init_kwargs[RECORD]
    with pytest.raises(ValueError, match="no token to start a document with"):
        generate_text(model, tokenizer, "")


def test_bad_budget(model, tokenizer) -> None:
    with pytest.raises(ValueError, match=r"budget=0\.5: expected"):
        generate_text(model, tokenizer, "the", budget=0.5)


def test_bubbles_are_marked_behind_their_tokens(model) -> None:
    assert mark_bubbles(["a", " b", "c"], [1, 3, 2]) == "a b⟨3⟩c⟨2⟩"
    sizes = final_bubbles(model, [1, 2, 3, 4, 5, 6], budget=2)
    streams = model(torch.tensor([[1, 2, 3, 4, 5, 6]]), budget=2, output_streams=True).streams[-1]
    assert sum(sizes) == int(streams.alive.sum()) > 6
