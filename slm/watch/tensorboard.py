"""What a run shows in TensorBoard beside its curves: texts that it writes, what it attends to, its embedding.

B batch, T time, H heads, L layers, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from slm.data.text_stream import Numbers, TextStream, stored_tokenizer
from slm.data.token_data import TokenData
from slm.data.tokenizer import Tokenizer
from slm.messages import say
from slm.model.sampling import Sampler, decode
from slm.model.transformer import Transformer, causal_weights
from slm.run.resume import is_fitting
from slm.watch.drawing import attention_image

LARGEST_SHARE_OF_TIME = 0.006
"""What watching validations may cost; the end takes the rest of a hundredth of a run of half a minute."""
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 16, 64
ATTENDING_TOKENS = 16
EMBEDDED_TOKENS = 500
LONGEST_LABEL = 12
LONE = "surrogateescape"
"""How Python keeps bytes that are no character."""


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

    A validation is passed over where watching it would bring what was spent on that above its share of the
    time; the first one never is, unless its loss is not finite. It draws no random numbers but its own, so a run is
    the same with and without it.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._start = time.monotonic()
        self._spent = self._last_cost = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        allowed = LARGEST_SHARE_OF_TIME * (time.monotonic() - self._start)
        is_sound = bool(torch.as_tensor(trainer.callback_metrics["val/loss"]).isfinite())
        if not is_fitting(trainer) or not is_sound or self._spent + self._last_cost > allowed:
            return
        start = time.monotonic()
        for writer in _writers(trainer):
            if self.watch.samples:
                writer.add_text("samples", self._samples(trainer, pl_module), trainer.global_step)
            if self.watch.attention:
                self._show_attention(trainer, pl_module, writer)
        self._last_cost = time.monotonic() - start
        self._spent += self._last_cost

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.watch.embedding:
            try:
                for writer in _writers(trainer):
                    _show_embedding(trainer, pl_module, writer)
            except OSError as error:
                say(f"the embedding cannot be written: {error.strerror}")

    def _samples(self, trainer: Trainer, module: Any) -> str:
        """In Markdown: the beginnings of held-out windows, and how the model goes on with them."""
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
        return "\n\n---\n\n".join(shown)

    def _show_attention(self, trainer: Trainer, module: Any, writer: Any) -> None:
        data: TokenData = trainer.datamodule  # type: ignore[attr-defined]
        assert data.val_windows is not None
        tokens = data.val_windows[0][0][:ATTENDING_TOKENS]
        tokenizer = stored_tokenizer(data.tokenizer, data.hparams["vocab_size"])
        names = [label(tokenizer, token) for token in tokens.tolist()]
        for layer, weights in enumerate(attention(module.transformer, tokens.to(module.device)), start=1):
            picture = np.asarray(attention_image(weights.cpu(), names, f"layer {layer}"))
            writer.add_image(f"attention/layer_{layer}", picture, trainer.global_step, dataformats="HWC")


@torch.inference_mode()
def attention(transformer: Transformer, tokens: Tensor) -> list[Tensor]:
    """How much each token of a sequence (T,) attends to each one up to it, (H, T, T) of every layer, in fp32."""
    was_training = transformer.training
    transformer.eval()
    x = transformer.token_embedding(tokens[None]) + transformer.position_embedding.weight[: len(tokens)]  # (1, T, D)
    weights = []
    for block in transformer.blocks:
        q, k, _ = block.attn.heads(block.attn_norm(x))  # type: ignore[operator, union-attr]
        weights.append(causal_weights(q, k)[0].float())
        x = block(x)
    transformer.train(was_training)
    return weights


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
