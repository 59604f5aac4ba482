"""What a run shows in TensorBoard beside its curves, and the curves read back.

B batch, T time, H heads.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from slm.data.text_stream import Numbers, TextStream, stored_tokenizer
from slm.data.token_data import TokenData
from slm.data.tokenizer import Tokenizer
from slm.durable import replacing
from slm.errors import NotWrittenError
from slm.messages import say
from slm.model.insight import attention, attention_layers
from slm.model.sampling import Sampler, decode
from slm.run.resume import is_fitting

LARGEST_SHARE_OF_TIME = 0.003
"""What samples may cost of a run's time, and attention maps likewise. With what is shown at the end, that is 1 % of a
run of a minute."""
SECONDS_PER_MAP = 0.1
"""What the map of one head is taken to cost before the first is drawn: twice what it does on an idle CPU core."""
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 16, 64
ATTENDING_TOKENS = 16
EMBEDDED_TOKENS = 500
LONGEST_LABEL = 12
LONE = "surrogateescape"
"""How Python keeps bytes that are no character."""
FIGURE = "loss.png"
HPARAMS_LOSS = "best/val_loss"
"""The best loss in the HPARAMS tab: a tag of its own, so that it adds no point to a curve."""

Curve = Sequence[tuple[int, float]]
"""Steps, and the values there."""
Show = Callable[[Trainer, Any, Any], None]
"""Writes something about a run's module with a TensorBoard writer."""


@dataclass(frozen=True)
class Watch:
    """What a run shows in TensorBoard beside its curves; each can be switched off.

    Args:
        samples: texts that the model writes after fixed prompts, at validations.
        attention: what each head of each layer attends to in a fixed sentence, at validations.
        embedding: the embedding of the most frequent tokens, for the projector, at the end.
        loss_figure: training and validation loss in one picture, at the end; also `loss.png` in the run's folder.
    """

    samples: bool = True
    attention: bool = True
    embedding: bool = True
    loss_figure: bool = True


class Watcher(Callback):
    """Shows what `Watch` says, of the held-out windows.

    Skips samples and attention maps, each by itself, at validations where showing them would exceed the time budget.
    The first samples are always shown. Where the loss is not finite, nothing is. It draws no random numbers but its
    own, so a run is the same with and without it.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._start = 0.0
        self._spent: dict[Show, float] = {}
        self._next_cost: dict[Show, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()
        num_maps = sum(layer.num_heads for layer in attention_layers(pl_module))
        if self.watch.samples:
            self._next_cost[_show_samples] = 0.0
        if self.watch.attention and num_maps:
            self._next_cost[_show_attention] = num_maps * SECONDS_PER_MAP
        self._spent = dict.fromkeys(self._next_cost, 0.0)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_fitting(trainer) or not torch.as_tensor(trainer.callback_metrics["val/loss"]).isfinite():
            return
        for show, cost in self._next_cost.items():
            start = time.monotonic()
            if self._spent[show] + cost <= LARGEST_SHARE_OF_TIME * (start - self._start):
                for writer in _writers(trainer):
                    show(trainer, pl_module, writer)
                self._next_cost[show] = time.monotonic() - start
                self._spent[show] += self._next_cost[show]

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.watch.embedding:
            try:
                for writer in _writers(trainer):
                    _show_embedding(trainer, pl_module, writer)
            except OSError as error:
                say(f"the embedding cannot be written: {error.strerror}")


@rank_zero_only
def show_in_tensorboard(
    loggers: Iterable[Logger],
    run: Path,
    hparams: Mapping[str, Any],
    best: float | None,
    optimum: float | None,
    step: int,
    has_figure: bool,
) -> None:
    """List a run's settings in the HPARAMS tab with its best loss, and draw its losses, as `loss.png` too.

    Args:
        loggers: of the run; only TensorBoard's are written to.
        run: its folder.
        hparams: of model and data.
        best: the loss of the best checkpoint; None where there is none.
        optimum: the best loss that is possible; None where that is not known.
        step: the number of optimizer steps done.
        has_figure: whether the losses are drawn.
    """
    for logger in (logger for logger in loggers if isinstance(logger, TensorBoardLogger)):
        if best is not None:
            logger.log_hyperparams(dict(hparams), {HPARAMS_LOSS: best}, step)
        logger.save()
        curves = read_curves(run) if has_figure else {}
        if curves:
            from slm.watch.pictures import loss_figure

            figure = loss_figure(run.name, curves, optimum, hparams["schedule"] == "plateau")
            try:
                with replacing(run / FIGURE) as file:
                    figure.savefig(file, format="png")
            except NotWrittenError as error:
                say(str(error))
            logger.experiment.add_figure("losses", figure, step)
            logger.save()


def _show_samples(trainer: Trainer, module: Any, writer: Any) -> None:
    """Write, in Markdown, the beginnings of held-out windows and how the model goes on with them."""
    data: TokenData = trainer.datamodule  # type: ignore[attr-defined]
    windows, tokenizer = data.val_windows, stored_tokenizer(data.tokenizer, data.hparams["vocab_size"])
    assert windows is not None
    chosen = [windows[len(windows) * number // NUM_PROMPTS][0][:PROMPT_TOKENS] for number in range(NUM_PROMPTS)]
    prompts = torch.stack(chosen).to(module.device)  # (B, T)
    sampler = Sampler(batch_size=NUM_PROMPTS)
    limit = tokenizer.vocab_size
    steps = decode(module.transformer, prompts, lambda logits: sampler(logits[:, :limit]))
    written = torch.stack(list(islice(steps, NEW_TOKENS)), dim=1)  # (B, T)
    shown = []
    for prompt, row in zip(prompts.tolist(), written.tolist(), strict=True):
        text, pieces = TextStream(tokenizer, prompt), []
        for token in row:
            pieces.append(text.add(token))
            if text.is_over:
                break
        shown.append(f"It goes on from\n\n{_block(tokenizer.decode(prompt))}\n\nwith\n\n{_block(''.join(pieces))}")
    writer.add_text("samples", "\n\n---\n\n".join(shown), trainer.global_step)


def _show_attention(trainer: Trainer, module: Any, writer: Any) -> None:
    from slm.watch.pictures import attention_figure

    data: TokenData = trainer.datamodule  # type: ignore[attr-defined]
    assert data.val_windows is not None
    tokens = data.val_windows[0][0][:ATTENDING_TOKENS]
    tokenizer = stored_tokenizer(data.tokenizer, data.hparams["vocab_size"])
    names = [label(tokenizer, token) for token in tokens.tolist()]
    for layer, weights in enumerate(attention(module.transformer, tokens.to(module.device)), start=1):
        figure = attention_figure(weights, names, f"layer {layer}")
        writer.add_figure(f"attention/layer_{layer}", figure, trainer.global_step)


def _show_embedding(trainer: Trainer, module: Any, writer: Any) -> None:
    """Write the embedding of the tokens that come most often in the held-out part, with what they stand for."""
    data: TokenData = trainer.datamodule  # type: ignore[attr-defined]
    assert data.val_windows is not None
    weights, stream = module.transformer.token_embedding.weight.detach(), data.val_windows.stream[: 2**20]
    counts = torch.bincount(torch.as_tensor(stream).long(), minlength=len(weights))
    chosen = counts.argsort(descending=True, stable=True)[: min(EMBEDDED_TOKENS, int((counts > 0).sum()))]
    tokenizer = stored_tokenizer(data.tokenizer, data.hparams["vocab_size"])
    names = [
        [label(tokenizer, token), str(count)]
        for token, count in zip(chosen.tolist(), counts[chosen].tolist(), strict=True)
    ]
    writer.add_embedding(
        weights[chosen.to(weights.device)].float(),
        metadata=names,
        metadata_header=["token", "times held out"],
        tag="token_embedding",
        global_step=trainer.global_step,
    )


def label(tokenizer: Tokenizer | Numbers, token: int) -> str:
    """A token as a short name in ASCII: _ stands for a space, \\xe9 for a byte that alone is no character."""
    if token == tokenizer.end_of_text:
        return "<end>"
    if isinstance(tokenizer, Numbers):
        return str(token)
    text = tokenizer.decode([token]) if tokenizer.pieces is None else tokenizer.pieces[token].decode(errors=LONE)
    names = ("_" if c == " " else c if "!" <= c <= "~" else ascii(c)[1:-1].replace("\\udc", "\\x") for c in text)
    return "".join(names)[:LONGEST_LABEL]


def _block(text: str) -> str:
    """Text as it is, in Markdown."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _writers(trainer: Trainer) -> Sequence[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def read_curves(run: Path) -> dict[str, Curve]:
    """The curves in a run's folder, by tag; a point that a killed process wrote and a later one again is there once.

    A step is numbered as in TensorBoard: by how many were done before it.
    """
    events = _read(run)
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()[SCALARS]}


def seconds_drawn(run: Path) -> float:
    """How long a run was going: from the start of each of its processes to the last point that it wrote, added up."""
    seconds = 0.0
    for file in run.glob("events.out.tfevents.*"):
        events = _read(file)
        times = [point.wall_time for tag in events.Tags()[SCALARS] for point in events.Scalars(tag)]
        seconds += max(times) - events.FirstEventTimestamp() if times else 0.0
    return seconds


def _read(path: Path) -> EventAccumulator:
    events = EventAccumulator(str(path), size_guidance={SCALARS: 0})
    events.Reload()
    return events
