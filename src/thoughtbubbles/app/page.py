"""The page of `thoughtbubbles demo`, built with gradio."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from thoughtbubbles.app.exhibit import Exhibit
from thoughtbubbles.app.render import (
    render_legend,
    render_message,
    render_next,
    render_summary,
    render_text,
    render_tokens,
    render_tree,
)
from thoughtbubbles.app.serving import PageServer
from thoughtbubbles.inspection.trace import BubbleTrace
from thoughtbubbles.support.errors import InputError

if TYPE_CHECKING:
    from gradio import Blocks

EXAMPLES = {
    "Try a story": "The old man walked slowly down to the harbour, where the ships lay at anchor.",
    "Try code": 'def read_text(path):\n    """Return the text of a file."""\n    with open(path) as f:\n        return',
    "Try a pattern": "Paris is the capital of France, Rome is the capital of Italy, Berlin is the capital of",
}
ABOUT = (
    "Each token carries streams through the blocks of the model; their number grows where it forks them and shrinks "
    "where it deletes them."
)
ABOUT_DENSE = "Each token carries one stream through the blocks of the model, since it is dense."
LEAST_GREATEST_BUDGET = 4
MOST_TYPED = 100_000  # characters, far below what the shield lets through
NARROW = 90  # pixels: three buttons stand side by side on a phone
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
        forks = any(exhibit.has_budget for exhibit in exhibits)
        gr.Markdown("# Where the model thinks", elem_id="head")
        gr.Markdown(ABOUT if forks else ABOUT_DENSE, elem_id="about")
        controls = _add_controls(gr, exhibits)
        if forks:
            gr.HTML(render_legend(), apply_default_css=False, elem_id="legend")
        with gr.Row():
            panels = []
            for place, exhibit in enumerate(exhibits):
                with gr.Column(min_width=320):
                    panels.append(Panel(gr, exhibit, place))
        for panel in panels:
            panel.listen(page, controls)
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


@dataclass(frozen=True)
class Controls:
    """What a user of the page works with, gradio's components; `budget` is a plain value where it is no control."""

    text: Any
    examples: list[Any]
    budget: Any
    count: Any
    show: Any
    go_on: Any
    stop: Any


def _add_controls(gr: Any, exhibits: Sequence[Exhibit]) -> Controls:
    """The text, its examples, the buttons and the sliders; without a model that forks there is no budget."""
    label, first = "Text (Shift+Enter shows its bubbles)", next(iter(EXAMPLES.values()))
    text = gr.Textbox(first, label=label, lines=2, max_lines=8, max_length=MOST_TYPED, elem_id="text")
    with gr.Row(elem_id="examples"):
        examples = [
            gr.Button(name, size="sm", scale=0, min_width=NARROW, elem_id=f"example-{place}")
            for place, name in enumerate(EXAMPLES)
        ]
    with gr.Row(elem_id="buttons"):
        show = gr.Button("Show bubbles", variant="primary", size="md", scale=0, min_width=NARROW, elem_id="show")
        go_on = gr.Button("Generate", size="md", scale=0, min_width=NARROW, elem_id="generate")
        stop = gr.Button("Stop", size="md", scale=0, min_width=NARROW, elem_id="stop")
    slim: dict[str, Any] = {"min_width": 140, "buttons": []}
    with gr.Row(elem_id="sliders"):
        budget = gr.State(1)
        if any(exhibit.has_budget for exhibit in exhibits):
            budget = gr.Slider(**_budgets(exhibits), label="Budget: streams per token", elem_id="budget", **slim)
        count = gr.Slider(1, 200, 40, step=1, label="Tokens to generate", elem_id="count", **slim)
    return Controls(text, examples, budget, count, show, go_on, stop)


def _budgets(exhibits: Sequence[Exhibit]) -> dict[str, float]:
    """The range of the budget: whole numbers where a model can have no others, up to what each can have."""
    configs = [exhibit.model.config for exhibit in exhibits if exhibit.has_budget]
    own = float(configs[0].exact_budget())
    bounds = [float(config.exact_budget()) for config in configs if config.rule.with_vectors]
    greatest = min([max(own, LEAST_GREATEST_BUDGET), *bounds])
    if any(config.copied_layers for config in configs):
        return {"minimum": 1, "maximum": int(greatest), "value": int(min(own, greatest)), "step": 1}
    return {"minimum": 1, "maximum": greatest, "value": own, "step": 0.25}


@dataclass(frozen=True)
class Shown:
    """What a panel shows.

    Attributes:
        trace: of the text.
        message: to the user.
        start: the first generated token; None for a text that was typed.
        chosen: the token whose streams are shown.
    """

    trace: BubbleTrace
    message: str = ""
    start: int | None = None
    chosen: int | None = None


@dataclass(frozen=True)
class Growing:
    """What a generation has made so far.

    Attributes:
        turn: its number.
        ids: of all tokens.
        start: the first generated one.
        message: to the user.
    """

    turn: int
    ids: list[int]
    start: int
    message: str


@dataclass
class Turn:
    """What a panel does last, so that what went before it ends: each text and each generation is a turn of its own.

    gradio's own way to cancel an event fails where the event ends at the same time.
    """

    number: int = 0
    stopped: bool = False

    def take(self) -> int:
        """Begin the next turn; returns its number."""
        self.number, self.stopped = self.number + 1, False
        return self.number


class Panel:
    """The part of the page that is one model's."""

    def __init__(self, gr: Any, exhibit: Exhibit, place: int) -> None:
        self.exhibit = exhibit
        gr.Markdown(f"### {exhibit.name}")
        self.status = gr.HTML(apply_default_css=False, elem_id=f"status-{place}")
        self.tokens = gr.HTML(apply_default_css=False, elem_id=f"tokens-{place}", js_on_load=CHOOSE)
        self.detail = gr.HTML(apply_default_css=False, elem_id=f"detail-{place}")
        self.shown, self.growing, self.turn = gr.State(), gr.State(), gr.State(Turn())
        self.outputs = [self.shown, self.status, self.tokens, self.detail]
        self.quietly: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def listen(self, page: Any, controls: Controls) -> None:
        """Answer the controls and the choice of a token."""
        import gradio as gr

        text, budget = controls.text, controls.budget
        generation = controls.go_on.click(
            self.generate, [text, budget, controls.count, self.turn], [self.growing, *self.outputs], **self.quietly
        )
        generation.then(self.finish, [self.growing, budget, self.turn], self.outputs, **self.quietly)
        controls.stop.click(self.stop, self.turn, None, **self.quietly)
        texts = [page.load, controls.show.click, text.submit]
        for example, written in zip(controls.examples, EXAMPLES.values(), strict=True):
            texts.append(example.click(lambda written=written: written, None, text, **self.quietly).then)
        for event in texts:
            event(self.show_text, [text, budget, self.turn], self.outputs, **self.quietly)
        if self.exhibit.has_budget:
            again = {"trigger_mode": "always_last", **self.quietly}
            budget.change(self.show_again, [self.shown, budget], self.outputs, **again)

        def choose(shown: Shown | None, event: gr.EventData) -> tuple[Shown | None, str]:
            return self.choose(shown, event._data.get("token"))

        self.tokens.click(choose, [self.shown], [self.shown, self.detail], **self.quietly)

    def show_text(self, text: str, budget: float, turn: Turn) -> tuple[Any, ...]:
        """The bubbles of a text that was typed."""
        turn.take()
        try:
            ids, message = self.exhibit.read(text)
            return self._view(Shown(self.exhibit.trace(ids, budget), message))
        except ValueError as error:
            return None, render_message(str(error)), "", ""

    def show_again(self, shown: Shown | None, budget: float) -> Any:
        """The same text at another budget, the same token chosen."""
        if shown is None:
            return self._nothing()
        try:
            return self._view(replace(shown, trace=self.exhibit.trace(shown.trace.ids, budget)))
        except ValueError as error:
            return None, render_message(str(error)), "", ""

    def generate(self, text: str, budget: float, count: float, turn: Turn) -> Iterator[list[Any]]:
        """The text as it grows; nothing else of the panel is its own any more."""
        number, rest = turn.take(), [None, "", "", ""]
        try:
            ids, message = self.exhibit.prompt(text, int(count))
            for growth in self.exhibit.generate(ids, budget, int(count)):
                if turn.number != number or turn.stopped:
                    # What a generator gave last is sent once more when it ends.
                    yield [_gradio().skip(), *self._nothing()]
                    return
                if growth.row_ended:
                    longest = self.exhibit.model.config.max_position_embeddings
                    message = f"{message} It ends here: the model takes no more than {longest} tokens.".strip()
                rest[1] = render_message(message) + render_text(growth.pieces, growth.sizes, len(ids))
                yield [Growing(number, growth.ids, len(ids), message), *rest]
                rest = self._nothing()
        except ValueError as error:
            yield [None, None, render_message(str(error)), "", ""]

    def stop(self, turn: Turn) -> None:
        """End the generation after its next token."""
        turn.stopped = True

    def finish(self, growing: Growing | None, budget: float, turn: Turn) -> Any:
        """The bubbles of what was generated, unless something else was asked for since."""
        if growing is None or growing.turn != turn.number:
            return self._nothing()
        return self._view(Shown(self.exhibit.trace(growing.ids, budget), growing.message, growing.start))

    def choose(self, shown: Shown | None, token: object) -> tuple[Shown | None, str]:
        """The family tree of a token that was clicked, and what the model expects after it."""
        if shown is None or type(token) is not int or not 0 <= token < len(shown.trace.tokens):
            return shown, ""
        return replace(shown, chosen=token), self._describe(shown.trace, token)

    def _nothing(self) -> list[Any]:
        """No change of any output."""
        return [_gradio().skip()] * len(self.outputs)

    def _view(self, shown: Shown) -> tuple[Any, ...]:
        trace = shown.trace
        about = render_message(shown.message) + render_summary(trace)
        if shown.start is not None:
            about += render_text(trace.tokens, trace.bubble_sizes()[-1].tolist(), shown.start)
        detail = "" if shown.chosen is None else self._describe(trace, shown.chosen)
        return shown, about, render_tokens(trace, shown.chosen, shown.start), detail

    def _describe(self, trace: BubbleTrace, token: int) -> str:
        tree = render_tree(trace, token) if trace.fork_layers else ""
        return tree + render_next(self.exhibit.next_tokens(trace, token))
