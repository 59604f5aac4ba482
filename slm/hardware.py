"""What this machine can do."""

import contextlib
import ctypes
import os
import platform
import warnings

import torch

from slm.errors import InputError, check

MALLOPT = {"M_MMAP_THRESHOLD": (-3, 2**25), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 64 * 2**20)}
"""Parameters of glibc's mallopt, with the values that let it keep what was freed."""
LARGEST_MMAP_THRESHOLD = 2**30
"""Refused by older versions of glibc, which take no more than the value above."""

LARGEST_GRAPH = 10_000_000
"""Parameters of the largest network that is replayed as a CUDA graph."""


def prepare_cpu() -> None:
    """Spare this process page faults and denormal numbers; to be called before torch starts its threads.

    glibc's allocator is to give freed memory to the next tensor, not back to the system, since each new page costs a
    page fault: with the default model on two cores a step took 177 ms and not 190 to 212.

    Numbers below 1e-38, which a trained model's attention is full of in 32 bits, are to be 0. On an Intel Xeon without
    bf16 arithmetic with them is so slow that a step of `configs/record.yaml` took 1,141 ms without them and 2,125 with.
    """
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", "The value of the smallest subnormal")  # numpy before 2.4 notices that
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


def tell_compiled_code_by_its_vectors() -> None:
    """Make the width of the vectors a part of what torch's cache of compiled code for CPUs goes by.

    torch 2.13 leaves it out: code kept by a process with ATEN_CPU_CAPABILITY=avx2 is run again with longer vectors,
    which write past the ends of arrays.
    """
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if config.cpp.simdlen is None:
        config.cpp.simdlen = pick_vec_isa().bit_width() or None


def compile_mode(device: str, network: torch.nn.Module) -> str | None:
    """The mode of torch.compile: on CUDA a small network, whose kernels end sooner than the processor can start the
    next, is replayed as one CUDA graph. Chosen by reasoning: it has not been measured on a GPU.
    """
    is_small = sum(parameter.numel() for parameter in network.parameters()) <= LARGEST_GRAPH
    return "reduce-overhead" if device == "cuda" and is_small else None


def has_native_bf16() -> bool:
    """Whether torch multiplies in bf16 with instructions for it on this processor; without them 32-bit is faster.

    `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA` can keep torch from instructions that the processor has.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        is_there = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    else:  # torch before 2.12
        is_there = bool(torch.cpu._is_avx512_bf16_supported())
    return is_there and not _is_held_back()


def _is_held_back() -> bool:
    """Whether the environment keeps ATen or oneDNN to instructions from before bf16 on an x86 processor."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    has_bf16 = isa in ("ALL", "DEFAULT") or "BF16" in isa or "FP16" in isa or "AMX" in isa or "AVX10" in isa
    return not (has_bf16 and torch.backends.cpu.get_cpu_capability().startswith("AVX512"))


def describe(device: torch.device) -> str:
    """What computes: the name of the GPU, or of the processor, its instructions and how many threads it has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    facts = [_processor(), torch.backends.cpu.get_cpu_capability().replace("DEFAULT", "")]
    facts[1] += "-bf16" if facts[1] and has_native_bf16() else ""
    threads = torch.get_num_threads()
    return ", ".join([*filter(None, facts), f"{threads} thread{'s' if threads > 1 else ''}"])


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def fast_dtype(device: torch.device) -> torch.dtype:
    """The type in which this device multiplies matrices fastest, of bf16 and 32 bits."""
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_native = device.type == "cpu" and has_native_bf16()
    return torch.bfloat16 if is_native else torch.float32


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


def writing_device(asked: str) -> str:
    """The same, for text that is written without a Trainer: `cuda`, `mps` or `cpu`; raises InputError for any other."""
    kind = accelerator_kind(asked)
    check(kind in ("cpu", "cuda", "mps"), f"accelerator={asked} must be auto, cpu, gpu, cuda or mps")
    return kind


def resolve_precision(asked: str, accelerator: str) -> tuple[str, str | None]:
    """What `16-mixed` means on this accelerator, and why in one line; None where it is taken as asked.

    float16 needs a gradient scaler, which is made for CUDA alone. bf16 is taken as asked everywhere.
    """
    if asked.startswith("bf16") and accelerator == "cpu" and not has_native_bf16():
        return asked, f"precision {asked}: this CPU has no bf16 arithmetic, and is many times faster in 32-true"
    if asked not in ("16-mixed", "16"):
        return asked, None
    if accelerator == "cuda" and fast_dtype(torch.device("cuda")) == torch.bfloat16:
        return asked, (
            f"precision {asked}: gradients are scaled, and the optimizer takes several kernels; this GPU computes "
            "in bf16 too, which needs neither: --trainer.precision bf16-mixed"
        )
    if accelerator == "cpu" and has_native_bf16():
        return "bf16-mixed", "precision 16-mixed becomes bf16-mixed: this CPU computes natively in bf16, not in float16"
    if accelerator == "cpu":
        return "32-true", "precision 16-mixed becomes 32-true: this CPU has no native 16-bit arithmetic"
    if accelerator == "mps":
        return "32-true", "precision 16-mixed becomes 32-true: its gradient scaling works on CUDA alone, not on MPS"
    return asked, None
