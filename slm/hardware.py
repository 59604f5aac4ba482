"""What this machine can do."""

import torch

from slm.errors import InputError


def has_native_bf16() -> bool:
    """Whether this processor has instructions for bf16 arithmetic; without them bf16 is slower than 32-bit."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())  # torch before 2.12


def accelerator_kind(asked: str) -> str:
    """The Trainer's accelerator flag resolved to what is there: `cuda`, `mps`, `cpu`, or another as it is.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found = next((kind for kind, is_there in there.items() if is_there), None)
    if (asked == "gpu" and found is None) or not there.get(asked, True):
        raise InputError(f"trainer.accelerator={asked}: torch finds none on this machine; leave it out, or use cpu")
    return (found or "cpu") if asked in ("auto", "gpu") else asked


def resolve_precision(asked: str, accelerator: str) -> tuple[str, str | None]:
    """What `16-mixed` means on this accelerator, and why in one line; None where it is taken as asked.

    float16 needs a gradient scaler, which is made for CUDA alone.
    """
    if asked not in ("16-mixed", "16"):
        return asked, None
    if accelerator == "cpu" and has_native_bf16():
        return "bf16-mixed", "precision 16-mixed becomes bf16-mixed: this CPU computes natively in bf16, not in float16"
    if accelerator == "cpu":
        return "32-true", "precision 16-mixed becomes 32-true: this CPU has no native 16-bit arithmetic"
    if accelerator == "mps":
        return "32-true", "precision 16-mixed becomes 32-true: its gradient scaling works on CUDA alone, not on MPS"
    return asked, None
