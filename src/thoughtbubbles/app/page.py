"""The page of `thoughtbubbles demo`, built with gradio."""

import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from thoughtbubbles.app.exhibit import Exhibit
from thoughtbubbles.app.render import (
    render_message,
    render_next,
    render_summary,
    render_text,
    render_tokens,
    render_tree,
)
from thoughtbubbles.app.serving import PageServer
from thoughtbubbles.errors import InputError
from thoughtbubbles.inspection.trace import BubbleTrace

if TYPE_CHECKING:
    from gradio import Blocks

TEXT = "The old man walked slowly down to the harbour, where the ships lay at anchor."
LEAST_GREATEST_BUDGET = 4
CHOOSE = """
element.addEventListener('click', (event) => {
    const chosen = event.target.closest('button[data-token]');
    if (!chosen) return;
    for (const other of element.querySelectorAll('button[data-token]')) {
        other.setAttribute('aria-pressed', String(other === chosen));
    }
    trigger('click', {token: Number(chosen.dataset.token)});
});
"""


def build_page(exhibits: Sequence[Exhibit]) -> "Blocks":
    """The page of one model, or of several side by side.

    Raises:
        InputError: gradio is not installed.
    """
    gr = _gradio()
    page: Blocks = gr.Blocks(title="Thoughtbubbles", analytics_enabled=False, fill_width=True)
    with page:
        gr.Markdown(
            "# Where the model thinks\nEach token carries streams through the blocks of the model; their number "
            "grows where it forks them and shrinks where it deletes them."
        )
        text = gr.Textbox(TEXT, label="Text (Shift+Enter shows its bubbles)", lines=3, max_lines=8, elem_id="text")
        with gr.Row():
            budget = gr.Slider(**_budgets(exhibits), label="Budget: streams per token", min_width=280, elem_id="budget")
            count = gr.Slider(1, 200, 40, step=1, label="Tokens to generate", min_width=280, elem_id="count")
        with gr.Row():
            show = gr.Button("Show bubbles", variant="primary", elem_id="show")
            go_on = gr.Button("Generate", elem_id="generate")
            stop = gr.Button("Stop", elem_id="stop")
        running = []
        with gr.Row():
            for place, exhibit in enumerate(exhibits):
                with gr.Column(min_width=320):
                    running += _add_exhibit(exhibit, place, page, text, budget, count, show, go_on)
        stop.click(None, cancels=running, api_visibility="private")
    return page


def serve(exhibits: Sequence[Exhibit], port: int | None = None) -> PageServer:
    """Show the page on this machine alone, from a thread.

    Args:
        port: None is the first free one from 7860 on.

    Raises:
        InputError: gradio is not installed, or the port is taken.
    """
    page, gr = build_page(exhibits), _gradio()
    style = files("thoughtbubbles.app").joinpath("page.css").read_text(encoding="utf-8")
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return PageServer(page, port, theme=theme, css=style)


def _gradio() -> Any:
    """The library, told to report and to keep nothing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    try:
        import gradio
    except ModuleNotFoundError:
        raise InputError("demo: expected gradio, which `pip install 'thoughtbubbles[demo]'` brings") from None
    return gradio


def _budgets(exhibits: Sequence[Exhibit]) -> dict[str, float]:
    """The range of the budget: whole numbers where a model can have no others."""
    configs = [exhibit.model.config for exhibit in exhibits]
    own = float(configs[0].exact_budget())
    step = 1 if any(config.copied_layers for config in configs) else 0.25
    return {"minimum": 1, "maximum": max(own, LEAST_GREATEST_BUDGET), "value": own, "step": step}


def _add_exhibit(
    exhibit: Exhibit, place: int, page: Any, text: Any, budget: Any, count: Any, show: Any, go_on: Any
) -> list[Any]:
    """The part of one model; returns the events that `Stop` ends."""
    import gradio as gr

    gr.Markdown(f"### {exhibit.name}")
    made = gr.HTML(apply_default_css=False, elem_id=f"made-{place}")
    status = gr.HTML(apply_default_css=False, elem_id=f"status-{place}")
    tokens = gr.HTML(apply_default_css=False, elem_id=f"tokens-{place}", js_on_load=CHOOSE)
    detail = gr.HTML(apply_default_css=False, elem_id=f"detail-{place}")
    trace, chosen = gr.State(), gr.State()

    def trace_text(given: str, kappa: float, before: BubbleTrace | None, token: int | None) -> tuple[Any, ...]:
        try:
            found, cut = exhibit.trace(given, kappa)
        except ValueError as error:
            return None, None, render_message(str(error)), "", ""
        # At another budget the same token stays chosen; in another text it is another token.
        kept = token if before is not None and before.ids == found.ids else None
        about = "" if kept is None else describe(found, kept)
        return found, kept, render_message(cut) + render_summary(found), render_tokens(found, kept), about

    def choose(found: BubbleTrace | None, event: gr.EventData) -> tuple[int | None, str]:
        token = event._data.get("token")
        if found is None or type(token) is not int or not 0 <= token < len(found.tokens):
            return None, ""
        return token, describe(found, token)

    def describe(found: BubbleTrace, token: int) -> str:
        return render_tree(found, token) + render_next(exhibit.next_tokens(found, token))

    def generate(given: str, kappa: float, number: float) -> Iterator[str]:
        try:
            ids, cut = exhibit.prompt(given, int(number))
            for pieces, sizes in exhibit.generate(ids, kappa, int(number)):
                yield render_message(cut) + render_text(pieces, sizes)
        except ValueError as error:
            yield render_message(str(error))

    common: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    gr.on(
        [page.load, show.click, text.submit, budget.change],
        trace_text,
        inputs=[text, budget, trace, chosen],
        outputs=[trace, chosen, status, tokens, detail],
        trigger_mode="always_last",
        **common,
    )
    tokens.click(choose, [trace], [chosen, detail], **common)
    return [go_on.click(generate, [text, budget, count], [made], **common)]
