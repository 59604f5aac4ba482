"""Numbers -> pieces of HTML: bars, tables and maps. Everything that is a user's or a model's text is escaped here."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from torch import Tensor

CELL, SIGN = 12, 6.2
"""Units of a map's drawing: a cell, and a letter of its labels."""
LARGEST_ZOOM, WIDTH = 1.4, 640
"""A small map is drawn larger, by so much or up to that width."""
LONGEST_LABEL = 8
INK = (52, 114, 245)
"""Of maps, red, green and blue; how opaque it is, is the weight, so that it does on a light and on a dark page."""


@dataclass(frozen=True)
class Bar:
    """A token with two probabilities, of which the first is drawn in outline."""

    name: str
    first: float
    second: float


def percent(probability: float) -> str:
    """A probability as one reads it, with about three digits."""
    if 0 < probability < 1e-6:
        return "< 0.0001 %"
    digits = sum(probability < limit for limit in (0.1, 1e-3, 1e-4)) + 1 if probability else 1
    return f"{100 * probability:.{digits}f} %"


def bars(rows: Sequence[Bar], first: str, second: str, left_out: str = "") -> str:
    """Two probabilities of each token, side by side.

    Args:
        rows: the tokens.
        first: what the first probability is; second likewise.
        left_out: what is said of a token whose second probability is 0.
    """
    largest = max((max(row.first, row.second) for row in rows), default=1.0) or 1.0
    lines = [
        f"<tr{' class=out' if row.second == 0 and left_out else ''}><th scope=row>{_token(row.name)}</th>"
        f"<td class=bars><span class=first style='--share:{row.first / largest:.4f}'></span>"
        f"<span class=second style='--share:{row.second / largest:.4f}'></span></td>"
        f"<td>{percent(row.first)}</td><td>{(left_out if row.second == 0 else '') or percent(row.second)}</td></tr>"
        for row in rows
    ]
    head = (
        f"<tr><th scope=col>token</th><td></td><th scope=col><span class='key first'></span>{escape(first)}</th>"
        f"<th scope=col><span class='key second'></span>{escape(second)}</th></tr>"
    )
    return f"<table class=chart><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"


def layers(rows: Sequence[Sequence[tuple[str, float]]], following: str, places: Sequence[tuple[float, int]]) -> str:
    """What each layer would say.

    Args:
        rows: the likeliest tokens with their probabilities, after the embedding and after each block.
        following: the token that did follow; empty where there is none.
        places: its probability and rank in each row; empty likewise.
    """
    size = len(rows[0])
    head = "".join(f"<th scope=col>{number}.</th>" for number in range(1, size + 1))
    head += f"<th scope=col>{_token(following)} followed</th>" if following else ""
    lines = []
    for number, row in enumerate(rows):
        name = "embedding" if number == 0 else f"block {number}"
        cells = "".join(
            f"<td class=said style='--share:{probability:.3f}'>{_token(token)}"
            f"<small>{percent(probability)}</small></td>"
            for token, probability in row
        )
        if following:
            probability, rank = places[number]
            cells += f"<td class=rank>rank {rank:,}<small>{percent(probability)}</small></td>"
        lines.append(f"<tr><th scope=row>{name}</th>{cells}</tr>")
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return _wide(f"<table class=lens>{body}</table>", "what each layer would say")


def shaded(names: Sequence[str], weights: Sequence[float]) -> str:
    """Tokens in a row, each as full in colour as in `picture`."""
    spans = (
        f"<span style='--share:{math.sqrt(weight):.3f}' title='{percent(weight)}'>{escape(name)}</span>{_break(name)}"
        for name, weight in zip(names, weights, strict=True)
    )
    return "".join(spans)


def surprised(names: Sequence[str], shares: Sequence[float], tips: Sequence[str], selected: int) -> str:
    """Tokens in a row, each coloured by its share of the scale."""
    spans = (
        f"<span class='token{' selected' if number == selected else ''}' style='--share:{share:.3f}' "
        f"title='{escape(tip)}'>{escape(name)}</span>{_break(name)}"
        for number, (name, share, tip) in enumerate(zip(names, shares, tips, strict=True))
    )
    return "".join(spans)


def attention_map(weights: Tensor, names: Sequence[str], selected: int, label: str) -> str:
    """The weights (T, T) of one head: a row for each token that looks, a column for each that is looked at.

    Args:
        weights: between 0 and 1; the upper triangle is empty.
        names: of the tokens.
        selected: the row that is framed.
        label: for those who do not see the drawing.
    """
    short = [name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…" for name in names]
    margin, size = 10 + SIGN * max(map(len, short)), CELL * len(names)
    texts = []
    for number, name in enumerate(short):
        middle = margin + CELL * (number + 0.5)
        texts.append(f"<text x={margin - 4:.0f} y={middle + 3:.1f} text-anchor=end>{escape(name)}</text>")
        place = f"transform='translate({middle + 3:.1f} {margin - 4:.0f}) rotate(-90)'"
        texts.append(f"<text {place}>{escape(name)}</text>")
    top, width = margin + CELL * selected, CELL * (selected + 1)
    frame = f"<rect class=frame x={margin} y={top} width={width} height={CELL} />"
    image = f"<image href='{picture(weights)}' x={margin} y={margin} width={size} height={size} />"
    edge = f"<path class=edge d='M{margin} {margin}V{margin + size}H{margin + size}' />"
    whole = margin + size + 2
    box = f"viewBox='0 0 {whole:.0f} {whole:.0f}' width={max(whole, min(LARGEST_ZOOM * whole, WIDTH)):.0f}"
    drawing = f"<svg {box} role=img aria-label='{escape(label)}'>{edge}{image}{frame}{''.join(texts)}</svg>"
    return _wide(drawing, "map of attention")


def picture(weights: Tensor) -> str:
    """Weights (T, T) between 0 and 1 as an address of a picture, a pixel each; faint ones are raised to be seen."""
    from matplotlib.image import imsave

    opacity = weights.clamp(0, 1).sqrt().numpy()
    pixels = np.empty((*opacity.shape, 4), dtype=np.uint8)
    pixels[..., :3] = INK
    pixels[..., 3] = np.rint(255 * opacity)
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _wide(content: str, label: str) -> str:
    """What may be wider than the window, and is then moved in its own frame, by the keyboard too."""
    return f"<div class=wide tabindex=0 role=region aria-label='{label}'>{content}</div>"


def _token(name: str) -> str:
    return f"<span class=name>{escape(name)}</span>"


def _break(name: str) -> str:
    return "<br>" if "↵" in name else ""
