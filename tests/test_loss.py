"""The loss from hidden states against `F.linear` and `F.cross_entropy`, and what it holds in memory."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slm.model import loss as slm_loss
from slm.model.loss import linear_cross_entropy, sum_and_correct

DEVICES = ["cpu", "cpu as a GPU", pytest.param("cuda", marks=pytest.mark.gpu)]
"""The second takes a GPU's path on the CPU, so that it is held to the same on a machine without one."""


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slm_loss, "CHUNK_ELEMENTS", 7 * 50)
    monkeypatch.setattr(slm_loss, "CHUNK_ELEMENTS_ON_A_GPU", 7 * 50)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu as a GPU":
        monkeypatch.setattr(slm_loss, "_is_on_cpu", lambda tensor: False)
    return str(request.param).partition(" ")[0]


def inputs(num: int = 24, vocab_size: int = 50, spread: float = 1.0, device: str = "cpu") -> tuple[Tensor, ...]:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) * spread for n in (num, vocab_size))
    targets = torch.randint(vocab_size, (num,), generator=generator)
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), targets.to(device)


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def values_and_gradients(
    loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0
) -> list[Tensor]:
    value = loss(hidden, weight, targets)
    return [value.detach(), *torch.autograd.grad(value * scale, (hidden, weight))]


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_it_equals_the_whole_logits_in_value_and_both_gradients(spread: float, device: str) -> None:
    given = inputs(spread=spread, device=device)
    ours, theirs = (values_and_gradients(loss, *given) for loss in (linear_cross_entropy, whole))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_equals_the_whole_logits_to_the_precision_of_its_type(
    dtype: torch.dtype, device: str
) -> None:
    hidden, weight, targets = inputs(spread=0.5, device=device)
    exact = values_and_gradients(whole, hidden, weight, targets)
    with torch.autocast(device, dtype):
        ours = values_and_gradients(linear_cross_entropy, hidden, weight, targets)
    assert [value.dtype for value in ours] == [torch.float32] * 3
    for mine, other in zip(ours, exact, strict=True):
        assert (mine - other).norm() <= 1e-2 * other.norm()


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("spread", [1.2, 1.6, 2.0])
def test_a_confident_model_has_the_loss_and_the_gradients_of_its_logits(spread: float, device: str) -> None:
    hidden, weight, _ = (value.detach().bfloat16() for value in inputs(spread=spread, device=device))
    targets = (hidden @ weight.T).argmax(-1)
    low = hidden.requires_grad_(), weight.requires_grad_()
    ours = values_and_gradients(linear_cross_entropy, *low, targets)
    reference = values_and_gradients(whole, *low, targets)
    exact = values_and_gradients(whole, *(value.detach().float().requires_grad_() for value in low), targets)
    assert exact[0] < 0.6
    for mine, other, true in zip(ours, reference, exact, strict=True):
        assert (mine.float() - true).norm() <= max(1e-2 * true.norm(), 1.5 * (other.float() - true).norm())


def test_hidden_states_in_bf16_get_gradients_in_bf16() -> None:
    hidden, weight, targets = inputs(spread=0.5)
    low = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        _, grad_hidden, grad_weight = values_and_gradients(linear_cross_entropy, low, weight, targets)
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)
    exact = values_and_gradients(whole, hidden, weight, targets)[1]
    assert (grad_hidden.float() - exact).norm() <= 1e-2 * exact.norm()


def test_its_gradients_are_those_of_finite_differences() -> None:
    hidden, weight, targets = (value.double() if value.is_floating_point() else value for value in inputs(num=9))
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight))


def test_a_tied_weight_gets_the_gradients_of_both_its_uses() -> None:
    _, table, targets = inputs()
    tokens = targets.roll(1)
    tied, separate = (loss(F.embedding(tokens, table).tanh(), table, targets) for loss in (linear_cross_entropy, whole))
    mine, other = (torch.autograd.grad(loss, table)[0] for loss in (tied, separate))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_target_whose_probability_rounds_to_nothing_has_its_true_loss(dtype: torch.dtype, device: str) -> None:
    given = inputs(device=device)[0]
    hidden, weight = given.new_tensor([[1.0]], dtype=dtype), given.new_tensor([[200.0], [-200.0], [0.0]], dtype=dtype)
    targets = torch.arange(3, device=device)
    losses = [linear_cross_entropy(hidden, weight, target[None]).item() for target in targets]
    assert losses == [0.0, 400.0, 200.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_exponential_of_the_largest_small_logit_overflows(sign: float, dtype: torch.dtype) -> None:
    hidden = torch.full((24, 15), 2.0 * sign, dtype=dtype, requires_grad=True)
    weight = torch.full((10_000, 15), 2.0, dtype=dtype, requires_grad=True)
    assert not slm_loss._has_small_logits(hidden * 1.01, weight)
    hidden = (hidden * 0.99).detach().requires_grad_()
    assert slm_loss._has_small_logits(hidden, weight)
    given = hidden, weight, torch.arange(24)
    for mine, other in zip(*(values_and_gradients(f, *given) for f in (linear_cross_entropy, whole)), strict=True):
        torch.testing.assert_close(mine.float(), other.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("vocab_size", [99, 100, 250])
def test_rows_of_16_bits_are_summed_whole(vocab_size: int) -> None:
    rows = torch.rand(5, vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums = slm_loss._sum_of_rows(rows)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, rows.float().sum(-1), rtol=4e-3, atol=0.0)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad: float, device: str) -> None:
    hidden, weight, targets = inputs(device=device)
    with torch.no_grad():
        hidden[10, 3] = bad
    loss, grad_hidden, grad_weight = values_and_gradients(linear_cross_entropy, hidden, weight, targets)
    assert not loss.isfinite()
    assert not grad_hidden.isfinite().all()
    assert not grad_weight.isfinite().all()


def test_a_gradient_scaler_keeps_gradients_that_float16_alone_would_lose() -> None:
    hidden, weight, targets = inputs(num=4096, spread=0.02)
    exact = values_and_gradients(whole, hidden, weight, targets)
    with torch.autocast("cpu", torch.float16):
        scaled = values_and_gradients(linear_cross_entropy, hidden, weight, targets, scale=65536.0)
    for mine, other in zip(scaled[1:], exact[1:], strict=True):
        assert (mine / 65536.0 - other).norm() <= 1e-2 * other.norm()


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_evaluation_gives_the_sum_and_the_hits_of_the_whole_logits(device: str) -> None:
    hidden, weight, targets = inputs(device=device)
    logits = F.linear(hidden, weight)
    targets[::2] = logits.argmax(-1)[::2]
    loss, correct = sum_and_correct(hidden, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="sum").detach(), rtol=1e-5, atol=1e-5)
    assert correct.item() == (logits.argmax(-1) == targets).sum().item()


class Calls(TorchDispatchMode):
    """Notes the name of every operation, and the shape of each tensor that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        shapes = [tuple(value.shape) for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.results += [(func._schema.name, shape) for shape in shapes or [()]]
        return result

    @property
    def largest(self) -> int:
        return max(math.prod(shape) for _, shape in self.results)


@pytest.mark.parametrize("vocab_size", [50, 400])
def test_no_tensor_is_larger_than_a_chunk_or_the_weight(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slm_loss, "CHUNK_ELEMENTS", 800)
    hidden, weight, targets = inputs(num=200, vocab_size=vocab_size)
    with Calls() as seen:
        values_and_gradients(linear_cross_entropy, hidden, weight, targets)
        sum_and_correct(hidden, weight, targets)
    assert seen.largest == max(800, weight.numel(), hidden.numel())
    with Calls() as seen:
        values_and_gradients(whole, hidden, weight, targets)
    assert seen.largest == 200 * vocab_size


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
def test_a_gpu_multiplies_whole_columns_and_is_waited_for_nowhere(device: str) -> None:
    given = inputs(device=device)
    with Calls() as seen:
        values_and_gradients(linear_cross_entropy, *given)
        sum_and_correct(*given)
    sizes = {size for name, shape in seen.results if name in ("aten::mm", "aten::addmm_") for size in shape}
    assert 64 in sizes
    assert 50 not in sizes
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & {name for name, _ in seen.results}
