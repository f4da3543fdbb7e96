"""What tools of transformers hand to the model: the end of the row, positions, caches, smoothed labels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

from tests.helpers import VOCAB, padding_mask, random_ids, tiny_model
from tests.model.test_sharing import tiny_tokenizer
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM

LONGEST = 24
SAID = f"stopped at the end of the longest row: {LONGEST} tokens (max_position_embeddings)"


def short_model(seed: int = 0, **fields: Any) -> ThoughtbubblesForCausalLM:
    return tiny_model(seed, **{"max_position_embeddings": LONGEST, "budget": 1.5, **fields})


def write(model: Any, ids: Tensor | None, **arguments: Any) -> Tensor:
    made: Tensor = model.generate(ids, **{"do_sample": False, "max_new_tokens": 40, **arguments})
    return made


# --- The row's end ---


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_new_tokens": None, "max_length": 100},
        {"max_new_tokens": None, "use_cache": True},
        {"use_cache": False},
        {"num_beams": 3},
        {"do_sample": True},
        {"assistant_early_exit": 2},
        {"assistant_model": 3},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_generation_stops_at_the_rows_end_and_says_so_once(
    arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    if "assistant_model" in arguments:
        arguments = {"assistant_model": short_model(3)}
    model, ids = short_model(), random_ids(1, 7)
    made = write(model, ids, **arguments)
    assert made.shape == (1, LONGEST)
    assert [record.getMessage() for record in caplog.records if "row" in record.getMessage()] == [SAID]
    if not {"do_sample", "num_beams"} & arguments.keys():
        assert torch.equal(made, write(model, ids, max_new_tokens=LONGEST - 7))
    assert model(made).logits.shape == (1, LONGEST, VOCAB)


def test_nothing_is_said_where_the_row_suffices(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = short_model(), random_ids(2, 7)
    write(model, ids, max_new_tokens=LONGEST - 7)
    write(model, ids, max_new_tokens=None, max_length=LONGEST)
    first = int(write(model, ids[:1], max_new_tokens=1)[0, -1])
    assert write(model, ids[:1], eos_token_id=first, pad_token_id=0).shape == (1, 8)
    assert not caplog.records


def test_rows_that_ended_before_are_not_cut(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = short_model(), random_ids(2, 7)
    free = write(model, ids)[:, 7:]
    end = next(int(token) for token in free[0] if token not in free[1])
    caplog.clear()
    made = write(model, ids, attention_mask=torch.ones_like(ids), eos_token_id=end, pad_token_id=end)
    stop = 7 + free[0].tolist().index(end)
    assert torch.equal(made[1, 7:], free[1])
    assert made[0, stop:].unique().tolist() == [end]
    assert [record.getMessage() for record in caplog.records] == [SAID]
    caplog.clear()
    alone = write(model, ids[:1], eos_token_id=end, pad_token_id=end)
    assert torch.equal(alone[0], made[0, : stop + 1])
    assert not caplog.records


def test_embeddings_count_as_their_tokens(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = short_model(), random_ids(1, 7)
    embeddings, expected = model.model.embed_tokens(ids), write(model, ids)
    caplog.clear()
    assert torch.equal(write(model, None, inputs_embeds=embeddings), expected[:, 7:])
    assert torch.equal(write(model, ids, inputs_embeds=embeddings), expected)
    assert [record.getMessage() for record in caplog.records] == [SAID, SAID]


def test_an_assistant_with_a_shorter_row_ends_the_text_with_its_own(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = short_model(), random_ids(1, 7)
    made = write(model, ids, assistant_model=short_model(3, max_position_embeddings=12))
    assert torch.equal(made, write(model, ids, max_new_tokens=5))
    assert [r.getMessage() for r in caplog.records if "row" in r.getMessage()] == [SAID.replace("24", "12")]


def test_a_prompt_that_leaves_no_room() -> None:
    with pytest.raises(ValueError, match="prompt of 24 tokens: expected at most 23, since max_position_embeddings=24"):
        write(short_model(), random_ids(1, LONGEST))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    short_model(bos_token_id=1, eos_token_id=1, pad_token_id=1).save_pretrained(tmp_path)
    return tmp_path


def test_a_pipeline_stops_at_the_rows_end(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    caplog.clear()
    # What ends a text is the likeliest never.
    generate.model.lm_head.register_forward_hook(lambda _, inputs, logits: logits.index_fill(-1, torch.tensor(1), -9.0))
    made = generate("Once upon a time", do_sample=False, return_tensors=True)
    assert len(made[0]["generated_token_ids"]) == LONGEST
    assert [record.getMessage() for record in caplog.records] == [SAID]
    several = generate(["Once upon a time", "Once"], batch_size=2, do_sample=False, max_new_tokens=4)
    alone = [generate(text, do_sample=False, max_new_tokens=4)[0] for text in ("Once upon a time", "Once")]
    assert [each[0] for each in several] == alone


# --- Arguments that say what happens anyway ---


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
def test_positions_that_are_ours_are_taken(kind: str) -> None:
    model, ids, mask = short_model(), random_ids(3, 9), padding_mask(kind, 3, 9)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    real = torch.ones_like(ids) if mask is None else mask
    positions = (real.cumsum(1) - 1).masked_fill(real == 0, 1)
    expected = model(**given).logits
    assert torch.equal(model(**given, position_ids=positions).logits, expected)
    assert torch.equal(model.model(**given, position_ids=positions)[0], model.model(**given)[0])
    if mask is None:
        assert torch.equal(model(ids, position_ids=torch.arange(9)).logits, expected)
        assert torch.equal(model(ids, position_ids=torch.arange(9)[None]).logits, expected)
        return
    with pytest.raises(ValueError, match="position_ids: expected 0, 1"):
        model(**given, position_ids=torch.arange(9).expand(3, -1) + 1)


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(1, 10)[None],
        torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])[None],
        torch.arange(8)[None],
        torch.arange(9)[None, None],
        torch.arange(9).expand(3, -1),
    ],
    ids=["shifted", "packed", "short", "deep", "rows"],
)
def test_other_positions_are_refused(positions: Tensor) -> None:
    with pytest.raises(ValueError, match="position_ids"):
        short_model()(random_ids(2, 9), position_ids=positions)


def test_positions_are_compared_in_the_first_pass_alone() -> None:
    model, ids, cache = short_model(), random_ids(1, 9), StreamCache()
    first = model(ids[:, :6], position_ids=torch.arange(6)[None], cache=cache).logits
    rest = model(ids[:, 6:], position_ids=torch.arange(3)[None], cache=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), model(ids).logits, atol=1e-5, rtol=1e-5)
    for use_cache in (True, False):
        made = write(model, ids, max_new_tokens=5, use_cache=use_cache, position_ids=torch.arange(9)[None])
        assert torch.equal(made, write(model, ids, max_new_tokens=5))


def test_a_dynamic_cache_is_ours() -> None:
    model, ids = short_model(), random_ids(1, 9)
    assert torch.equal(
        write(model, ids, max_new_tokens=5, cache_implementation="dynamic"), write(model, ids, max_new_tokens=5)
    )


def test_the_configuration_decides_where_the_caller_does_not() -> None:
    model, ids = short_model(), random_ids(1, 9)
    assert model(ids).cache is None
    model.config.use_cache = True
    assert isinstance(model(ids).cache, StreamCache)
    assert model(ids, use_cache=False).cache is None
    model.train()
    model.gradient_checkpointing_enable()
    assert model(ids, labels=ids).cache is None
    model.eval()
    model.config.use_cache = False
    assert model(ids).cache is None


def columns_of_passes(model: Any, ids: Tensor, **arguments: Any) -> list[int]:
    passes: list[int] = []
    seen = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    write(model, ids, max_new_tokens=3, **arguments)
    seen.remove()
    return passes


def test_a_model_that_is_built_without_a_cache_generates_without_one(tmp_path: Path) -> None:
    model, ids = short_model(use_cache=False), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    for each in (model, ThoughtbubblesForCausalLM.from_pretrained(tmp_path)):
        assert columns_of_passes(each, ids) == [9, 10, 11]
        assert columns_of_passes(each, ids, use_cache=True) == [9, 1, 1]


def test_training_by_transformers_leaves_generation_its_cache(tmp_path: Path) -> None:
    """Its Trainer turns `config.use_cache` off, and saves that."""
    model, ids = short_model(), random_ids(1, 9)
    Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)).save_model()
    assert model.config.use_cache is False
    for each in (model, ThoughtbubblesForCausalLM.from_pretrained(tmp_path)):
        assert columns_of_passes(each, ids) == [9, 1, 1]
        assert write(each, ids, max_new_tokens=3, prompt_lookup_num_tokens=2).shape == (1, 12)


def test_a_configuration_keeps_what_it_says_of_caches(tmp_path: Path) -> None:
    model = short_model()
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    assert ThoughtbubblesForCausalLM.from_pretrained(tmp_path).config.use_cache is False


@pytest.mark.parametrize(
    ("routing", "leave"),
    [*(("causal", leave) for leave in (1, 2, 3, 4)), ("threshold", 2), ("none", 1), ("copy", 3)],
)
def test_an_early_exit_assists(routing: str, leave: int) -> None:
    model, ids = short_model(routing=routing, budget=2), random_ids(1, 7)
    assert torch.equal(write(model, ids, assistant_early_exit=leave), write(model, ids))
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("leave", [0, 5])
def test_an_early_exit_is_after_a_layer(leave: int) -> None:
    with pytest.raises(ValueError, match=f"assistant_early_exit={leave}: expected a number of layers from 1 to 4"):
        write(short_model(), random_ids(1, 7), assistant_early_exit=leave)


# --- What cannot be ---


def test_attention_weights_are_refused_with_the_reason() -> None:
    model, ids = short_model(), random_ids(1, 7)
    for call in (
        lambda: model(ids, output_attentions=True),
        lambda: write(model, ids, output_attentions=True, return_dict_in_generate=True),
    ):
        with pytest.raises(ValueError, match=r"output_attentions: not an argument .*: attention is between streams"):
            call()
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions: not an argument"):
        model(ids)


@pytest.mark.parametrize("shape", [(2, 1, 7, 7), (2, 7, 7)], ids=str)
def test_masks_of_who_attends_to_whom_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(2, 7\), .*; who attends to whom is not for a mask to say"):
        short_model()(random_ids(2, 7), attention_mask=torch.ones(shape))


# --- transformers' Trainer ---


@pytest.mark.parametrize("kind", ["none", "right"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "fsdp"])
def test_smoothed_labels_are_the_next_tokens(tmp_path: Path, kind: str, wrapped: bool) -> None:
    model, ids, mask = short_model(), random_ids(3, 9), padding_mask(kind, 3, 9)
    if wrapped:
        model.__class__ = type(
            "FSDPThoughtbubblesForCausalLM", (type(model),), {"__module__": "torch.nn.modules.module"}
        )
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    real = torch.ones_like(ids) if mask is None else mask
    labels = ids.masked_fill(real == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": real, "labels": labels.clone()}
    got = Trainer(model=model, args=arguments).compute_loss(model, inputs)
    log_probs = model(ids, attention_mask=real).logits.log_softmax(-1)[:, :-1][real[:, :-1] * real[:, 1:] > 0]
    targets = ids[:, 1:][real[:, :-1] * real[:, 1:] > 0]
    plain = -log_probs.gather(-1, targets[:, None]).mean()
    torch.testing.assert_close(got, 0.9 * plain - 0.1 * log_probs.mean(), atol=1e-5, rtol=1e-5)
