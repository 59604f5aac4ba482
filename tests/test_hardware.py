import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from conftest import ROOT, SMALL_FLAGS, fit, run_command, small_data, small_model
from lightning.pytorch import Callback, Trainer

from slm.hardware import LARGEST_GRAPH, compile_mode, has_native_bf16, resolve_precision
from slm.run.resume import ExactResume
from slm.watch.monitor import ProgressBar, StepMonitor


def test_16_mixed_stays_on_cuda_and_becomes_32_bit_on_mps() -> None:
    assert resolve_precision("16-mixed", "cuda")[0] == "16-mixed"
    assert resolve_precision("16-mixed", "mps")[0] == "32-true"


def test_a_run_in_16_mixed_says_what_it_costs_on_a_gpu_that_has_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_bf16, expected in ((True, "--trainer.precision bf16-mixed"), (False, "None")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        assert expected in str(resolve_precision("16-mixed", "cuda")[1])
    assert resolve_precision("bf16-mixed", "cuda") == ("bf16-mixed", None)


def test_another_precision_is_taken_as_asked_and_a_slow_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.hardware.has_native_bf16", lambda: True)
    assert resolve_precision("bf16-mixed", "cpu") == ("bf16-mixed", None)
    monkeypatch.setattr("slm.hardware.has_native_bf16", lambda: False)
    assert resolve_precision("64-true", "cpu") == ("64-true", None)
    precision, said = resolve_precision("bf16-mixed", "cpu")
    assert precision == "bf16-mixed"
    assert "this CPU has no bf16 arithmetic" in str(said)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the oracle is Linux's own list of flags")
def test_native_bf16_is_what_the_processor_reports(unheld: None) -> None:
    flags = Path("/proc/cpuinfo").read_text()
    assert has_native_bf16() == bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are read on x86 alone")
@pytest.mark.parametrize(
    "held",
    [
        {"ATEN_CPU_CAPABILITY": "avx2"},
        {"ATEN_CPU_CAPABILITY": "default"},
        {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    ],
)
def test_bf16_is_not_native_where_torch_is_kept_from_its_instructions(held: dict[str, str]) -> None:
    code = (
        "import torch\n"
        "if hasattr(torch.cpu, 'get_capabilities'):\n"
        "    torch.cpu.get_capabilities = lambda: {'avx512_bf16': True}\n"
        "else:\n"
        "    torch.cpu._is_avx512_bf16_supported = lambda: True\n"
        "from slm.hardware import fast_dtype, has_native_bf16\n"
        "print(has_native_bf16(), fast_dtype(torch.device('cpu')))\n"
    )
    result = run_command("-c", code, cwd=ROOT, **held)
    assert result.stdout == "False torch.float32\n", result.stderr


@pytest.fixture
def unheld(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment keeps torch to."""
    monkeypatch.setattr("slm.hardware._is_held_back", lambda: False)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"amx_bf16": True}, True),
        ({"bf16": True, "neon": True}, True),
    ],
)
def test_only_an_instruction_for_bf16_counts(
    capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch, unheld: None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_native_bf16() is expected


@pytest.mark.parametrize("expected", [True, False])
def test_an_older_torch_is_asked_in_its_own_way(expected: bool, monkeypatch: pytest.MonkeyPatch, unheld: None) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: expected)
    assert has_native_bf16() is expected


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
@pytest.mark.parametrize("keeps", [True, False])
def test_freed_memory_is_kept_for_the_next_tensor(keeps: bool) -> None:
    code = (
        "held = lambda: int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "tensor = torch.ones(50, 2**20)\n"
        "before = held()\n"
        "del tensor\n"
        "print(before - held() < 2**20)\n"
    )
    assert printed(code, is_prepared=keeps) == f"{keeps}\n"


@pytest.mark.slow
@pytest.mark.parametrize("is_prepared", [True, False])
def test_denormal_numbers_are_zero_in_every_thread(is_prepared: bool) -> None:
    code = (
        "torch.set_num_threads(2)\n"
        "tiny = torch.full((2**20,), 1e-30)\n"
        "print([bool((half == 0).all()) for half in (tiny * 1e-10).chunk(2)])\n"
    )
    assert printed(code, is_prepared) == f"{[is_prepared] * 2}\n"


def printed(code: str, is_prepared: bool) -> str:
    """What code prints in a process of its own, after `prepare_cpu` or without."""
    preparation = "prepare_cpu()" if is_prepared else ""
    result = run_command(
        "-c", f"import os, torch\nfrom slm.hardware import prepare_cpu\n{preparation}\n{code}", cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_machine_without_a_compiler_is_told_so_in_one_line(refused: Callable[..., str]) -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        line = refused(*SMALL_FLAGS, "--model.compile=true", "--trainer.accelerator=cpu")
    assert "model.compile=True: no C++ compiler on this machine: install one" in line


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_compiled_network_trains_to_the_same_checkpoint(architecture: str, slm: Callable[..., str]) -> None:
    flags = [
        *SMALL_FLAGS,
        f"--model.architecture={architecture}",
        "--trainer.max_steps=2",
        "--trainer.max_epochs=-1",
        "--trainer.precision=32-true",
    ]
    flags += ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=0", "--data.batch_size=8"]
    slm(*flags)
    slm(*flags, "--model.compile=true")
    eager, compiled = (
        torch.load(f"runs/version_{number}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for number in range(2)
    )
    assert list(eager) == list(compiled)
    for name, weights in eager.items():
        torch.testing.assert_close(weights, compiled[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_code_that_was_compiled_for_shorter_vectors_is_not_run_with_longer_ones(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from slm.hardware import tell_compiled_code_by_its_vectors\n"
        "tell_compiled_code_by_its_vectors()\n"
        "x = torch.arange(24.0)\n"
        "add_one = torch.compile(lambda x: torch.cat([x + 1, x.exp(), x * 2]))\n"
        "for _ in range(200):\n"
        "    assert torch.equal(add_one(x)[:24], x + 1)\n"
        "print('same')\n"
    )
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for held in ({"ATEN_CPU_CAPABILITY": "avx2"}, {}):
        result = run_command("-c", code, cwd=ROOT, **environment, **held)
        assert result.stdout == "same\n", result.stderr


def test_a_small_network_is_replayed_as_a_graph_on_cuda_alone() -> None:
    with torch.device("meta"):
        small, large = torch.nn.Embedding(LARGEST_GRAPH, 1), torch.nn.Embedding(LARGEST_GRAPH + 1, 1)
    assert compile_mode("cuda", small) == "reduce-overhead"
    assert [compile_mode("cuda", large), compile_mode("cpu", small), compile_mode("mps", small)] == [None] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_gpu_a_network_replayed_as_a_graph_trains_as_it_does_without(
    accumulate: int, slm: Callable[..., str]
) -> None:
    flags = [*SMALL_FLAGS, "--trainer.max_steps=8", "--trainer.max_epochs=-1", "--trainer.precision=32-true"]
    flags += [f"--trainer.accumulate_grad_batches={accumulate}", "--data.batch_size=4"]
    slm(*flags)
    slm(*flags, "--model.compile=true")
    eager, compiled = (
        torch.load(f"runs/version_{number}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for number in range(2)
    )
    for name, weights in eager.items():
        torch.testing.assert_close(weights, compiled[name], rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for_between_logging_steps() -> None:
    class Forbid(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            is_quiet = trainer.global_step > 1 and (trainer.global_step + 1) % 5 and trainer.global_step % 5
            torch.cuda.set_sync_debug_mode("error" if is_quiet else "default")

        def on_train_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    callbacks = [ProgressBar(), ExactResume(), StepMonitor(), Forbid()]
    flags = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "gradient_clip_val": 1.0}
    flags |= {"log_every_n_steps": 5, "limit_train_batches": 20, "limit_val_batches": 0}
    trainer = fit(small_model(), small_data(batch_size=4), callbacks=callbacks, enable_progress_bar=True, **flags)
    assert trainer.global_step == 20
