"""What each difference between the families is worth: `python -m tests.families --config configs/text_2min.yaml`.

Every model trains on the same data with about as many parameters: where the feed-forward layer has three matrices, its
hidden_dim is two thirds. First all take turns in one process, to find how long a step of each is; then each is trained
by `train.py` for the steps that the configuration asks for, and for as many as take as long as those of gpt2.

Means of three seeds (`text_10min`: one): the validation loss after as many steps as gpt2 takes, then that after the
same time; empty cells were not measured.

| in `gpt2` | in `llama` | default data | `text.yaml` | `text_2min` | `text_10min` |
|---|---|---|---|---|---|
| `gpt2` itself | | 2.460 | 1.631 | 1.173 | 1.122 |
| learned positions, which are added | rotary: queries and keys are turned by them | 2.277, 2.282 | 1.373, 1.411 | | |
| LayerNorm | RMSNorm | 2.466, 2.469 | 1.635, 1.684 | | |
| two matrices around a GELU | SwiGLU: a third one gates what goes up | 2.560, 2.507 | 1.510, 1.497 | | |
| biases | none | 2.490, 2.468 | 1.641, 1.640 | | |
| all four | | 2.254, 2.259 | 1.290, 1.311 | 1.167, 1.174 | 1.105 |
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from slm import LanguageModel
from slm.command.settings import read_command
from slm.hardware import has_native_bf16
from slm.model.transformer import GPT2, LLAMA, SwiGLU, Transformer
from slm.training.optimizers import build_optimizer, stepped_by

NAMES = Literal["gpt2", "rotary", "rms_norm", "swiglu", "no_bias", "llama"]
ROUNDS, STEPS = 7, 5
VALIDATIONS = 5
"""Of a run of another number of steps, the last of them at its end."""


class MixedTransformer(Transformer):
    """GPT-2 with one of the differences, or with all of them."""

    architectures: ClassVar = {
        "gpt2": GPT2,
        "rotary": replace(GPT2, is_rotary=True),
        "rms_norm": replace(GPT2, norm=nn.RMSNorm),
        "swiglu": replace(GPT2, feed_forward=SwiGLU),
        "no_bias": replace(GPT2, norm=partial(nn.LayerNorm, bias=False), bias=False),
        "llama": LLAMA,
    }

    def __init__(self, architecture: NAMES = "gpt2", **options: Any) -> None:
        super().__init__(architecture=architecture, **options)  # type: ignore[arg-type]


class MixedModel(LanguageModel):
    network = MixedTransformer


def flags_of(name: str, flags: Sequence[str]) -> list[str]:
    """The command line of a model that has about as many parameters as that of the flags."""
    hparams = read_command(flags).new_model().hparams
    matrices = {
        name: 3 if parts.feed_forward is SwiGLU else 2 for name, parts in MixedTransformer.architectures.items()
    }
    hidden_dim = round(hparams["hidden_dim"] * matrices[hparams["architecture"]] / matrices[name] / 8) * 8
    model = ["--model=tests.families.MixedModel", f"--model.architecture={name}", f"--model.hidden_dim={hidden_dim}"]
    return [*flags, *model]


def time_steps(flags: Mapping[str, Sequence[str]]) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds of a training step of each model, the median of rounds in which all take turns; and its size."""
    loops, sizes = {}, {}
    for name in flags:
        command = read_command(flags[name])
        model = command.new_model()
        data = command.new_data(model)
        data.setup()
        loops[name] = _steps(model, data)
        sizes[name] = sum(parameter.numel() for parameter in model.transformer.parameters())
    times: dict[str, list[float]] = {name: [] for name in flags}
    for _ in range(ROUNDS + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                next(loop)
            times[name].append((time.perf_counter() - start) / STEPS * 1e3)
    return {name: statistics.median(rounds[1:]) for name, rounds in times.items()}, sizes


def _steps(model: LanguageModel, data: Any) -> Iterator[None]:
    optimizer, is_fast = build_optimizer(model.transformer, model.hparams, fused=True), has_native_bf16()
    while True:
        for tokens, targets in data.train_dataloader():
            with torch.autocast("cpu", torch.bfloat16, enabled=is_fast):
                hidden = model.transformer(tokens).flatten(0, 1)
                loss = model.loss(hidden, targets.flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(stepped_by(optimizer), 1.0)
            optimizer.step()
            yield


def train(flags: Sequence[str], seed: int, num_steps: int | None) -> tuple[float, int]:
    """The best validation loss of a run, and its steps."""
    argv = [*flags, f"--seed_everything={seed}", "--trainer.enable_progress_bar=false"]
    argv += [f"--watch.{part}=false" for part in ("samples", "attention", "embedding", "loss_figure")]
    if num_steps is not None:
        argv += ["--trainer.max_epochs=-1", f"--trainer.max_steps={num_steps}"]
        argv += ["--trainer.check_val_every_n_epoch=null", f"--trainer.val_check_interval={num_steps // VALIDATIONS}"]
    with tempfile.TemporaryDirectory() as folder:
        argv += [f"--trainer.default_root_dir={folder}"]
        done = subprocess.run([sys.executable, "train.py", *argv], stdout=subprocess.PIPE, text=True, check=True)
        [best] = Path(folder).glob("runs/*/checkpoints/best.ckpt")
        last = torch.load(best.with_name("last.ckpt"), weights_only=True, mmap=True)
    loss = re.search(r"^val/loss +([\d.]+)", done.stdout, re.M)
    assert loss is not None, done.stdout
    return float(loss[1]), last["global_step"]


def study(flags: Sequence[str], names: Sequence[str], num_seeds: int, processes: int) -> Iterator[str]:
    """The rows of a Markdown table; so many runs at a time share the cores."""
    of_each = {name: flags_of(name, flags) for name in names}
    milliseconds, sizes = time_steps(of_each)
    yield "| architecture | parameters | ms/step | loss at the same step | steps in the same time | loss after these |"
    yield "|---|---|---|---|---|---|"
    with ThreadPoolExecutor(processes) as pool:

        def begin(name: str, num_steps: int | None) -> list[Future[tuple[float, int]]]:
            return [pool.submit(train, of_each[name], seed, num_steps) for seed in range(num_seeds)]

        at_step = {name: begin(name, None) for name in names}
        _, num_steps = at_step[names[0]][0].result()
        fits = {name: _rounded(num_steps * milliseconds[names[0]] / milliseconds[name]) for name in names}
        at_time = {name: begin(name, fits[name]) if fits[name] != num_steps else at_step[name] for name in names}
        for name in names:
            cells = [f"{sizes[name]:,}", f"{milliseconds[name]:.1f}", _mean(at_step[name]), f"{fits[name]:,}"]
            yield f"| {name} | {' | '.join([*cells, _mean(at_time[name])])} |"


def _rounded(num_steps: float) -> int:
    return max(1, round(num_steps / VALIDATIONS)) * VALIDATIONS


def _mean(runs: Sequence[Future[tuple[float, int]]]) -> str:
    """The mean of the losses, and from the lowest to the highest."""
    losses = [run.result()[0] for run in runs]
    return f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Others: those of train.py.", allow_abbrev=False)
    parser.add_argument("--architectures", nargs="+", default=get_args(NAMES), help="the first is compared with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, for which the cores are shared out")
    arguments, flags = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.processes))
    for row in study(flags, arguments.architectures, arguments.seeds, arguments.processes):
        print(row, flush=True)


if __name__ == "__main__":
    main()
