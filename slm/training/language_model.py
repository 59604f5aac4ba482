"""The LightningModule: the network, its loss, metrics, optimizer and learning-rate schedule.

B batch, T time, D embedding, V vocabulary.
"""

import inspect
import math
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torchmetrics import SumMetric

from slm.errors import check
from slm.hardware import check_can_compile, compile_mode, tell_compiled_code_by_its_vectors
from slm.model.loss import linear_cross_entropy, sum_and_correct
from slm.model.transformer import Transformer
from slm.training.hyperparameters import PARTS, check_ranges, parameters_of
from slm.training.optimizers import build_optimizer, cosine_rate, num_steps, stepped_by
from slm.training.shards import is_sharded, recompute_activations, shard, whole
from slm.training.step import FiniteGuard, Step, is_logged

Batch = tuple[Tensor, Tensor]


class LanguageModel(LightningModule):
    """A causal language model that trains itself under any Trainer.

    A batch is (tokens (B, T), targets (B, T)), int64, the targets being the tokens one position later. A subclass
    swaps the network by setting `network`, or the loss by overriding `loss`; its own options join the others.

    Args:
        learning_rate: the highest; it falls from here by the schedule.
        optimizer: AdamW, Adam, SGD with momentum 0.9, or Muon for the matrices inside the network.
        weight_decay: on matrices and embeddings; biases and norms are not decayed.
        schedule: `plateau` lowers the learning rate when the validation loss stalls, `cosine` over the Trainer's steps.
        warmup_steps: optimizer steps over which the learning rate first rises from near 0, under `cosine`.
        short_context_steps: optimizer steps in which each window is read as four of a quarter of its length, which
            costs less attention; what can be learned from the nearest tokens comes first. Learned positions beyond a
            quarter are not trained until then. It needs a run that has an end, after these steps. Under `compile` the
            whole windows run through code for windows of any size, whose speed was not measured.
        plateau_factor: what the learning rate is multiplied by when the validation loss stalls.
        plateau_patience: how many validations in a row may bring no improvement; the next one without lowers it.
        min_learning_rate: down to which a schedule lowers the learning rate.
        compile: whether to train through torch.compile, which needs a C++ compiler or, on a GPU, Triton.
        activation_checkpointing: whether what a block computes is not kept for the backward pass but computed again
            there (Chen et al., 2016): about a third more work, for much less memory.
        options: those of the network.

    Raises:
        InputError: a value out of its range.
    """

    network: ClassVar[type[Transformer]] = Transformer

    def __init__(
        self,
        learning_rate: float = 1e-3,
        optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adamw",
        weight_decay: float = 0.1,
        schedule: Literal["plateau", "cosine"] = "plateau",
        warmup_steps: int = 0,
        short_context_steps: int = 0,
        plateau_factor: float = 0.5,
        plateau_patience: int = 2,
        min_learning_rate: float = 1e-5,
        compile: bool = False,
        activation_checkpointing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # of a subclass too
        self.save_hyperparameters({**self.network_options(), **options})
        check_ranges(self.hparams)
        self.transformer = self.network(**options)
        if activation_checkpointing:
            recompute_activations(self.transformer.blocks)
        # not MeanMetric, which leaves a NaN out of the mean or, with nan_strategy="disable", ignores weights (1.9)
        with torch.device("cpu"):  # where the network is on the meta device too
            self.loss_sum = SumMetric(nan_strategy="disable")
            self.num_correct = SumMetric(nan_strategy="disable")
            self.num_tokens = SumMetric(nan_strategy="disable")
        self._step, self._guard = Step(), FiniteGuard(raises_at_once=True)
        self._num_steps = math.inf  # not known before the training begins

    @classmethod
    def signature(cls) -> inspect.Signature:
        """All options of the network and of the training: what a command line can set."""
        return inspect.Signature(list((parameters_of(cls.network) | parameters_of(cls)).values()))

    @classmethod
    def network_options(cls) -> dict[str, Any]:
        """The options of the network with their defaults."""
        return {name: parameter.default for name, parameter in parameters_of(cls.network).items()}

    @classmethod
    def fixed_options(cls) -> set[str]:
        """The options that trained weights depend on, and that therefore cannot change."""
        return cls.network_options().keys() - cls.network.changeable_options

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        return self.transformer.logits(self.transformer(tokens))

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """What training minimizes: the mean cross-entropy, in nats, of hidden states (N, D) and targets (N,).

        Validation and test measure the cross-entropy whatever a subclass minimizes, so that models compare.
        """
        return linear_cross_entropy(hidden, self.transformer.output_weight, targets)

    # ---- training

    def on_train_start(self) -> None:
        is_unfused = is_sharded(self.transformer) and self.hparams["optimizer"] == "sgd"  # and cannot skip a step
        self._step, self._guard = Step(), FiniteGuard(raises_at_once=self.device.type == "cpu" or is_unfused)
        if (short := self.hparams["short_context_steps"]) > 0 and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            end = num_steps(self.trainer)
            remedy = "give fewer with --model.short_context_steps, or more with --trainer.max_steps"
            limit = f"must be below the run's own number of steps, {end}"
            check(short < end, f"short_context_steps={short} {limit}: {remedy}")
        if isinstance(schedule := self.lr_schedulers(), LambdaLR):
            self._num_steps = num_steps(self.trainer)  # a resumed run may have been given another end
            schedule.last_epoch = self.trainer.global_step  # which counts steps here
            for group in schedule.optimizer.param_groups:
                group["lr"] = self._cosine(schedule.last_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens, targets = batch
        (here, on_all), seq_len = self._windows_in(batch_idx, tokens, is_training=True), tokens.shape[1]
        if self.trainer.global_step < self.hparams["short_context_steps"]:
            tokens = tokens.reshape(-1, seq_len // PARTS)
        hidden = self.transformer(tokens).flatten(0, 1)  # (BT, D)
        loss = self.loss(hidden, targets.flatten())
        return self._step.add(loss, here * seq_len, self.trainer.world_size, on_all * seq_len)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the gradient its true scale, and log its norm as it is before clipping.

        Raises:
            NotFiniteError: the loss or the gradient is not finite. On a GPU this is only raised at the next logged
                step or validation, or at the end; until then every step is skipped.
        """
        step, self._step = self._step, Step()
        gradients = [p.grad for p in stepped_by(optimizer) if p.grad is not None]
        step.rescale(gradients, self.trainer.accumulate_grad_batches)
        self._norm = whole(torch.nn.utils.get_total_norm(gradients))
        number = self.trainer.global_step + 1
        is_logged_step = number == 1 or is_logged(self.trainer, number)  # the progress bar shows the first
        self._guard.check(step.mean_loss(), self._norm, number - 1, self._scaler, optimizer, is_logged_step)
        if is_logged_step:
            self.log("train/loss", step.mean_loss(), sync_dist=True)  # prog_bar would read it back at every step
            self.log("train/grad_norm", self._norm)

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

    def on_train_end(self) -> None:
        self._guard.look()

    # ---- evaluation

    def on_validation_start(self) -> None:
        self._guard.look()

    def on_validation_epoch_start(self) -> None:
        for metric in (self.loss_sum, self.num_correct, self.num_tokens):
            metric.reset()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        tokens, targets = batch
        hidden = self.transformer(tokens).flatten(0, 1)  # (BT, D)
        loss, correct = sum_and_correct(hidden, self.transformer.output_weight, targets.flatten())
        here, _ = self._windows_in(batch_idx, tokens, is_training=False)
        if here:
            self.loss_sum.update(loss)
            self.num_correct.update(correct)
            self.num_tokens.update(targets.numel())

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log what was evaluated, and lower the learning rate where the loss has stalled."""
        loss = self._log_evaluation("val")
        is_fitting = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if is_fitting and isinstance(schedule := self.lr_schedulers(), ReduceLROnPlateau):
            schedule.step(loss)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> Tensor:
        """Over all tokens, on all devices; the mean of the batches' perplexities would be another one."""
        num_tokens = self.num_tokens.compute()
        loss, accuracy = self.loss_sum.compute() / num_tokens, self.num_correct.compute() / num_tokens
        self.log(f"{split}/loss", loss, prog_bar=True, sync_dist=True)
        self.log_dict({f"{split}/perplexity": loss.exp(), f"{split}/accuracy": accuracy}, sync_dist=True)
        return loss

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The greedy next token (B,) after each window."""
        hidden = self.transformer(batch[0])  # (B, T, D)
        return self.transformer.logits(hidden[:, -1]).argmax(-1)

    # ---- optimizer and schedule

    def configure_optimizers(self) -> Any:
        hparams = self.hparams
        optimizer = build_optimizer(self.transformer, hparams, fused=self._scaler is None)
        if hparams["schedule"] == "cosine":
            for group in optimizer.param_groups:
                group["lr"] = 1.0  # LambdaLR multiplies it by `_cosine`, which gives the learning rate itself
            return [optimizer], [{"scheduler": LambdaLR(optimizer, self._cosine), "interval": "step"}]
        schedule = ReduceLROnPlateau(
            optimizer,
            factor=hparams["plateau_factor"],
            patience=hparams["plateau_patience"],
            min_lr=hparams["min_learning_rate"],
        )
        return [optimizer], [{"scheduler": schedule, "monitor": "val/loss", "strict": False}]

    def _cosine(self, step: int) -> float:
        return cosine_rate(step, self._num_steps, self.hparams)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Called by Lightning after each step for the cosine, after each epoch for the plateau.

        For the plateau that is too late, since the epoch's checkpoint is written by then, and too seldom where an epoch
        has several validations: `on_validation_epoch_end` steps it.
        """
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    # ---- devices

    def _windows_in(self, batch_idx: int, tokens: Tensor, is_training: bool) -> tuple[int, int]:
        """How many windows of a batch count on this device, and how many on all devices together.

        A DataLoader that is not of ours is taken to give each device as many, as Lightning's samplers do.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.trainer.world_size > 1 and hasattr(data, "windows_in"):
            here, on_all = data.windows_in(batch_idx, is_training)
            return here, on_all
        return len(tokens), len(tokens) * self.trainer.world_size

    def setup(self, stage: str) -> None:
        self.trainer.precision_plugin.convert_module(self)  # else a checkpoint's 64 bits are loaded into 32
        device = self.trainer.strategy.root_device.type
        for metric in (self.loss_sum, self.num_correct, self.num_tokens):  # the order of batches is not to be seen
            metric.set_dtype(torch.float32 if device == "mps" else torch.float64)
        if stage == "fit" and self.hparams["compile"]:
            check_can_compile(device)
            tell_compiled_code_by_its_vectors()
            if self.device_mesh is not None:  # inside the hooks of their calls, which gather their weights
                for block in self.transformer.blocks:
                    block.forward = torch.compile(block.forward)
                return
            # a CUDA graph's next call overwrites its gradients, which accumulation and other GPUs still need
            can_use_graphs = self.trainer.world_size == self.trainer.accumulate_grad_batches == 1
            self.transformer.compile(mode=compile_mode(device, self.transformer) if can_use_graphs else None)

    def configure_model(self) -> None:
        """Share the weights out where the strategy, `fsdp2`, has a mesh of devices; Lightning may call this again."""
        if self.device_mesh is not None and not is_sharded(self.transformer):
            shard(self.transformer, self.device_mesh["data_parallel"])

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse an id outside the vocabulary while it is on the host, where the error can still name it."""
        vocab_size = self.hparams["vocab_size"]
        for tokens in batch:
            for bad in (int(extreme) for extreme in torch.aminmax(tokens)):
                check(0 <= bad < vocab_size, f"token id {bad} is outside the vocabulary of vocab_size={vocab_size}")
        return batch

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of float16, if any. With it no optimizer is fused: gradients would be clipped while scaled."""
        return getattr(self.trainer.precision_plugin, "scaler", None)
