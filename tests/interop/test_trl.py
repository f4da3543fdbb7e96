"""TRL's trainers on a tiny folder of ours: fine-tuning on conversations, and reinforcement learning."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.helpers import tiny_model
from tests.tokenizer_kinds import byte_level
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.data.feed.chat import ChatTemplate
from thoughtbubbles.data.tokenizer import load_data_tokenizer
from thoughtbubbles.model.loading import load_model

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'thoughtbubbles[dev]'")

TEMPLATE = """
{%- for message in messages %}
    {{- "<s>" + message.role + "\n" }}
    {%- if message.role == "assistant" %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<s>assistant\n" }}{% endif %}
"""
COMMON = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a tokenizer that knows conversations."""
    tokenizer = load_data_tokenizer(byte_level(tmp_path / "model", "<s>", "</s>"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_model(vocab_size=len(tokenizer), budget=1.5, **ids).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def chats(count: int) -> list[list[dict[str, str]]]:
    words = ("the river", "of stone", "deep", "green bread under the cloud")
    return [
        [{"role": "user", "content": words[number % 4]}, {"role": "assistant", "content": words[number % 3]}]
        for number in range(count)
    ]


def test_conversations_train(folder: Path, tmp_path: Path) -> None:
    found: Any = trl.SFTTrainer(
        model=str(folder),
        args=trl.SFTConfig(output_dir=str(tmp_path / "out"), assistant_only_loss=True, max_length=64, **COMMON),
        train_dataset=Dataset.from_list([{"messages": chat} for chat in chats(16)]),
    )
    assert type(found.model) is ThoughtbubblesForCausalLM
    batch = next(iter(found.get_train_dataloader()))
    template = ChatTemplate(load_data_tokenizer(folder))
    ours = [template.example(chat, "row") for chat in chats(16)]
    theirs = [
        (ids[mask > 0].tolist(), (labels[mask > 0] != -100).tolist())
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    assert all(row in [(ids.tolist(), targets.tolist()) for ids, targets in ours] for row in theirs)
    model = load_model(folder, "cpu")
    expected = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss.item()
    assert found.evaluate(found.train_dataset.select(range(4)))["eval_loss"] > 0
    found.train()
    losses = [row["loss"] for row in found.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.long
def test_rows_of_several_texts_are_joined_or_refused(folder: Path, tmp_path: Path) -> None:
    def packed(strategy: str) -> Any:
        settings = {**COMMON, "max_length": 32, "max_steps": 2, "packing": True, "packing_strategy": strategy}
        arguments = trl.SFTConfig(output_dir=str(tmp_path / strategy), **settings)
        rows = Dataset.from_list([{"messages": chat} for chat in chats(16)])
        return trl.SFTTrainer(model=str(folder), args=arguments, train_dataset=rows)

    with pytest.raises(ValueError, match="rows that hold several texts are told apart by nothing"):
        packed("bfd").train()
    packed("wrapped").train()


def reward(completions: list[Any], **_: Any) -> list[float]:
    """How much of what was written are letters of one word."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter in "river" for letter in text) / (1 + len(text)) for text in texts]


def reinforced(model: Any, folder: Path, output: Path, judge: Any, **settings: Any) -> Any:
    """A GRPOTrainer whose batches hold prompts of several lengths, padded on the left."""
    arguments = {
        **COMMON,
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "max_completion_length": 8,
        **settings,
    }
    return trl.GRPOTrainer(
        model=model,
        processing_class=load_data_tokenizer(folder),
        reward_funcs=judge,
        args=trl.GRPOConfig(output_dir=str(output), **arguments),
        train_dataset=Dataset.from_list([{"prompt": chat[:1]} for chat in chats(8)]),
    )


def test_rewards_change_the_model(folder: Path, tmp_path: Path) -> None:
    found = reinforced(str(folder), folder, tmp_path / "out", reward, max_steps=2, beta=0.1)
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    found.train()
    rows = [row for row in found.state.log_history if "reward" in row]
    assert len(rows) == 2
    assert all(0 <= row["reward"] <= 1 for row in rows)
    # The model and what it is held to are the same before the first step.
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(value.isfinite().all() for value in found.model.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in found.model.state_dict().items())


def test_answers_in_a_padded_batch_are_those_of_prompts_alone(folder: Path, tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {}

    def judge(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.update({prompt[0]["content"]: ids for prompt, ids in zip(prompts, completion_ids, strict=True)})
        return [0.0] * len(prompts)

    model: Any = load_model(folder, "cpu").double()
    reinforced(copy.deepcopy(model), folder, tmp_path / "out", judge, max_steps=1, top_k=1).train()
    template = ChatTemplate(load_data_tokenizer(folder))
    assert len(seen) > 2
    for text, ids in seen.items():
        asked = torch.tensor([template.prompt([{"role": "user", "content": text}], "prompt")])
        alone = model.generate(asked, max_new_tokens=8, do_sample=False, use_cache=False)
        assert ids == alone[0, asked.shape[1] :].tolist()
