"""Generating text from a prompt."""

from typing import TYPE_CHECKING, Any

import torch

from thoughtbubbles.budget import Budget
from thoughtbubbles.modeling import ThoughtbubblesForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate_text(
    model: ThoughtbubblesForCausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str = "",
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    budget: Budget | None = None,
    seed: int = 0,
    streamer: Any = None,
) -> str:
    """The prompt and its continuation, up to the end of the document or of the longest row that the model takes.

    A document of the training data starts with its separator, so that a prompt gets one in front too.

    Raises:
        ValueError: for a prompt that leaves no room, or a bad budget.
    """
    generator: Any = model  # transformers types `generate` for its own classes
    model.config.exact_budget(budget)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = ([] if start is None else [start]) + tokenizer.encode(prompt, add_special_tokens=False)
    longest = model.config.max_position_embeddings
    if not 0 < len(ids) < longest:
        raise ValueError(f"prompt of {len(ids)} tokens: expected 1 to {longest - 1}, separator included")
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    torch.manual_seed(seed)
    row = torch.tensor([ids], device=model.device)
    out = generator.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=min(max_new_tokens, longest - len(ids)),
        pad_token_id=tokenizer.eos_token_id,
        use_cache=False,
        budget=budget,
        streamer=streamer,
        **sampling,
    )
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert isinstance(text, str)
    return text
