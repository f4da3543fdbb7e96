"""What `save_pretrained` and `push_to_hub` store beside the weights: the model's code and its card."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.helpers import VOCAB, random_ids, tiny_config, tiny_model
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM, ThoughtbubblesModel
from thoughtbubbles.model.sharing import AUTO_MAP, CARD_NAME, copy_code, write_model_card

CODE = {
    f"{name}.py"
    for name in (
        *("configuration", "budget", "streams", "routing", "gate", "loss", "attention", "cache", "memory", "modeling"),
        *(
            "accounting",
            "blocked_attention",
            "content",
            "controls",
            "generating",
            "graph",
            "sharing",
            "static",
            "mixture",
            "norms",
            "rotary",
            "rules",
            "threshold",
            "weights",
        ),
    )
}
HIDE_THE_PACKAGE = """
import sys

class WithoutThoughtbubbles:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "thoughtbubbles":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutThoughtbubbles())
try:
    import thoughtbubbles
except ModuleNotFoundError:
    pass
else:
    sys.exit("thoughtbubbles was not hidden")
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"[UNK]": 0, "[EOS]": 1, "Once": 2, "upon": 3, "a": 4, "time": 5}
    words |= {f"w{token}": token for token in range(len(words), VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")


@pytest.fixture(scope="module")
def model() -> ThoughtbubblesForCausalLM:
    return tiny_model(budget=1.5)


@pytest.fixture
def folder(model: ThoughtbubblesForCausalLM, tmp_path: Path) -> Path:
    path = tmp_path / "my-model"
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- The code ---


def imports_of(file: Path) -> tuple[set[str], set[str]]:
    """The modules that a file imports relatively and absolutely, wherever in it."""
    relative, absolute = set(), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            relative.add(f"{node.module}.py")
        elif isinstance(node, ast.ImportFrom):
            absolute.add(str(node.module))
        elif isinstance(node, ast.Import):
            absolute |= {alias.name for alias in node.names}
    return relative, absolute


def test_copies_are_complete_and_minimal(folder: Path) -> None:
    assert {path.name for path in folder.glob("*.py")} == CODE
    reached, waiting = set(), {"modeling.py"}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        relative, absolute = imports_of(folder / name)
        assert not [module for module in absolute if module.partition(".")[0] == "thoughtbubbles"], name
        waiting |= relative - reached
    assert reached == CODE


def test_copies_cost_little_beside_any_weights(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.glob("*.py")) < 250_000


def test_config_names_the_classes(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name, reference in AUTO_MAP.items():
        module, _, class_name = reference.partition(".")
        assert f"class {class_name}(" in (folder / f"{module}.py").read_text(), name


def test_config_alone_is_stored_with_its_code(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    code = ("configuration", "budget", "controls", "memory", "rotary", "routing", "rules", "streams", "threshold")
    assert names(tmp_path) == {"config.json", *(f"{name}.py" for name in code)}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {"AutoConfig": AUTO_MAP["AutoConfig"]}


def test_the_model_without_its_unembedding_is_stored_alike(tmp_path: Path) -> None:
    tiny_model().model.save_pretrained(tmp_path)
    assert names(tmp_path) == CODE | {"config.json", "model.safetensors", CARD_NAME}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_class_that_fsdp_made_is_not_taken_for_ours(tmp_path: Path) -> None:
    """`fully_shard` gives a model a class of its own, of a module of torch."""
    model = tiny_model()
    name = "FSDPThoughtbubblesForCausalLM"
    model.__class__ = type(name, (ThoughtbubblesForCausalLM,), {"__module__": "torch.nn.modules.module"})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["ThoughtbubblesForCausalLM"]
    assert {path.name for path in tmp_path.glob("*.py")} == CODE


def test_other_processes_than_the_main_one_store_nothing(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "none", is_main_process=False)
    assert names(tmp_path / "none") == set()


def test_a_folder_loads_where_the_package_is_not_installed(model: Any, folder: Path, tmp_path: Path) -> None:
    script = """
        import json, sys
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        torch.set_num_threads(1)
        folder, again, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
        trust = {"trust_remote_code": True}
        results = {}
        model = AutoModelForCausalLM.from_pretrained(folder, **trust)
        greedy = {"max_new_tokens": 20, "do_sample": False}
        results["class"] = [type(model).__module__, type(model).__name__]
        results["logits"] = model(ids).logits.tolist()
        results["cached"] = model.generate(ids, use_cache=True, **greedy).tolist()
        results["uncached"] = model.generate(ids, use_cache=False, **greedy).tolist()
        results["budget"] = model.generate(ids, budget=3, **greedy).tolist()
        results["hidden"] = AutoModel.from_pretrained(folder, **trust)(ids).last_hidden_state.tolist()
        half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **trust)
        results["half"] = [str(half.dtype), half(ids).logits.float().tolist()]
        results["config"] = type(AutoConfig.from_pretrained(folder, **trust)).__name__
        generate = pipeline("text-generation", model=folder, device="cpu", **trust)
        results["text"] = generate("Once upon a time", **greedy)[0]["generated_text"]

        half.save_pretrained(again)
        loaded = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32, **trust)
        results["again"] = [type(loaded).__module__, loaded(ids).logits.tolist()]
        results["registered"] = "thoughtbubbles" in CONFIG_MAPPING
        try:
            AutoModelForCausalLM.from_pretrained(again, trust_remote_code=False)
        except ValueError as error:
            results["refused"] = str(error)
        try:
            AutoModelForCausalLM.from_pretrained(again, num_hidden_layers=5, **trust)
        except ValueError as error:
            results["misfit"] = str(error)
        assert not any(name.partition(".")[0] == "thoughtbubbles" for name in sys.modules)
        print(json.dumps(results))
    """
    ids, again = random_ids(2, 7, seed=1), tmp_path / "again"
    done = subprocess.run(
        [sys.executable, "-c", HIDE_THE_PACKAGE + textwrap.dedent(script), folder, again, json.dumps(ids.tolist())],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])

    module, name = results["class"]
    assert module.startswith("transformers_modules.my_hyphen_model.")
    assert (name, results["config"]) == ("ThoughtbubblesForCausalLM", "ThoughtbubblesConfig")
    greedy: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(torch.tensor(results["logits"]), model(ids).logits)
    assert results["cached"] == model.generate(ids, **greedy).tolist() == results["uncached"]
    assert results["budget"] == model.generate(ids, budget=3, **greedy).tolist()
    assert torch.equal(torch.tensor(results["hidden"]), model.model(ids).last_hidden_state)
    half = ThoughtbubblesForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert results["half"][0] == "torch.bfloat16"
    assert torch.equal(torch.tensor(results["half"][1]), half(ids).logits.float())
    tokenizer = tiny_tokenizer()
    text = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), **greedy)
    assert results["text"].replace(" ", "") == tokenizer.decode(text[0], skip_special_tokens=True).replace(" ", "")

    assert {path.name for path in again.glob("*.py")} == CODE
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert results["again"][0].startswith("transformers_modules.again.")
    assert torch.equal(torch.tensor(results["again"][1]), half.float()(ids).logits)
    assert "trust_remote_code=True" in results["refused"]
    assert "missing: model.layers.4.attention.o_proj.bias, " in results["misfit"]
    assert not results["registered"]


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("age", ["fresh", "without-auto-map"])
def test_the_installed_classes_are_preferred(
    folder: Path, age: str, trust: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked for trust"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    if age != "fresh":
        for path in folder.glob("*.py"):
            path.unlink()
        config = json.loads((folder / "config.json").read_text())
        del config["auto_map"]
        (folder / "config.json").write_text(json.dumps(config))
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is ThoughtbubblesConfig
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=trust)) is ThoughtbubblesModel
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is ThoughtbubblesForCausalLM
    assert not (tmp_path / "modules").exists()


def test_copies_are_those_of_the_running_code(tmp_path: Path) -> None:
    source = Path(sys.modules["thoughtbubbles.model.modeling"].__file__ or "").parent
    for copy in copy_code(tmp_path):
        assert copy.read_bytes() == (source / copy.name).read_bytes()


# --- The card ---


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / CARD_NAME).read_text(encoding="utf-8"))


def rows_of(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", card.text, re.MULTILINE))


def test_card_says_what_the_model_is(model: ThoughtbubblesForCausalLM, folder: Path) -> None:
    card = card_of(folder)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["thoughtbubbles"],
    }
    rows = rows_of(card)
    assert rows["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert rows["layers"] == "4 of width 16, 2 heads, MLP 24"
    assert rows["vocabulary"] == "19, embeddings tied"
    assert rows["fork layers"] == "1, 2 (the first layer is 0)"
    assert rows["budget"] == "3/2 streams per token"
    assert rows["routing"].startswith("causal: ")
    assert (rows["attenuation"], rows["merge"]) == ("paper", "residual")
    assert "leaks" not in card.text
    assert "## Training" not in card.text


def blocks_of(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card_of(folder).text, re.DOTALL)


@pytest.mark.parametrize("place", [".", "my-model", "other/my-model"])
def test_code_of_the_card_runs(
    model: ThoughtbubblesForCausalLM, folder: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked for trust"))
    (folder.parent / "other").symlink_to(folder.parent, target_is_directory=True)
    monkeypatch.chdir(folder if place == "." else folder.parent)
    if place != ".":
        write_model_card(folder, model.config, name=place)
    installed, _, budget = blocks_of(folder)
    namespace: dict[str, Any] = {}
    for code in (installed, budget):
        exec(compile(code, CARD_NAME, "exec"), namespace)
    assert type(namespace["model"]) is ThoughtbubblesForCausalLM
    assert namespace["tokenizer"].get_vocab() == tiny_tokenizer().get_vocab()


def test_code_of_a_runs_card_runs(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_run / "model")
    installed, _, budget = blocks_of(tiny_run / "model")
    # The rows of this run have no room for the card's prompt.
    code = f"{installed}\n{budget}".replace("Once upon a time", "the")
    namespace: dict[str, Any] = {}
    exec(compile(code, CARD_NAME, "exec"), namespace)
    assert namespace["tokenizer"].model_max_length == namespace["model"].config.max_position_embeddings == 16


def test_code_of_the_card_runs_where_the_package_is_not_installed(folder: Path, tmp_path: Path) -> None:
    """In the model's own folder, and beside it by the name that the card was given."""
    script = [HIDE_THE_PACKAGE]
    for place, cwd in ((".", folder), (folder.name, folder.parent)):
        if place != ".":
            write_model_card(folder, tiny_config(budget=1.5), name=place)
        _, remote, budget = blocks_of(folder)
        script += ["import os", f"os.chdir({str(cwd)!r})", remote, budget, "print(type(model).__module__)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(script)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stdout.splitlines() if line.startswith("transformers_modules.")]
    assert len(set(loaded)) == 2


def test_card_says_where_forks_attend(tmp_path: Path) -> None:
    write_model_card(tmp_path, tiny_config(fork_content="attended"))
    assert "a head of its own" in rows_of(card_of(tmp_path))["a fork is"]
    for fields in ({}, {"fork_content": "attended", "routing": "none"}):
        write_model_card(tmp_path, tiny_config(**fields))
        assert "a fork is" not in rows_of(card_of(tmp_path))


def test_card_of_topk_warns(tmp_path: Path) -> None:
    write_model_card(tmp_path, tiny_config(routing="topk"))
    assert "Blockwise perplexity of this model leaks the future" in card_of(tmp_path).text


@pytest.mark.parametrize("dense", [{"routing": "none"}, {"fork_layers": []}], ids=str)
def test_card_of_a_dense_model_has_no_budget(tmp_path: Path, dense: dict[str, Any]) -> None:
    write_model_card(tmp_path, tiny_config(**dense))
    text = card_of(tmp_path).text
    assert "A dense decoder-only transformer" in text
    assert "budget" not in text


@pytest.mark.parametrize("routing", ["copy", "pause", "random", "uniform"])
def test_card_of_a_control_says_that_nothing_was_learned(tmp_path: Path, routing: str) -> None:
    config = tiny_config(routing=routing, copy_layer=1)
    write_model_card(tmp_path, config)
    card = card_of(tmp_path)
    rows = rows_of(card)
    assert "is not learned" in card.text
    assert "leaks" not in card.text
    assert rows["routing"].startswith(f"{routing}: ")
    assert rows["budget"] == "2 streams per token"
    assert rows.get("streams made at", "")[:7] == {"copy": "layer 1", "pause": "layer 0"}.get(routing, "")
    assert ("fork layers" in rows) == ("Set the budget" in card.text) == (routing in ("random", "uniform"))


def test_facts_of_a_run_stand_in_a_table(tmp_path: Path) -> None:
    facts = {"tokens": "819,200", "data": "a|b\nc", "validation loss": "3.71 nats"}
    write_model_card(tmp_path, tiny_config(), facts)
    rows = rows_of(card_of(tmp_path))
    assert (rows["tokens"], rows["data"], rows["validation loss"]) == ("819,200", r"a\|b c", "3.71 nats")


def test_a_card_that_is_there_is_kept(folder: Path, model: ThoughtbubblesForCausalLM) -> None:
    (folder / CARD_NAME).write_bytes(b"mine, and not UTF-8: \xff")
    model.save_pretrained(folder)
    assert (folder / CARD_NAME).read_bytes() == b"mine, and not UTF-8: \xff"


def test_what_pads_is_named_where_a_text_can_end(tmp_path: Path) -> None:
    for ends, expected in ((None, None), (1, 1), ([2, 1], 2)):
        tiny_model(eos_token_id=ends).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "generation_config.json").read_text()).get("pad_token_id") == expected
    tiny_model(eos_token_id=1, pad_token_id=4).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["pad_token_id"] == 4


def test_writing_a_card_replaces_the_one_that_is_there(folder: Path) -> None:
    write_model_card(folder, tiny_config(), {"tokens": "1"})
    assert rows_of(card_of(folder))["tokens"] == "1"


# --- The Hub ---


class Hub:
    """What is sent to a repository, in place of the calls of huggingface_hub that would send it."""

    def __init__(self, card: str | None) -> None:
        self.card = card
        self.sent: dict[str, bytes] = {}
        self.commits = 0

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("RepoUrl", (), {"repo_id": repo_id})()

    def create_commit(self, operations: Any, **_: Any) -> str:
        self.commits += 1
        self.sent = {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}
        return "commit"

    def load_card(self, repo_id: str, **_: Any) -> ModelCard:
        if self.card is None:
            raise EntryNotFoundError("no README.md")
        return ModelCard(self.card, ignore_metadata_errors=True)

    @property
    def sent_card(self) -> ModelCard:
        return ModelCard(self.sent[CARD_NAME].decode(), ignore_metadata_errors=True)


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository with the card that the test's parameter holds."""
    hub = Hub(getattr(request, "param", None))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", hub.load_card)
    return hub


def stub() -> str:
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    return str(ModelCard.from_template(ModelCardData(tags=["older"]), model_description=description))


def test_pushing_sends_code_and_card(hub: Hub) -> None:
    tiny_model().push_to_hub("me/bubbles", tags=["english"])
    assert hub.commits == 1
    assert set(hub.sent) == CODE | {"config.json", "generation_config.json", "model.safetensors", CARD_NAME}
    assert json.loads(hub.sent["config.json"])["auto_map"] == AUTO_MAP
    assert hub.sent_card.data.to_dict()["tags"] == ["thoughtbubbles", "english"]
    assert "# A Thoughtbubbles language model" in hub.sent_card.text
    assert 'from_pretrained("me/bubbles", trust_remote_code=True)' in hub.sent_card.text
    assert "More Information Needed" not in hub.sent_card.text


@pytest.mark.parametrize("hub", [stub()], indirect=True, ids=["stub"])
def test_pushing_replaces_a_stub_that_was_pushed_before(hub: Hub) -> None:
    tiny_model().push_to_hub("me/bubbles")
    assert "# A Thoughtbubbles language model" in hub.sent_card.text
    assert hub.sent_card.data.to_dict()["tags"] == ["thoughtbubbles", "older"]


@pytest.mark.parametrize(
    "hub",
    ["---\nlicense: mit\n---\n\n# Mine\n", stub().replace("[More Information Needed]", "mine", 1)],
    indirect=True,
    ids=["other", "edited-stub"],
)
def test_pushing_keeps_the_card_of_the_repository(hub: Hub) -> None:
    tiny_model().push_to_hub("me/bubbles")
    assert hub.card is not None
    assert hub.sent_card.text.strip() == ModelCard(hub.card).text.strip()


@pytest.mark.parametrize("tags", [None, ["english"]], ids=["untagged", "tagged"])
@pytest.mark.parametrize("card", ["---\nlicense: mit\ntags:\n- old\n---\n\n# Mine\n", "# Mine\n", None])
def test_saving_and_pushing_sends_the_card_of_the_folder(
    hub: Hub, tmp_path: Path, card: str | None, tags: list[str] | None
) -> None:
    model = tiny_model()
    if tags:
        model.add_model_tags(tags)
    if card is not None:
        (tmp_path / CARD_NAME).write_text(card)
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/bubbles")
    assert hub.sent[CARD_NAME].decode() == (tmp_path / CARD_NAME).read_text()
    assert hub.sent_card.text.strip().startswith("# A Thoughtbubbles" if card is None else "# Mine")
    expected = [*(["old"] if card and "old" in card else [] if card else ["thoughtbubbles"]), *(tags or [])]
    assert hub.sent_card.data.to_dict().get("tags", []) == expected
    if card is not None and tags is None:
        assert (tmp_path / CARD_NAME).read_text() == card


def test_folder_can_be_copied_and_loaded_from_the_copy(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert model(random_ids(1, 3)).logits.shape == (1, 3, VOCAB)
