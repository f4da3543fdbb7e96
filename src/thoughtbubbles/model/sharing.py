"""Sharing a model: its code beside its weights, and its card.

A folder that `save_pretrained` wrote also loads where this package is not installed, with `trust_remote_code=True`: the
files of the model stand beside the weights and config.json names the classes in them. So that the copies find each
other, these files import each other relatively.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, ModelCard, ModelCardData
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .accounting import count_parameters
from .configuration import ThoughtbubblesConfig

CARD_NAME = "README.md"
AUTO_MAP = {
    "AutoConfig": "configuration.ThoughtbubblesConfig",
    "AutoModel": "modeling.ThoughtbubblesModel",
    "AutoModelForCausalLM": "modeling.ThoughtbubblesForCausalLM",
}

PAPER = "[Thoughtbubbles](https://arxiv.org/abs/2510.00219)"
SUMMARY = (
    "A decoder-only transformer whose residual streams can be forked and deleted between layers: a token that needs "
    "more computation carries several parallel streams through the middle of the network, and at the end the streams "
    "of a token are merged into one prediction. What to fork was learned with the language-modelling loss alone "
    f"({PAPER})."
)
DENSE_SUMMARY = (
    "A dense decoder-only transformer: no residual stream is ever forked. It is the control of the models of "
    f"{PAPER}, whose code it shares."
)
CONTROL_SUMMARY = (
    "A decoder-only transformer whose tokens carry several parallel residual streams, merged into one prediction at "
    f"the end. How many is not learned: it is a control of the models of {PAPER}, whose code it shares."
)
LEAK = (
    "> **Blockwise perplexity of this model leaks the future.** Its routing (`topk`) looks at the whole row, so "
    "whether an early fork survives depends on later tokens: a perplexity from one forward over a block is not the "
    "likelihood of a left-to-right model. Report perplexity in which each prediction is made from its prefix alone. "
    "With a cache, `generate` routes causally at the same budget; `generate(use_cache=False)` keeps to `topk`."
)
_STUB_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    "This model card has been automatically generated."
)


class SharedModel(PreTrainedModel):
    """A model that `save_pretrained` and `push_to_hub` store with its code and a card."""

    config: ThoughtbubblesConfig
    _card_of_folder: bytes | None = None

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, with the model's code and, in a folder that has no README.md, a model card.

        Where the model carries adapters of `peft`, transformers stores those alone, and neither is added.
        """
        folder = Path(save_directory)
        if is_main_process and not folder.is_file() and not self._stores_adapters_alone():
            # Not left to transformers: under FSDP it would take the wrapping class's file and name for the model's.
            self.config.auto_map = dict(AUTO_MAP)
            self._complete_generation()
            folder.mkdir(parents=True, exist_ok=True)
            copy_code(folder)
            card = folder / CARD_NAME
            self._card_of_folder = card.read_bytes() if card.exists() else None
            if self._card_of_folder is None:
                write_model_card(folder, self.config)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _complete_generation(self) -> None:
        """Name the token that pads, the end of text where there is none, so that `generate` needs no arguments."""
        settings = self.generation_config if self.can_generate() else None
        if settings is not None and settings.pad_token_id is None and settings.eos_token_id is not None:
            ends = settings.eos_token_id
            settings.pad_token_id = ends if isinstance(ends, int) else ends[0]

    def _get_name(self) -> str:
        """The class's name, as a Trainer knows it: without what `fully_shard` puts in front."""
        return str(super()._get_name()).removeprefix("FSDP")

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        """The last step of a push: put our card, or the saved folder's, in the place of the stub of transformers."""
        folder = Path(working_dir)
        if not self._stores_adapters_alone():
            copy_code(folder)  # a folder of consolidated shards is not the one that was saved
            self._replace_stub(folder, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _replace_stub(self, folder: Path, repo_id: str) -> None:
        card = folder / CARD_NAME
        stub = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        if not _is_stub(stub):
            return
        tags = stub.data.to_dict().get("tags", [])
        if self._card_of_folder is None:
            write_model_card(folder, self.config, name=repo_id, tags=tags)
        else:
            card.write_bytes(_with_tags(self._card_of_folder, tags))

    def _stores_adapters_alone(self) -> bool:
        return getattr(self, "_hf_peft_config_loaded", False)


def register_models(base: type[PreTrainedModel], causal_lm: type[PreTrainedModel]) -> None:
    """Make the models known to the Auto classes of transformers.

    A copy that came with someone's weights registers no class: it would serve every later folder too, unasked. The
    name alone serves nothing; by it a Trainer knows that labels want shifting, and a pipeline that the model writes.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ThoughtbubblesConfig.model_type] = causal_lm.__name__
    if __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
        return
    AutoConfig.register(ThoughtbubblesConfig.model_type, ThoughtbubblesConfig, exist_ok=True)
    AutoModel.register(ThoughtbubblesConfig, base, exist_ok=True)
    AutoModelForCausalLM.register(ThoughtbubblesConfig, causal_lm, exist_ok=True)


def copy_code(folder: Path) -> list[Path]:
    """Copy the files that the models consist of to a folder; returns the copies."""
    main = Path(__file__).with_name("modeling.py")
    sources = {main, *map(Path, get_relative_import_files(main))}
    return [Path(shutil.copyfile(source, folder / source.name)) for source in sorted(sources)]


def write_model_card(
    folder: str | os.PathLike[str],
    config: ThoughtbubblesConfig,
    facts: Mapping[str, str] | None = None,
    name: str = ".",
    tags: list[str] | None = None,
) -> None:
    """Write the model card README.md, over any that is there.

    Args:
        folder: of the model, which must exist.
        facts: what is known of its training, such as tokens, data and validation loss, for a table.
        name: what the card tells its reader to load; `.` is the folder itself, wherever it is moved.
        tags: more tags for the Hub.
    """
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([ThoughtbubblesConfig.model_type, *(tags or [])])),
    )
    parts = [
        f"---\n{header.to_yaml()}\n---",
        "# A Thoughtbubbles language model",
        _summary(config),
        _table(_shape(config)),
        LEAK if config.leaks else "",
        f"## Training\n\n{_table(facts)}" if facts else "",
        _how_to_load(name),
        _how_to_set_the_budget() if config.gated_layers else "",
    ]
    (Path(folder) / CARD_NAME).write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _summary(config: ThoughtbubblesConfig) -> str:
    if config.rule.learned and config.gated_layers:
        return SUMMARY
    return CONTROL_SUMMARY if config.gated_layers or config.copied_layers else DENSE_SUMMARY


def _shape(config: ThoughtbubblesConfig) -> dict[str, str]:
    rows = {
        "parameters": f"{count_parameters(config):,}",
        "layers": f"{config.num_hidden_layers} of width {config.hidden_size}, {_heads(config)}, "
        f"{'gated ' if config.mlp == 'gated' else ''}MLP {config.intermediate_size}",
        "vocabulary": f"{config.vocab_size:,}, embeddings {'tied' if config.tie_word_embeddings else 'not tied'}",
        "longest row": f"{config.max_position_embeddings:,} tokens",
        "routing": config.rule.words,
    }
    if config.num_loops > 1:
        rows["blocks applied"] = f"{config.num_loops} times, with the same weights"
    if config.gated_layers:
        rows["fork layers"] = f"{', '.join(map(str, config.gated_layers))} (the first layer is 0)"
        if config.fork_content == "attended":
            rows["a fork is"] = "its source, a learned embedding and what a head of its own attends to"
        rows["attenuation"] = config.attenuation
    if config.copied_layers:
        rows["streams made at"] = f"layer {config.copied_layers[0]} (the first layer is 0)"
    if config.gated_layers or config.copied_layers:
        rows["budget"] = f"{config.exact_budget()} streams per token"
        rows["merge"] = config.merge
    return rows


def _heads(config: ThoughtbubblesConfig) -> str:
    shared = config.num_key_value_heads != config.num_attention_heads
    return f"{config.num_attention_heads} heads{f' on {config.num_key_value_heads} of keys' if shared else ''}"


def _table(rows: Mapping[str, str]) -> str:
    lines = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {left} | {right} |" for left, right in lines)])


def _how_to_load(name: str) -> str:
    place = ", in this folder (elsewhere its path stands for the dot)" if name == "." else ""
    return f"""## Load it

With the package `thoughtbubbles` installed{place}:

```python
import thoughtbubbles
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Without it, transformers can run the code that lies beside the weights, and asks to be told so, for the tokenizer too:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```"""


def _how_to_set_the_budget() -> str:
    return """## Set the budget

How many streams per token may exist is a dial of test-time compute, other than the one trained with if you like:

```python
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
model(ids, budget=1.5).logits
model.generate(ids, budget=4, max_new_tokens=20)
```"""


def _is_stub(card: ModelCard) -> bool:
    """Whether a card is the one that transformers makes up, word for word."""
    stub = ModelCard.from_template(ModelCardData(), model_description=_STUB_DESCRIPTION)
    return bool(card.text.strip() == stub.text.strip())


def _with_tags(content: bytes, tags: list[str]) -> bytes:
    """A card's content with more tags in its header."""
    if not tags:
        return content
    card = ModelCard(content.decode("utf-8"), ignore_metadata_errors=True)
    header = card.data.to_dict()
    header["tags"] = list(dict.fromkeys([*header.get("tags", []), *tags]))
    return f"---\n{CardData(**header).to_yaml()}\n---\n{card.text}".encode()
