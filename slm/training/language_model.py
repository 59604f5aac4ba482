"""The LightningModule: the Transformer, its loss, metrics, optimizer and learning-rate schedule.

B batch, T time, D embedding, V vocabulary.
"""

import sys
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import SumMetric

from slm.errors import NotFiniteError, check
from slm.hardware import check_can_compile, compile_mode, tell_compiled_code_by_its_vectors
from slm.model.loss import linear_cross_entropy, sum_and_correct
from slm.model.transformer import Transformer
from slm.training.accumulation import AccumulationWindow
from slm.training.hyperparameters import adapt_states, check_applicable, check_ranges
from slm.training.optimizers import build_optimizer, cosine_rate, num_steps, rescheduled, stepped_by

Batch = tuple[Tensor, Tensor]


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
        optimizer: AdamW, Adam, SGD with momentum 0.9, or Muon for the matrices inside the network.
        weight_decay: on matrices only; biases and norms are not decayed.
        schedule: `plateau` lowers the learning rate when the validation loss stalls, `cosine` over the Trainer's steps.
        warmup_steps: optimizer steps, under `cosine`, over which the learning rate first rises from 0.
        plateau_factor: what the learning rate is multiplied by when the validation loss stalls.
        plateau_patience: validations without improvement that are waited for before that.
        min_learning_rate: where the schedule ends.
        compile: whether to train through torch.compile, which needs a C++ compiler or, on a GPU, Triton.

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
        optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adamw",
        weight_decay: float = 0.1,
        schedule: Literal["plateau", "cosine"] = "plateau",
        warmup_steps: int = 0,
        plateau_factor: float = 0.5,
        plateau_patience: int = 2,
        min_learning_rate: float = 1e-5,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_ranges(self.hparams)
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
            for bad in (int(extreme) for extreme in torch.aminmax(tokens)):
                check(0 <= bad < vocab_size, f"token id {bad} is outside the vocabulary of vocab_size={vocab_size}")
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens, targets = batch
        hidden = self.transformer(tokens).flatten(0, 1)  # (BT, D)
        loss = linear_cross_entropy(hidden, self.transformer.token_embedding.weight, targets.flatten())
        if self._is_logging_step:
            self.log("train/loss", loss.detach())  # prog_bar would read it back at every step
        return self._window.weigh(loss, tokens.numel())

    def on_before_backward(self, loss: Tensor) -> None:
        self._window.add_loss(loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the gradient its true scale, and log its norm as it is before clipping.

        Raises:
            NotFiniteError: the loss or the gradient is not finite; a GPU, which is waited for, is asked when it logs.
        """
        window, self._window = self._window, AccumulationWindow()
        gradients = [p.grad for p in stepped_by(optimizer) if p.grad is not None]
        window.rescale(gradients, self.trainer.accumulate_grad_batches)
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if self._is_logging_step or self.device.type == "cpu":
            window.check_finite(self._norm, self._scaler, self.trainer.global_step)
        if self._is_logging_step:
            self.log("train/grad_norm", self._norm)
        if self.hparams["schedule"] == "cosine":
            for group in optimizer.param_groups:
                group["lr"] = cosine_rate(self.trainer.global_step, num_steps(self.trainer), self.hparams)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that is known already; Lightning itself refuses to clip for a fused optimizer."""
        if gradient_clip_algorithm == "value" and gradient_clip_val:
            torch.nn.utils.clip_grad_value_(stepped_by(optimizer), gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(stepped_by(optimizer), gradient_clip_val, self._norm)

    @property
    def _is_logging_step(self) -> bool:
        """Whether Lightning passes on what is logged; each `self.log` costs a third of a millisecond."""
        step, interval = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step == 0 or bool(interval and (step + 1) % interval == 0)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.hparams["compile"]:
            device = self.trainer.strategy.root_device.type
            check_can_compile(device)
            tell_compiled_code_by_its_vectors()
            # gradients lie in a graph's memory, which its next call uses again: none where they are added up or shared
            alone = self.trainer.world_size == self.trainer.accumulate_grad_batches == 1
            can_replay = alone and not rescheduled(self.trainer)
            self.transformer.compile(mode=compile_mode(device, self.transformer) if can_replay else None)

    def on_train_start(self) -> None:
        self._window = AccumulationWindow()
        if self.hparams["schedule"] == "cosine":
            num_steps(self.trainer)  # which refuses a run without an end

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        tokens, targets = batch
        hidden = self.transformer(tokens).flatten(0, 1)  # (BT, D)
        loss, correct = sum_and_correct(hidden, self.transformer.token_embedding.weight, targets.flatten())
        self.loss_sum.update(loss)
        self.num_correct.update(correct)
        self.num_tokens.update(targets.numel())

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        loss = self._log_evaluation("val")
        is_fitting = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if is_fitting and isinstance(scheduler := self.lr_schedulers(), ReduceLROnPlateau):
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
        optimizer = build_optimizer(self.transformer, hparams, fused=self._scaler is None)
        if hparams["schedule"] == "cosine":
            return optimizer
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

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """That of float16; under it no optimizer is fused, which would leave gradients scaled when they are clipped."""
        return getattr(self.trainer.precision_plugin, "scaler", None) if self._trainer is not None else None

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
        check_applicable(checkpoint["hyper_parameters"], self.hparams)
        adapt_states(checkpoint, self.hparams, fused=self._scaler is None)
