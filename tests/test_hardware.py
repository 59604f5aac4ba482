import re
from pathlib import Path

import pytest
import torch

from slm.hardware import has_native_bf16, resolve_precision


def test_16_mixed_stays_on_cuda_and_becomes_32_bit_on_mps() -> None:
    assert resolve_precision("16-mixed", "cuda") == ("16-mixed", None)
    assert resolve_precision("16-mixed", "mps")[0] == "32-true"


def test_another_precision_is_taken_as_asked() -> None:
    assert resolve_precision("bf16-mixed", "cpu") == ("bf16-mixed", None)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the oracle is Linux's own list of flags")
def test_native_bf16_is_what_the_processor_reports() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    assert has_native_bf16() == bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"amx_bf16": True}, True),
        ({"bf16": True, "neon": True}, True),
    ],
)
def test_only_an_instruction_for_bf16_counts(
    capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_native_bf16() is expected


@pytest.mark.parametrize("expected", [True, False])
def test_an_older_torch_is_asked_in_its_own_way(expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: expected)
    assert has_native_bf16() is expected
