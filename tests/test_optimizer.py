"""Which optimizer each precision gets, what it clips, and the learning rate of every step."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_FLAGS, fit, small_data, small_model
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from slm.errors import InputError
from slm.run.resume import ExactResume
from slm.training.optimizers import MuonWithAdamW, build_optimizer, cosine_rate, orthogonalized


class Steps(Callback):
    """The learning rate and the norm of the gradient that every optimizer step is taken with."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(torch.nn.utils.get_total_norm(gradients).item())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def scaled(init_scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_without_a_gradient_scaler_one_kernel_steps_all(name: str, precision: Any) -> None:
    trainer = fit(small_model(optimizer=name), max_steps=1, precision=precision, limit_val_batches=0)
    assert [group["fused"] for group in trainer.optimizers[0].param_groups] == [True, True]


def test_under_a_gradient_scaler_none_is_fused_so_that_clipping_sees_the_true_gradient() -> None:
    steps = Steps()
    trainer = fit(
        small_model(), max_steps=3, plugins=[scaled(1024.0)], callbacks=[steps], limit_val_batches=0,
        gradient_clip_val=1e-2,
    )  # fmt: skip
    assert [group["fused"] for group in trainer.optimizers[0].param_groups] == [None, None]
    assert steps.norms == pytest.approx([1e-2] * len(steps.norms), rel=1e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_to_the_norm_asked_for(precision: Any) -> None:
    steps = Steps()
    fit(small_model(), max_steps=4, precision=precision, callbacks=[steps], gradient_clip_val=1e-2)
    assert steps.norms == pytest.approx([1e-2] * 3, rel=1e-3)


def test_gradients_are_clipped_by_value_where_that_is_asked_for() -> None:
    class Greatest(Callback):
        value = 0.0

        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            for p in pl_module.parameters():
                if p.grad is not None:
                    self.value = max(self.value, p.grad.abs().max().item())

    greatest = Greatest()
    clipping = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}
    fit(small_model(), max_steps=3, callbacks=[greatest], **clipping)
    assert greatest.value == pytest.approx(1e-4)


def test_a_run_that_was_fused_goes_on_unfused_under_a_scaler(tmp_path: Path) -> None:
    fit(small_model(), max_steps=2, callbacks=[ExactResume()]).save_checkpoint(tmp_path / "two.ckpt")
    quiet: dict[str, Any] = {
        "callbacks": [ExactResume()],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    trainer = Trainer(accelerator="cpu", max_steps=3, plugins=[scaled(64.0)], **quiet)
    trainer.fit(small_model(), datamodule=small_data(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert trainer.global_step == 3
    assert [group["fused"] for group in trainer.optimizers[0].param_groups] == [False, False]


def test_the_cosine_rises_to_its_peak_and_falls_to_its_end_over_the_steps_of_the_run() -> None:
    steps = Steps()
    asked = {"schedule": "cosine", "warmup_steps": 3, "learning_rate": 0.8, "min_learning_rate": 0.2}
    fit(small_model(**asked), small_data(batch_size=16), max_epochs=2, callbacks=[steps], limit_val_batches=0)
    falling = [0.2 + 0.6 * (1 + math.cos(math.pi * k / 11)) / 2 for k in range(11)]
    assert steps.rates == pytest.approx([0.2, 0.4, 0.6, *falling][: len(steps.rates)])
    assert len(steps.rates) == 14


@pytest.mark.parametrize(
    ("limits", "length"),
    [({"max_steps": 5}, 5), ({"max_steps": 50, "max_epochs": 1}, 7), ({"accumulate_grad_batches": 3}, 6)],
    ids=["steps", "epochs", "accumulation"],
)
def test_the_length_of_the_cosine_is_that_of_the_run(limits: dict[str, int], length: int) -> None:
    steps = Steps()
    hparams = {"schedule": "cosine", "learning_rate": 0.8, "min_learning_rate": 0.0}
    flags = {"max_epochs": 2, "callbacks": [steps], "limit_val_batches": 0, **limits}
    fit(small_model(**hparams), small_data(batch_size=16), **flags)
    expected = [0.4 * (1 + math.cos(math.pi * k / length)) for k in range(length)]
    assert steps.rates == pytest.approx(expected[: len(steps.rates)])


def test_a_cosine_without_an_end_is_refused(refused: Callable[..., str]) -> None:
    flags = ["--model.schedule=cosine", "--trainer.max_epochs=-1", "--model.vocab_size=20", "--data.num_tokens=2000"]
    assert "give --trainer.max_epochs or --trainer.max_steps" in refused(*flags)


def test_a_warm_up_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(InputError, match="warmup_steps=5 has no effect under schedule=plateau"):
        small_model(warmup_steps=5)


def test_a_short_context_that_cannot_be_is_refused(refused: Callable[..., str]) -> None:
    with pytest.raises(InputError, match="short_context_steps=-1 must be at least 0"):
        small_model(short_context_steps=-1)
    with pytest.raises(InputError, match="max_seq_len=18 must be divisible by 4 under short_context_steps=5"):
        small_model(short_context_steps=5, max_seq_len=18)
    flags = [*SMALL_FLAGS, "--model.short_context_steps=8", "--trainer.max_steps=8"]
    assert "short_context_steps=8 must be below the run's own number of steps, 8: give fewer" in refused(*flags)
    assert "give --trainer.max_epochs or --trainer.max_steps" in refused(*flags[:-1], "--trainer.max_epochs=-1")


def test_the_rate_of_a_step_needs_nothing_but_its_number() -> None:
    hparams = {"learning_rate": 1.0, "warmup_steps": 0, "min_learning_rate": 0.1}
    assert cosine_rate(0, 10, hparams) == 1.0
    assert cosine_rate(5, 10, hparams) == pytest.approx(0.55)
    assert cosine_rate(12, 10, hparams) == pytest.approx(0.1)


def parts() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(6))


def both(matrices: list[torch.nn.Parameter], others: list[torch.nn.Parameter]) -> MuonWithAdamW:
    return MuonWithAdamW(
        {"params": matrices, "weight_decay": 0.1}, [{"params": others, "weight_decay": 0.0}], lr=0.1, fused=False
    )


def test_muon_and_adamw_step_each_its_part_as_those_of_torch_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "slm.training.optimizers.fast_dtype", lambda device: torch.bfloat16
    )  # as torch has it everywhere
    matrix, vector = parts()
    optimizer = both([matrix], [vector])
    alone, beside = parts()
    muon = torch.optim.Muon([alone], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([beside], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        for p in (matrix, vector, alone, beside):
            p.grad = torch.full_like(p, 0.1).add_(p.detach(), alpha=step)
        optimizer.step()
        muon.step()
        adamw.step()
    torch.testing.assert_close(matrix, alone, rtol=0, atol=0.01 * 0.1)  # a hundredth of a step
    assert torch.equal(vector, beside)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 4, 6), (2, 3, 6, 4)])
def test_a_matrix_is_orthogonalized_along_its_own_singular_vectors(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.hardware.has_native_bf16", lambda: False)
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    along = u.mT @ orthogonalized(matrices).double() @ vh.mT
    values = along.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.65
    assert values.max() < 1.25
    torch.testing.assert_close(along, torch.diag_embed(values), rtol=0, atol=1e-4)  # which bf16 would not reach


@pytest.mark.parametrize(("is_native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_muon_computes_in_the_type_that_the_processor_multiplies_fast(
    is_native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.hardware.has_native_bf16", lambda: is_native)
    assert orthogonalized(torch.randn(3, 4, 6)).dtype == dtype


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8])
def test_a_gradient_of_almost_nothing_makes_no_step_that_is_not_finite(size: float) -> None:
    torch.manual_seed(0)
    found = orthogonalized(size * torch.randn(3, 6, 4))
    assert found.isfinite().all()
    assert size > 1e-20 or found.abs().max() < 1e-10


def test_muon_leaves_a_matrix_without_a_gradient_as_it_is() -> None:
    matrix, vector = parts()
    before = matrix.detach().clone()
    vector.grad = torch.ones_like(vector)
    both([matrix], [vector]).step()
    assert torch.equal(matrix, before)


def test_a_state_that_was_saved_with_the_muon_of_torch_is_gone_on_from() -> None:
    matrix, vector = parts()
    muon = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    matrix.grad, vector.grad = matrix.detach().cos(), vector.detach().cos()
    muon.step()
    optimizer = both([matrix], [vector])
    optimizer.step()
    older = copy.deepcopy(optimizer.state_dict())
    older["param_groups"][0] = {**muon.state_dict()["param_groups"][0], "lr": 0.05}
    optimizer.load_state_dict(older)
    assert {**optimizer.param_groups[0], "params": None} == {"lr": 0.05, "weight_decay": 0.1, "params": None}
    momentum = optimizer.state[matrix]["momentum_buffer"]
    torch.testing.assert_close(momentum, older["state"][0]["momentum_buffer"])


def test_muon_steps_every_matrix_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 6), (6, 4), (2, 6, 4)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(matrix.detach().clone()) for matrix in together]
    optimizers = [both(together, []), *(both([matrix], []) for matrix in alone)]
    for _ in range(2):
        for matrix in [*together, *alone]:
            matrix.grad = matrix.detach().cos()
        for optimizer in optimizers:
            optimizer.step()
    [experts] = [matrix for matrix in together if matrix.ndim == 3]
    for matrix, other in zip(together, alone, strict=True):
        torch.testing.assert_close(matrix, other, rtol=1e-3, atol=1e-3)
    assert not torch.equal(experts[0], experts[1])


def test_muon_steps_the_matrices_inside_the_network_and_no_embedding() -> None:
    model = small_model(optimizer="muon")
    optimizer = build_optimizer(model.transformer, model.hparams, fused=True)
    names = {id(p): name for name, p in model.transformer.named_parameters()}
    stepped = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    inside = {f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.out", "ff.up", "ff.down")}
    assert stepped[0] == inside
    assert stepped[1] == {"token_embedding.weight", "position_embedding.weight"}
    assert set().union(*stepped) == set(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_muon_goes_on_from_its_saved_state_as_if_it_had_never_stopped() -> None:
    def make() -> tuple[list[torch.nn.Parameter], MuonWithAdamW]:
        matrix, vector = parts()
        groups = {"params": [matrix]}, [{"params": [vector]}]
        return [matrix, vector], MuonWithAdamW(*groups, lr=0.1, fused=True)

    def train(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        for p in parameters:
            p.grad = p.detach().cos()
        optimizer.step()

    parameters, optimizer = make()
    for _ in range(2):
        train(parameters, optimizer)
    resumed, fresh = make()
    for p, q in zip(resumed, parameters, strict=True):
        p.data.copy_(q.data)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((parameters, optimizer), (resumed, fresh)):
        train(*pair)
    assert all(torch.equal(p, q) for p, q in zip(parameters, resumed, strict=True))


def test_a_cosine_does_not_rise_to_its_end() -> None:
    with pytest.raises(InputError, match=r"min_learning_rate=0.1 must be at most learning_rate=0.01"):
        small_model(schedule="cosine", learning_rate=0.01, min_learning_rate=0.1)
