"""Pictures of a run: a chart of its losses, and maps of attention; drawn with Pillow, which TensorBoard's images need.

A plotting library takes longer to import than a hundredth of a short run, which is all that watching may take.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT = 640, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 62, 52
FONT_SIZE = 15
INK, GREY, FAINT = "#202124", "#5f6368", "#e3e5e8"
CELL = 14
"""Pixels of one weight of attention."""
HEADS_IN_A_ROW = 2  # TensorBoard shows a picture 330 pixels wide, until it is clicked


@dataclass(frozen=True)
class Line:
    """What a chart draws of one kind of loss.

    Args:
        name: for the legend.
        color: as Pillow takes it.
        points: steps, and the values there; those that are not finite are left out.
        has_dots: whether each point is marked.
    """

    name: str
    color: str
    points: Sequence[tuple[int, float]]
    has_dots: bool = False

    def finite(self) -> list[tuple[int, float]]:
        return [point for point in self.points if math.isfinite(point[1])]


def loss_chart(title: str, lines: Sequence[Line], optimum: float | None, drops: Sequence[int]) -> Image.Image:
    """Losses over optimizer steps, the optimum as a level, and a mark at each step where the learning rate fell."""
    points = [point for line in lines for point in line.finite()] or [(0, 0.0)]
    last = max(step for step, _ in points) or 1
    values = [value for _, value in points] + ([] if optimum is None else [optimum])
    low, high = min(values), max(values)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)

    def at(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    for value in ticks(low, high):
        draw.line([at(0, value), at(last, value)], FAINT)
        draw.text((LEFT - 8, at(0, value)[1]), f"{value:g}", GREY, font, anchor="rm")
    for step in ticks(0, last):
        draw.text((at(step, low)[0], HEIGHT - BOTTOM + 6), f"{step:,g}", GREY, font, anchor="mt")
    draw.line([at(0, high), at(0, low), at(last, low)], GREY)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8), "optimizer steps", GREY, font, anchor="mb")

    legend = [(line.name, line.color) for line in lines]
    for step in drops:
        _dashed(draw, at(step, high), at(step, low), "#9334e6")
    if drops:
        legend.append(("learning rate falls", "#9334e6"))
    if optimum is not None:
        _dashed(draw, at(0, optimum), at(last, optimum), "#188038")
        legend.append((f"optimum {optimum:.3f}", "#188038"))
    for line in lines:
        drawn = [at(step, value) for step, value in line.finite()]
        if len(drawn) > 1:
            draw.line(drawn, line.color, width=2, joint="curve")
        if line.has_dots or len(drawn) == 1:
            for point in drawn:
                draw.circle(point, 4, line.color)

    draw.text((8, 6), f"{title}: nats per token", INK, font)
    x: float = LEFT - 8
    for name, color in legend:
        draw.line([(x + 8, 42), (x + 30, 42)], color, width=3)
        draw.text((x + 36, 34), name, INK, font)
        x += draw.textlength(name, font) + 44
    return image


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers between the two."""
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * factor for factor in (5, 2, 1, 0.5) if (high - low) / (size * factor) >= 4)
    return [round(step * count, 12) for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _dashed(draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    length = math.dist(start, end)
    for begin in range(0, int(length), 10):
        ends = ((1 - share) * start[0] + share * end[0] for share in (begin / length, min(1, (begin + 6) / length)))
        downs = ((1 - share) * start[1] + share * end[1] for share in (begin / length, min(1, (begin + 6) / length)))
        draw.line(list(zip(ends, downs, strict=True)), color, width=2)


def attention_image(weights: Tensor, tokens: Sequence[str], title: str) -> Image.Image:
    """The weights (H, T, T) of every head of a layer, from white (0) to dark (1), with the T tokens on both axes.

    A row is the token that attends, a column the one that it attends to.
    """
    num_heads, seq_len, _ = weights.shape
    font = ImageFont.load_default(FONT_SIZE - 3)
    margin = 8 + round(max(font.getlength(token) for token in tokens))
    side = seq_len * CELL
    columns = min(num_heads, HEADS_IN_A_ROW)
    rows = math.ceil(num_heads / columns)
    image = Image.new("RGB", (columns * (margin + side + 8), 24 + rows * (24 + margin + side)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 6), f"{title}: a row is the token that attends", INK, ImageFont.load_default(FONT_SIZE))
    beside, above = Image.new("L", (margin, side), 255), Image.new("L", (margin, side), 255)
    for index, token in enumerate(tokens):
        ImageDraw.Draw(beside).text((margin - 4, (index + 0.5) * CELL), token, 0, font, anchor="rm")
        ImageDraw.Draw(above).text((4, (index + 0.5) * CELL), token, 0, font, anchor="lm")
    colors = torch.stack([255 - 229 * weights, 255 - 140 * weights, 255 - 23 * weights], dim=-1)  # white to blue
    for head, picture in enumerate(colors.clamp(0, 255).byte().cpu()):
        left, top = (head % columns) * (margin + side + 8), 24 + (head // columns) * (24 + margin + side)
        x, y = left + margin, top + 20 + margin
        draw.text((x, top + 4), f"head {head + 1}", INK, font)
        image.paste(beside, (left, y))
        image.paste(above.transpose(Image.Transpose.ROTATE_90), (x, y - margin))
        image.paste(Image.fromarray(picture.numpy()).resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.rectangle([x - 1, y - 1, x + side, y + side], outline=GREY)
    return image
