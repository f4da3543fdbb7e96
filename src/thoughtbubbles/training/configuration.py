"""The configuration of a run's model, from its recipe and its data."""

from thoughtbubbles.data.feed.rundata import RunData
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.loading import check_tokenizer
from thoughtbubbles.recipes.training import Recipe, RecipeError, check_rows, model_config
from thoughtbubbles.support.text import document_ends, start_document
from thoughtbubbles.training.meter import rising_budgets


def build_config(recipe: Recipe, data: RunData) -> ThoughtbubblesConfig:
    """The model's configuration, completed from its data, and the data's tokenizer from it, so that both can be saved.

    Raises:
        InputError: for a bad model field, a vocabulary smaller than the data's, a row of data longer than the
            longest of the model, or a budget of the recipe that the model cannot have.
    """
    tokenizer = data.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    start, ends = start_document(tokenizer), document_ends(tokenizer)
    if data.answer_end is not None:
        ends = [*ends, data.answer_end]
    ids = {
        "bos_token_id": start[-1] if start else None,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = model_config(recipe, {"vocab_size": data.vocab_size, **ids}, data.longest)
    for name, token in ids.items():
        if getattr(config, name) is None or (name == "eos_token_id" and data.answer_end is not None):
            setattr(config, name, token)
    if (pretrained := recipe.model.get("pretrained")) is not None:
        check_tokenizer(pretrained, tokenizer, data.source)
    check_rows(config, data.vocab_size, data.longest, data.source)
    budgets = {field: getattr(recipe.training, field) or [] for field in ("training_budgets", "eval_budgets")}
    if recipe.training.budget_ramp:
        budgets["budget_ramp"] = [str(each) for each in rising_budgets(config.budget)]
    for field, values in budgets.items():
        for budget in dict.fromkeys(values):
            try:
                config.exact_budget(budget)
            except ValueError as error:
                raise RecipeError(f"training.{field}: {error}") from None
    return config
