"""Traces as HTML: plain markup without scripts, coloured by the style sheet of the page."""

from collections.abc import Sequence
from html import escape

import numpy as np

from thoughtbubbles.inspection.trace import BubbleTrace, Lifetime, family_order
from thoughtbubbles.model.budget import budget_text
from thoughtbubbles.support.plots import visible_token

UNIT = 5  # pixels that one stream is wide in a silhouette
ROW = 6  # pixels that one block is high in it
STEP, LANE = 64, 26  # pixels from block to block and from stream to stream in a tree
MOST_SHADES = 6


def render_legend() -> str:
    """What the shapes, numbers and colours of the page say."""
    shades = "".join(
        f'<span class="tb-shade"><span class="tb-swatch tb-s{shade}"></span>{shade}'
        f"{' or more' if shade == MOST_SHADES else ''}</span>"
        for shade in range(1, MOST_SHADES + 1)
    )
    return (
        '<div class="tb-legend"><p>The <b>shape</b> above a token is its bubble: its streams in each block, the first '
        "block below, the last on top. The <b>number</b> is its streams in the last block. Tokens with a line below "
        f"them were generated.</p><p><b>Colour</b>, the streams: {shades}</p></div>"
    )


def render_tokens(trace: BubbleTrace, chosen: int | None = None, start: int | None = None) -> str:
    """A button for each token, above its text the silhouette of its bubble: the first block below, the last on top.

    Args:
        chosen: the token whose button is pressed.
        start: the first generated token; None where none is.
    """
    sizes = trace.bubble_sizes()
    widest = int(sizes.max())
    buttons = []
    for token, piece in enumerate(trace.tokens):
        shown, made = escape(visible_token(piece)), start is not None and token >= start
        buttons.append(
            f'<button type="button" class="tb-token{" tb-made" if made else ""}" data-token="{token}" '
            f'aria-pressed="{str(token == chosen).lower()}" aria-label="token {token}, {shown}: '
            f'{_streams(sizes[-1, token])} in the last block{", generated" if made else ""}" '
            f'title="{_streams(sizes[-1, token])} in the last block">{_silhouette(sizes[:, token].tolist(), widest)}'
            f'<span class="tb-piece">{shown}</span><span class="tb-count">{sizes[-1, token]}</span></button>'
        )
    streams = "its streams and " if trace.fork_layers else ""
    return (
        f'<p class="tb-hint">Click a token to see {streams}what the model expects next.</p>'
        f'<div class="tb-tokens" role="group" aria-label="Tokens">{"".join(buttons)}</div>'
    )


def _silhouette(sizes: Sequence[int], widest: int) -> str:
    width, height = widest * UNIT, len(sizes) * ROW
    bars = "".join(
        f'<rect class="tb-s{min(size, MOST_SHADES)}" x="{(widest - size) * UNIT / 2:g}" '
        f'y="{height - (layer + 1) * ROW}" width="{size * UNIT}" height="{ROW}"/>'
        for layer, size in enumerate(sizes)
    )
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" aria-hidden="true">{bars}</svg>'


def render_summary(trace: BubbleTrace) -> str:
    """The loss and perplexity of the text and the streams that it took."""
    parts = ["a dense model: one stream per token"]
    if trace.fork_layers:
        streams = f"{trace.bubble_sizes().mean():.2f} streams per token and block"
        parts = [f"budget {budget_text(trace.budget)}", streams]
    if trace.surprisal:
        loss = float(np.mean(trace.surprisal))
        parts.insert(0, f"perplexity {np.exp(loss):.2f} ({loss:.4f} nats per token)")
    if trace.leaks:
        parts.append(f"routing {trace.routing}: early tokens see later ones, so this is no left-to-right likelihood")
    return f'<p class="tb-summary">{"; ".join(parts)}</p>'


def render_tree(trace: BubbleTrace, token: int) -> str:
    """The family tree of a token's streams: a line a stream from left to right through the blocks.

    Raises:
        ValueError: for a token that the text does not have.
    """
    family = family_order(trace.lifetimes(token))
    y = {each.stream: 20 + LANE * place for place, each in enumerate(family)}
    width, height = STEP * (trace.num_layers + 1) + 40, LANE * len(family) + 40
    lines = "".join(_draw_stream(each, y, trace) for each in family)
    ticks = "".join(
        f'<text x="{_x(layer) + STEP / 2:g}" y="{height - 6}" class="tb-tick">'
        f"{'fork ' if layer in trace.fork_layers else ''}{layer}</text>"
        for layer in range(trace.num_layers)
    )
    born, gone = sum(each.source is not None for each in family), sum(each.deleted_at is not None for each in family)
    title = f"Token {token}, {visible_token(trace.tokens[token])}: forks made: {born}, deleted: {gone}"
    return (
        f'<figure class="tb-tree"><figcaption>{escape(title)}</figcaption><div class="tb-scroll" tabindex="0">'
        f'<svg role="img" aria-label="{escape(title)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{lines}{ticks}</svg></div>'
        "<p>Blocks from left to right; each fork stands above its source, the root is the lowest line; a cross is "
        "where a stream was deleted, the number at the end its score p.</p></figure>"
    )


def _draw_stream(each: Lifetime, y: dict[int, int], trace: BubbleTrace) -> str:
    """One line, with the place where it left its source and where it ends."""
    end = trace.num_layers if each.deleted_at is None else each.deleted_at
    kind = "tb-root" if each.is_root else "tb-fork"
    at, left, right = y[each.stream], _x(each.forked_at), _x(end)
    drawn = f'<line class="{kind}" x1="{left}" y1="{at}" x2="{right}" y2="{at}"/>'
    if each.source is not None:
        drawn += f'<line class="tb-branch" x1="{left}" y1="{at}" x2="{left}" y2="{y[each.source]}"/>'
    if each.deleted_at is None:
        return drawn + f'<text x="{right + 6}" y="{at + 4}">{_score(trace, each.stream):.2g}</text>'
    arms = ((-5, -5, 5, 5), (-5, 5, 5, -5))
    return drawn + "".join(
        f'<line class="tb-death" x1="{right + a}" y1="{at + b}" x2="{right + c}" y2="{at + d}"/>' for a, b, c, d in arms
    )


def _score(trace: BubbleTrace, stream: int) -> float:
    """p of a stream in the last block."""
    table = trace.streams
    row = np.flatnonzero((table.stream == stream) & (table.layer == trace.num_layers - 1))[0]
    return float(np.exp(table.log_score[row]))


def render_next(found: Sequence[tuple[str, float, float | None]]) -> str:
    """A table of the likeliest next tokens, with the chosen token's forks and, where it can have some, without."""
    forks = any(without is not None for *_, without in found)
    titles = ("token", "with its forks", "without them") if forks else ("token", "probability")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    rows = "".join(
        f'<tr><th scope="row">{escape(visible_token(piece))}</th>'
        f"{''.join(f'<td>{value:.2%}</td>' for value in values if value is not None)}</tr>"
        for piece, *values in found
    )
    return (
        f'<table class="tb-next"><caption>Likeliest next tokens</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def render_text(pieces: Sequence[str], sizes: Sequence[int], start: int = 0) -> str:
    """Running text whose tokens are underlined by their streams; above one stream the number follows.

    Args:
        start: the first generated token; those before it are the prompt.
    """
    marked = [_mark(piece, size) for piece, size in zip(pieces, sizes, strict=True)]
    prompt = f'<span class="tb-prompt">{"".join(marked[:start])}</span>' if start else ""
    return f'<p class="tb-text">{prompt}{"".join(marked[start:])}</p>'


def _mark(piece: str, size: int) -> str:
    """One token of running text; a bubble before a line break is marked on the line that ends there."""
    body = piece.rstrip("\r\n")
    breaks = piece[len(body) :]
    shown = escape(body) + ("↵" * len(breaks) if size > 1 else "")
    count = f"<sub>{size}</sub>" if size > 1 else ""
    return f'<span class="tb-s{min(size, MOST_SHADES)}" title="{_streams(size)}">{shown}</span>{count}{breaks}'


def render_message(text: str) -> str:
    """A message to the user; nothing for none."""
    return f'<p class="tb-message" role="status">{escape(text)}</p>' if text else ""


def _x(layer: int) -> int:
    return 10 + STEP * layer


def _streams(count: int) -> str:
    return f"{count} stream{'' if count == 1 else 's'}"
