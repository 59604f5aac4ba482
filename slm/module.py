"""The LightningModule: the Transformer, its loss, metrics, optimizer and learning-rate schedule.

B batch, T time, D embedding, V vocabulary.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import SumMetric

from slm.accumulation import AccumulationWindow
from slm.checkpoint import load_weights, open_checkpoint
from slm.errors import InputError, NotFiniteError, check
from slm.transformer import Transformer

Batch = tuple[Tensor, Tensor]

FIXED = ("vocab_size", "embed_dim", "num_heads", "num_layers", "hidden_dim", "max_seq_len", "optimizer")
"""Hyper-parameters that the weights or the optimizer's state in a checkpoint are tied to."""


class LanguageModel(LightningModule):
    """A causal Transformer language model that trains itself under any Trainer.

    A batch is (tokens (B, T), targets (B, T)), int64, the targets being the tokens one position later.

    Args:
        vocab_size: number of token ids.
        embed_dim: width of the residual stream.
        num_heads: attention heads in a layer; divides embed_dim.
        num_layers: blocks of attention and feed-forward.
        hidden_dim: width of the feed-forward layer.
        max_seq_len: longest sequence, in tokens.
        dropout: probability of dropping a value, in embedding, attention and residual branches.
        learning_rate: where the schedule starts.
        optimizer: AdamW, Adam, or SGD with momentum 0.9.
        weight_decay: on matrices only; biases and norms are not decayed.
        plateau_factor: what the learning rate is multiplied by when the validation loss stalls.
        plateau_patience: validations without improvement that are waited for before that.
        min_learning_rate: where the schedule ends.

    Raises:
        InputError: a value out of its range.
    """

    def __init__(
        self,
        vocab_size: int = 10_000,
        embed_dim: int = 128,
        num_heads: int = 4,
        num_layers: int = 2,
        hidden_dim: int = 512,
        max_seq_len: int = 128,
        dropout: float = 0.0,
        learning_rate: float = 1e-3,
        optimizer: Literal["adamw", "adam", "sgd"] = "adamw",
        weight_decay: float = 0.1,
        plateau_factor: float = 0.5,
        plateau_patience: int = 2,
        min_learning_rate: float = 1e-5,
    ) -> None:
        super().__init__()
        largest = torch.finfo(torch.float32).max
        check(0 < learning_rate < largest, f"learning_rate={learning_rate} must be above 0 and below {largest:.1e}")
        check(optimizer in ("adamw", "adam", "sgd"), f"optimizer={optimizer} must be adamw, adam or sgd")
        check(weight_decay >= 0, f"weight_decay={weight_decay} must be at least 0")
        check(0 < plateau_factor < 1, f"plateau_factor={plateau_factor} must be above 0 and below 1")
        check(plateau_patience >= 0, f"plateau_patience={plateau_patience} must be at least 0")
        check(min_learning_rate >= 0, f"min_learning_rate={min_learning_rate} must be at least 0")
        self.save_hyperparameters()
        self.transformer = Transformer(vocab_size, embed_dim, num_heads, num_layers, hidden_dim, max_seq_len, dropout)
        # sums, because MeanMetric leaves a NaN out of the mean or, told not to (torchmetrics 1.9), the weights
        self.loss_sum = SumMetric(nan_strategy="disable")
        self.num_correct = SumMetric(nan_strategy="disable")
        self.num_tokens = SumMetric(nan_strategy="disable")
        self._window = AccumulationWindow()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        return self.transformer.logits(self.transformer(tokens))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse an id outside the vocabulary while it is on the host, where the error can still name it."""
        vocab_size = self.hparams["vocab_size"]
        for tokens in batch:
            for bad in tokens[(tokens < 0) | (tokens >= vocab_size)][:1].tolist():
                raise InputError(f"token id {bad} is outside the vocabulary of vocab_size={vocab_size}")
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens, targets = batch
        loss = F.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())
        self.log("train/loss", loss, prog_bar=True)
        return self._window.weigh(loss, tokens.numel())

    def on_before_backward(self, loss: Tensor) -> None:
        self._window.add_loss(loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the gradient its true scale, and log its norm as it is before clipping.

        Raises:
            NotFiniteError: the loss or the gradient is not finite.
        """
        window, self._window = self._window, AccumulationWindow()
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        window.rescale(gradients, self.trainer.accumulate_grad_batches)
        norm = torch.nn.utils.get_total_norm(gradients)
        window.check_finite(norm, getattr(self.trainer.precision_plugin, "scaler", None), self.trainer.global_step)
        self.log("train/grad_norm", norm)

    def on_train_start(self) -> None:
        self._window = AccumulationWindow()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        tokens, targets = batch
        logits, targets = self(tokens).flatten(0, 1).float(), targets.flatten()  # (BT, V), (BT,)
        self.loss_sum.update(F.cross_entropy(logits, targets, reduction="sum"))
        self.num_correct.update((logits.argmax(-1) == targets).sum())
        self.num_tokens.update(targets.numel())

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        loss = self._log_evaluation("val")
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            scheduler = self.lr_schedulers()
            assert isinstance(scheduler, ReduceLROnPlateau)
            scheduler.step(loss)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def mean_loss(self) -> Tensor:
        """Mean loss over all tokens evaluated since the evaluation began, on all devices, in nats."""
        return self.loss_sum.compute() / self.num_tokens.compute()

    def _log_evaluation(self, split: str) -> Tensor:
        loss, accuracy = self.mean_loss(), self.num_correct.compute() / self.num_tokens.compute()
        self.log(f"{split}/loss", loss, prog_bar=True, sync_dist=True)
        self.log_dict({f"{split}/perplexity": loss.exp(), f"{split}/accuracy": accuracy}, sync_dist=True)
        for metric in (self.loss_sum, self.num_correct, self.num_tokens):
            metric.reset()
        return loss

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The greedy next token (B,) after each window."""
        hidden = self.transformer(batch[0])  # (B, T, D)
        return self.transformer.logits(hidden[:, -1]).argmax(-1)

    def configure_optimizers(self) -> Any:
        hparams = self.hparams
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": hparams["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        learning_rate = hparams["learning_rate"]
        optimizer: torch.optim.Optimizer
        if hparams["optimizer"] == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=learning_rate)
        elif hparams["optimizer"] == "adam":
            optimizer = torch.optim.Adam(groups, lr=learning_rate)
        else:
            optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
        scheduler = ReduceLROnPlateau(
            optimizer,
            factor=hparams["plateau_factor"],
            patience=hparams["plateau_patience"],
            min_lr=hparams["min_learning_rate"],
        )
        # Lightning would step it once an epoch and after the checkpoint is written: an interval that never comes
        # leaves that to on_validation_epoch_end, which runs at every validation and before
        schedule = {"scheduler": scheduler, "monitor": "val/loss", "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to replace a sound checkpoint by one that is not.

        Raises:
            NotFiniteError: a weight is not finite.
        """
        for name, weights in checkpoint["state_dict"].items():
            if not torch.isfinite(weights).all():
                raise NotFiniteError(f"step {self.trainer.global_step}: {name}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let this module's hyper-parameters win over the stored ones.

        Raises:
            InputError: a hyper-parameter that the stored weights or optimizer state are tied to differs.
        """
        stored = checkpoint["hyper_parameters"]
        check_applicable(stored, self.hparams)
        changed = {name for name, value in self.hparams.items() if stored.get(name, value) != value}
        for state in checkpoint.get("optimizer_states", []):
            matrices, vectors = state["param_groups"]
            if "weight_decay" in changed:
                matrices["weight_decay"] = self.hparams["weight_decay"]
            if "learning_rate" in changed:
                matrices["lr"] = vectors["lr"] = self.hparams["learning_rate"]
        for schedule in checkpoint.get("lr_schedulers", []):
            for name, entry in (("plateau_factor", "factor"), ("plateau_patience", "patience")):
                if name in changed:
                    schedule[entry] = self.hparams[name]
            if "learning_rate" in changed:
                schedule["_last_lr"] = [self.hparams["learning_rate"]] * len(schedule["_last_lr"])
            if "min_learning_rate" in changed:
                schedule["min_lrs"] = [self.hparams["min_learning_rate"]] * len(schedule["min_lrs"])


def check_applicable(stored: dict[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise InputError where hyper-parameters that a checkpoint is tied to differ from those asked for."""
    for name in FIXED:
        check(
            stored.get(name) == asked[name],
            f"{name}={asked[name]} cannot apply to a checkpoint trained with {name}={stored.get(name)}: "
            "leave it out, or start a new run without --ckpt_path",
        )


def load(ckpt_path: str | Path) -> LanguageModel:
    """A trained model in eval mode, on the CPU.

    Args:
        ckpt_path: `last` or `best` (of the newest run under `runs/`), a run folder (its best), a `.ckpt` or a `.pt`.

    Raises:
        InputError: there is no such checkpoint, or it is damaged or foreign.
    """
    path, content = open_checkpoint(ckpt_path, prefer="best")
    try:
        with torch.random.fork_rng(devices=[]):  # a new model draws its weights from the caller's random numbers
            model = LanguageModel(**content["hyper_parameters"])
    except TypeError as error:
        raise InputError(f"{path} does not fit this version of the model: {error}") from error
    load_weights(model.transformer, content, path)
    return model.eval()
