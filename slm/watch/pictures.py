"""Figures of runs, drawn with matplotlib: their losses, and what heads attend to.

T time, H heads. Importing this file imports matplotlib: do so when the first figure is drawn.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

INK = "#3c4043"
"""Of what is no run's, since runs have all other colours."""
LONGEST_NAME = 90
"""In a legend, in letters."""
HEADS_IN_A_ROW = 2
"""Few, since TensorBoard shows a figure 330 pixels wide until it is clicked."""
INCHES_PER_TOKEN = 0.16
INCHES_PER_LETTER = 0.067
"""Of a monospaced font of 8 points."""


def loss_figure(
    name: str, curves: Mapping[str, Sequence[tuple[int, float]]], optimum: float | None, is_plateau: bool
) -> Figure:
    """A run's losses in nats per token over its optimizer steps.

    Args:
        name: of the run.
        curves: steps and values by tag.
        optimum: the best loss that is possible; None where that is not known.
        is_plateau: whether falls of the learning rate are marked, each at the validation that caused it.
    """
    figure = Figure(figsize=(6.4, 4.4), dpi=100)
    axes = figure.add_axes((0.12, 0.12, 0.85, 0.8))  # matplotlib's own layouts double the time
    axes.set_title(ascii(name)[1:-1], loc="left", parse_math=False)  # the font does not have every character
    axes.set(xlabel="optimizer steps", ylabel="nats per token")
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
    training, validation, rates = (curves.get(tag, ()) for tag in ("train/loss", "val/loss", "lr"))
    for points, label, color, marker in (
        (training, "training", "#8ab4f8", "o" if len(training) == 1 else ""),
        (validation, "validation", "#1a73e8", "o"),
    ):
        axes.plot([step for step, _ in points], [loss for _, loss in points], color, marker=marker, label=label)
    if optimum is not None:
        axes.axhline(optimum, color="#188038", linestyle="--", label=f"optimum {optimum:.3f}")
    falls = [at for (_, before), (at, rate) in pairwise(rates) if is_plateau and rate < before]
    for number, fall in enumerate(falls):
        step = max((step for step, _ in validation if step < fall), default=fall)
        axes.axvline(step, color="#9334e6", linestyle=":", label=None if number else "learning rate falls")
    axes.legend(loc="upper right")
    return figure


def groups_figure(curves: Mapping[str, Sequence[tuple[int, Sequence[float]]]], optimum: float | None) -> Figure:
    """Validation losses of several runs in nats per token: a line for a mean, and a band from lowest to highest.

    Args:
        curves: by name, each step with the losses of all runs that are drawn as one.
        optimum: the best loss that is possible; None where that is not known, or not the same for all.
    """
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="optimizer steps", ylabel="validation loss, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
    for name, points in curves.items():
        steps, losses = [step + 1 for step, _ in points], [values for _, values in points]
        label = textwrap.shorten(ascii(name)[1:-1], LONGEST_NAME, placeholder=" ...").replace("$", r"\$")
        marker = "o" if len(steps) == 1 else ""
        [line] = axes.plot(steps, [sum(values) / len(values) for values in losses], marker=marker, label=label)
        low, high = [min(values) for values in losses], [max(values) for values in losses]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if optimum is not None:
        axes.axhline(optimum, color=INK, linestyle="--", label=f"optimum {optimum:.3f}")
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def law_figure(
    models: Sequence[tuple[int, int, float]],
    law: Callable[[float, float], float],
    limits: Mapping[str, float],
    foretold: tuple[float, float, float],
) -> Figure:
    """Losses in nats per token over the tokens that models were trained on, and what a law makes of them.

    Args:
        models: parameters, tokens and loss of each.
        law: the loss that it gives for parameters and tokens.
        limits: losses that are drawn as horizontal lines, by name.
        foretold: what the last of the models was expected to reach, and both ends of that.
    """
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="tokens, each seen once", ylabel="validation loss, nats per token", xscale="log")
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
    most = max(tokens for _, tokens, _ in models)
    for size in sorted({parameters for parameters, *_ in models}):
        tokens, losses = zip(*sorted((t, loss) for parameters, t, loss in models if parameters == size), strict=True)
        [dots] = axes.plot(tokens, losses, "o", label=f"{size:,} parameters")
        along = [tokens[0] * (2 * most / tokens[0]) ** (step / 50) for step in range(51)]
        axes.plot(along, [law(size, t) for t in along], color=dots.get_color())
    expected, low, high = foretold
    ends = [[max(0.0, expected - low)], [max(0.0, high - expected)]]
    label = f"foretold {expected:.3f}\n({low:.3f} to {high:.3f})"
    axes.errorbar([models[-1][1]], [expected], ends, fmt="x", color=INK, capsize=4, label=label)
    for (name, limit), style in zip(limits.items(), ("--", ":"), strict=False):
        axes.axhline(limit, color=INK, linestyle=style, label=f"{name} {limit:.3f}")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def attention_figure(weights: Tensor, tokens: Sequence[str], title: str) -> Figure:
    """The attention weights (H, T, T) of a layer, a map for each head, from white (0) to dark blue (1).

    Args:
        weights: of the layer; a row is the token that attends, a column the one that it attends to.
        tokens: T short names in ASCII, which stand beside the rows and above the columns.
        title: of the figure.
    """
    num_heads, seq_len, _ = weights.shape
    columns = min(num_heads, HEADS_IN_A_ROW)
    rows = math.ceil(num_heads / columns)
    side, margin = seq_len * INCHES_PER_TOKEN, 0.15 + max(map(len, tokens)) * INCHES_PER_LETTER
    width, height = max(3.2, margin + columns * (side + 0.15)), 0.3 + margin + rows * (side + 0.3)
    figure = Figure(figsize=(width, height), dpi=100)
    figure.text(0.1 / width, 1 - 0.1 / height, f"{title}: a row is the token that attends", va="top")
    for head, values in enumerate(weights.cpu().numpy()):
        row, column = divmod(head, columns)
        left, top = margin + column * (side + 0.15), 0.3 + margin + row * (side + 0.3)
        axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel(f"head {head + 1}")
        axes.set(xticks=[], yticks=[])
        axes.tick_params(length=0, labelsize=8, top=True, bottom=False, labeltop=True, labelbottom=False)
        if row == 0:
            axes.set_xticks(range(seq_len), tokens, rotation=90, family="monospace", parse_math=False)
        if column == 0:
            axes.set_yticks(range(seq_len), tokens, family="monospace", parse_math=False)
    return figure
