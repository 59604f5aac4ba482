"""What a GPU must show, in one file: `python -m tests.gpu_report [--output FILE] [FLAGS]`.

It should take less than eight minutes on one GPU, but nothing of it has run on one yet. FLAGS of `train.py` are added
to those of every run, so that a processor can go through all of it at tiny sizes. Each part is written as soon as it
is known, and one that fails says so in its place.
"""

import contextlib
import io
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import slm.hardware
from slm.benchmark import AUTOCAST, OURS, Contestant, endless, flops_per_step, matmul_rate
from slm.benchmark import main as benchmark
from slm.messages import say

ROOT = Path(__file__).parent.parent
ROUNDS = 5
BATCH_SIZES = (128, 64, 32, 16, 8, 4, 2, 1)
SMALL_BATCH = 8
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "A10G": 70e12,
}
"""FLOP/s in bf16 with dense matrices, by NVIDIA's data sheets."""
WITHOUT_GRAPHS, WITHOUT_FUSION = "no CUDA graph", "AdamW not fused"
BF16, COMPILED = ["--trainer.precision=bf16-mixed"], ["--model.compile=true"]
DEFAULT = {
    "16-mixed": ["--trainer.precision=16-mixed"],
    "bf16-mixed": BF16,
    f"bf16-mixed, {WITHOUT_FUSION}": BF16,
    "bf16-mixed, compiled": [*BF16, *COMPILED],
    f"bf16-mixed, compiled, {WITHOUT_GRAPHS}": [*BF16, *COMPILED],
}
"""Ways to train the default model."""
GPT2 = ["--config=configs/gpt2.yaml"]


def train(name: str, flags: list[str]) -> None:
    """One contestant: the command as the benchmark runs it, without what its name says."""
    if WITHOUT_GRAPHS in name:
        slm.hardware.LARGEST_GRAPH = 0
    if WITHOUT_FUSION in name:
        import slm.training.language_model as module

        build = module.build_optimizer
        module.build_optimizer = lambda network, hparams, fused: build(network, hparams, fused=False)
    benchmark([OURS, *flags])


def compared(variants: dict[str, list[str]], flags: Sequence[str]) -> str:
    """A table of runs that take turns."""
    contestants: dict[str, Contestant] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        for name, own in variants.items():
            argv = ["--contestant", name, *own, *flags, *endless(folder)]
            contestants[name] = Contestant("tests.gpu_report", *argv, is_quiet=True)
            ends.callback(contestants[name].stop)
        for _ in range(ROUNDS):
            for contestant in contestants.values():
                contestant.train_a_round()
    return "\n".join(rows(contestants))


def rows(contestants: dict[str, Contestant]) -> Iterator[str]:
    """Of a Markdown table."""
    yield "| run | precision | batch | ms/step (quartiles) | tokens/s | of the matmul rate | of the peak | memory |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, contestant in contestants.items():
        facts, sizes = contestant.first, contestant.first["sizes"]
        low, median, high = statistics.quantiles(contestant.milliseconds, n=4, method="inclusive")
        speed = flops_per_step(sizes) / (median / 1e3)
        rate = matmul_rate(facts["device"], getattr(torch, AUTOCAST.get(facts["precision"], "float32")))
        peak = next((value for gpu, value in PEAKS.items() if re.search(rf"{gpu}\b", facts["machine"])), None)
        tokens = sizes["batch_size"] * sizes["max_seq_len"] / (median / 1e3)
        yield (
            f"| {name} | {facts['precision']} | {sizes['batch_size']} | {median:.2f} ({low:.2f} to {high:.2f}) "
            f"| {tokens:,.0f} | {speed / rate:.0%} | {f'{speed / peak:.0%}' if peak else 'not known'} "
            f"| {contestant.memory:.2f} GB |"
        )


def largest_gpt2(flags: Sequence[str]) -> str:
    """GPT-2 of 124 M at the largest batch that fits into memory."""
    for batch_size in BATCH_SIZES:
        said = io.StringIO()
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(said):
            return compared({"124 M": [*GPT2, f"--data.batch_size={batch_size}"]}, flags)
        if "out of memory" not in said.getvalue().lower():
            raise RuntimeError(said.getvalue()[-2000:])
    raise RuntimeError("not even one window fits into memory")


def run(*argv: str) -> str:
    """What a command prints; raises with what it says where it fails."""
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-3000:])
    return done.stdout.strip()


def resumed(flags: Sequence[str]) -> str:
    """Whether a run that was stopped after an epoch ends with the bits of one that was not."""
    weights: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, turns in (("whole", [["2"]]), ("stopped", [["1"], ["2", "--ckpt_path=last"]])):
            place = [f"--trainer.default_root_dir={folder}/{name}", "--trainer.deterministic=true", *flags]
            for epochs, *more in turns:
                run("train.py", f"--trainer.max_epochs={epochs}", *place, *more)
            last = Path(folder) / name / "runs/version_0/checkpoints/last.ckpt"
            weights.append(torch.load(last, weights_only=True)["state_dict"])
    whole, stopped = weights
    differing = [key for key, value in whole.items() if not torch.equal(value, stopped[key])]
    if differing:
        raise RuntimeError(f"these weights differ: {', '.join(differing)}")
    return f"All {len(whole)} tensors are equal to the bit."


def parts(flags: list[str], generate: list[str]) -> dict[str, Callable[[], str]]:
    """The parts of the report by their titles."""
    small = [*GPT2, f"--data.batch_size={SMALL_BATCH}", *flags]
    return {
        "The default model, five ways": lambda: compared(DEFAULT, flags),
        "The default model beside others": lambda: run("-m", "slm.benchmark", *BF16, *COMPILED, *flags),
        "GPT-2, 124 M, as many windows as fit": lambda: largest_gpt2(flags),
        f"GPT-2, 124 M, {SMALL_BATCH} windows, beside others": lambda: run("-m", "slm.benchmark", *small),
        "Writing": lambda: run("-m", "slm.generate_benchmark", "--batch_sizes=[1,64]", *generate),
        "Stopped and resumed": lambda: resumed(flags),
        "Tests that need a GPU": lambda: run("-m", "pytest", "-q", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider"),
    }


def main(argv: list[str]) -> None:
    """Write the report, to `gpu_report.md` unless `--output` names another file."""
    if argv[:1] == ["--contestant"]:
        train(argv[1], argv[2:])
        return
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return
    output = Path("gpu_report.md")
    if argv[:1] == ["--output"]:
        output, argv = Path(argv[1]), argv[2:]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = f"# {slm.hardware.describe(device)}, torch {torch.__version__}\n"
    failed = []
    tiny = [] if device.type == "cuda" else ["--contexts=[16]", "--rounds=1"]
    for title, part in parts(argv, tiny).items():
        say(title)
        try:
            body = part()
        except (Exception, SystemExit) as error:  # a contestant that fails has said why
            failed.append(title)
            body = f"FAILED: {error}"
        text += f"\n## {title}\n\n{body}\n"
        output.write_text(text, encoding="utf-8")
    say(f"written to {output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
