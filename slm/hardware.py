"""What this machine can do."""

import ctypes
import platform

import torch

from slm.errors import InputError

MALLOPT = {"M_MMAP_THRESHOLD": (-3, 2**25), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 64 * 2**20)}
"""Parameters of glibc's mallopt, with the values that let it keep what was freed."""
LARGEST_MMAP_THRESHOLD = 2**30
"""Refused by older versions of glibc, which take no more than the value above."""

LARGEST_GRAPH = 10_000_000
"""Parameters of the largest network that is replayed as a CUDA graph."""


def keep_freed_memory() -> None:
    """Let glibc's allocator give freed memory to the next tensor, not back to the system; elsewhere nothing changes.

    Each new page costs a page fault: with the default model on two cores a step took 177 ms and not 190 to 212.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in MALLOPT.values():
            mallopt(parameter, value)
        mallopt(MALLOPT["M_MMAP_THRESHOLD"][0], LARGEST_MMAP_THRESHOLD)


def check_can_compile(device: str) -> None:
    """Raise InputError where torch.compile lacks what it compiles with: a C++ compiler, or on CUDA Triton."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    remedy = "or leave out --model.compile"
    if device == "cuda":
        if not has_triton():
            raise InputError(f"model.compile=True: torch.compile needs Triton on this GPU: install it, {remedy}")
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        message = f"model.compile=True: no C++ compiler on this machine: install one (g++, clang++), {remedy}"
        raise InputError(message) from error


def compile_mode(device: str, network: torch.nn.Module) -> str | None:
    """The mode of torch.compile: on CUDA a small network, whose kernels end sooner than the processor can start the
    next, is replayed as one CUDA graph. Chosen by reasoning: it has not been measured on a GPU.
    """
    is_small = sum(parameter.numel() for parameter in network.parameters()) <= LARGEST_GRAPH
    return "reduce-overhead" if device == "cuda" and is_small else None


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
        raise InputError(f"accelerator={asked}: torch finds none on this machine; leave it out, or use cpu")
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
