"""How fast, and how far from the limit, for the flags that `train.py` takes: `python -m slm.benchmark [FLAGS]`.

The project's command, the same steps in a bare loop, and the peers that are installed train in processes of their own
and take turns, so that what else the machine does falls on all of them alike. With
`--sweep FLAG VALUE,VALUE,... [FLAGS]` the command alone is measured with one value after another.

On two CPU cores with AVX512-bf16, `--sweep model.vocab_size 1000,10000,32000,128000`,
`--sweep model.max_seq_len 128,512,1024,4096 --data.batch_size 4`, `--sweep model.embed_dim 64,128,256,512` and
`--sweep model.num_layers 1,2,4,8` gave what follows. The time grows no faster than the arithmetic, and with num_layers,
whose products are the smallest, by a fifth more.

| flag | values | ms/step | share of the matmul rate | peak memory |
|---|---|---|---|---|
| vocab_size | 1000, 10000, 32000, 128000 | 40, 92, 255, 964 | 41, 50, 48, 49% | 0.53, 0.57, 0.68, 1.14 GB |
| max_seq_len | 128, 512, 1024, 4096 | 18, 69, 135, 1015 | 35, 39, 45, 44% | 0.49, 0.51, 0.56, 0.86 GB |
| embed_dim | 64, 128, 256, 512 | 67, 101, 166, 328 | 36, 49, 65, 75% | 0.53, 0.58, 0.72, 0.91 GB |
| num_layers | 1, 2, 4, 8 | 73, 100, 139, 206 | 53, 47, 47, 44% | 0.53, 0.57, 0.65, 0.79 GB |
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain, repeat
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from slm.baselines import STEPS, Turns, train_in_turns
from slm.cli import train
from slm.command.exit_codes import ends_in_one_line
from slm.command.settings import read_command
from slm.command.trainer import resolve_precision_of
from slm.errors import check
from slm.hardware import (
    accelerator_kind,
    compile_mode,
    describe,
    fast_dtype,
    prepare_cpu,
    tell_compiled_code_by_its_vectors,
)
from slm.messages import say, silence_notices
from slm.run.signals import Progress
from slm.training.optimizers import build_optimizer, matmul_flops
from slm.watch.monitor import Forecast

ROUNDS, SWEEP_ROUNDS = 9, 3
MORE_STEPS = 1_000_000
"""Than any measurement takes; a schedule needs an end."""
OURS, BARE, TEACHING, HUGGING_FACE = "slm", "its bare loop", "teaching script", "Hugging Face"
AUTOCAST = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}
Measured = tuple[dict[str, "Contestant"], dict[str, Any], list[float]]
MATMUL_SIZE = {"cpu": 2048}
MATMUL_SIZE_ON_A_GPU = 8192
LONGEST_PRODUCTS = 2.0
"""Seconds after which no further one is timed: in bf16 without instructions for it, one takes so long."""


def flops_per_step(sizes: Mapping[str, Any]) -> int:
    """Floating-point operations of the matrix products of a training step; the backward pass does twice the forward's.

    Attention counts every pair of positions, though half of them are masked (Chowdhery et al., 2022, appendix B).
    """
    seq_len, embed_dim, num_heads = sizes["max_seq_len"], sizes["embed_dim"], sizes["num_heads"]
    kv_dim = embed_dim // num_heads * (sizes["num_kv_heads"] or num_heads)
    num_matrices = 3 if sizes["architecture"] == "llama" else 2  # of the feed-forward layer
    weights = 2 * embed_dim * (embed_dim + kv_dim) + num_matrices * embed_dim * sizes["hidden_dim"]
    per_token = sizes["num_layers"] * (2 * weights + 4 * seq_len * embed_dim) + 2 * sizes["vocab_size"] * embed_dim
    return int(3 * per_token * sizes["batch_size"] * seq_len)


class Clock(Callback):
    """Times the command as it is, in rounds of steps; it never validates, and has no end but this one's."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.turns = Turns()  # before a progress bar can print
        others = [callback for callback in trainer.callbacks if not isinstance(callback, Forecast)]
        trainer.callbacks = others  # nobody waits for the end of this run
        plugin = trainer.precision_plugin
        several, devices = trainer.accumulate_grad_batches, trainer.world_size
        check(several == 1, f"trainer.accumulate_grad_batches={several}: the benchmark counts steps of one batch")
        check(devices == 1, f"{devices} devices: the benchmark measures one, add --trainer.devices 1")
        is_known = plugin.precision in ("32-true", *AUTOCAST)
        check(is_known, f"trainer.precision={plugin.precision}: the other loops know 32-true, bf16-mixed and 16-mixed")
        short = pl_module.hparams["short_context_steps"]
        check(short == 0, f"model.short_context_steps={short}: the other loops read whole windows, give it 0")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        device = trainer.strategy.root_device
        self.facts = {
            "precision": trainer.precision_plugin.precision,
            "device": device.type,
            "machine": describe(device),
            "sizes": {**pl_module.hparams, "batch_size": trainer.datamodule.hparams["batch_size"]},
            "fast_dtype": str(fast_dtype(device)).removeprefix("torch."),
            "optimizer_flops": matmul_flops(trainer.optimizers[0]),
        }

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.turns.after_step(trainer.strategy.root_device, self.facts)


def train_bare(argv: list[str]) -> None:
    """Train model and data of the command, with its loss and optimizer, in the plain loop that the peers have too."""
    command = read_command(argv)
    torch.manual_seed(command.settings.seed_everything)
    model = command.new_model()
    data = command.new_data(model)
    data.setup()
    asked = vars(command.instantiate().trainer)
    autocast = AUTOCAST.get(resolve_precision_of(asked))
    device = torch.device(accelerator_kind(asked["accelerator"]))
    transformer = model.to(device).transformer
    if model.hparams["compile"]:
        tell_compiled_code_by_its_vectors()
        transformer.compile(mode=compile_mode(device.type, transformer))
    batches = chain.from_iterable(repeat(data.train_dataloader()))

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = transformer(tokens.to(device)).flatten(0, 1)  # (BT, D)
        return model.loss(hidden, targets.flatten())

    optimizer = build_optimizer(transformer, model.hparams, fused=autocast != "float16")
    train_in_turns(
        transformer, loss_of, optimizer, lambda: next(batches), getattr(torch, autocast) if autocast else None
    )


class Contestant:
    """A process that trains in rounds.

    Attributes:
        first: what it says of itself after its first round, which does not count.
        milliseconds: of a step, in each round.
        optimizer_milliseconds: of the optimizer's part of it, where that is measured.
        memory: its peak so far, in GB.

    Args:
        argv: the module that is run, and its arguments.
        is_quiet: whether what it says on stderr is shown only where it ends too soon.
    """

    def __init__(self, *argv: str, is_quiet: bool = False) -> None:
        self._said = tempfile.TemporaryFile() if is_quiet else None  # noqa: SIM115 - it lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        self.first = self._answer()
        self.milliseconds: list[float] = []
        self.optimizer_milliseconds: list[float] = []

    def train_a_round(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        answer = self._answer()
        self.milliseconds.append(answer["ms"])
        if "optimizer_ms" in answer:
            self.optimizer_milliseconds.append(answer["optimizer_ms"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("{"):  # what it was asked for instead, as by --help; or nothing, and it has said why
            assert self.process.stdin is not None
            self.process.stdin.close()  # it may wait for a round
            print(line, self.process.stdout.read(), sep="", end="")
            if self._said is not None:
                self._said.seek(0)
                print(self._said.read().decode(errors="replace"), file=sys.stderr, end="")
            sys.exit(self.process.wait() or int(not line))
        answer: dict[str, Any] = json.loads(line)
        self.memory = answer["memory"]
        return answer

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """What this machine reaches in one large matrix product, in FLOP/s."""
    size = MATMUL_SIZE.get(device, MATMUL_SIZE_ON_A_GPU)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    times: list[float] = []
    while len(times) < 4 and sum(times) < LONGEST_PRODUCTS:
        start = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def endless(folder: str) -> list[str]:
    """Flags of a run in a folder that neither ends by itself nor validates."""
    settings = ("max_epochs=-1", f"max_steps={MORE_STEPS}", "limit_val_batches=0", f"default_root_dir={folder}")
    return [f"--trainer.{setting}" for setting in settings]


def measure(flags: list[str], rounds: int, with_peers: bool) -> Measured:
    """Let all train in turns; returns them by name, what ours says of itself, and the matmul rates beside them."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [*flags, *endless(folder)]
        contestants = {OURS: Contestant("slm.benchmark", OURS, *argv)}
        facts = contestants[OURS].first
        if with_peers:
            say(f"{rounds} rounds of {STEPS} steps each, in turns")
        try:
            if with_peers:
                autocast = AUTOCAST.get(facts["precision"])
                settings = json.dumps({**facts["sizes"], "device": facts["device"], "autocast": autocast})
                contestants[BARE] = Contestant("slm.benchmark", BARE, *argv, is_quiet=True)
                peers = [TEACHING, *([HUGGING_FACE] if importlib.util.find_spec("transformers") else [])]
                for name in peers:
                    contestants[name] = Contestant("slm.baselines", name, settings, is_quiet=True)
            dtype = getattr(torch, AUTOCAST.get(facts["precision"], "float32"))
            rates = []
            for number in range(rounds):
                rates.append(matmul_rate(facts["device"], dtype))
                order = deque(contestants.values())
                order.rotate(number)  # what a processor has just done slows down or speeds up what comes next
                for contestant in order:
                    contestant.train_a_round()
        finally:
            for contestant in contestants.values():
                contestant.stop()
    return contestants, facts, rates


def table(contestants: Mapping[str, Contestant], facts: Mapping[str, Any], rates: list[float]) -> Iterator[str]:
    """The rows of a Markdown table."""
    sizes = facts["sizes"]
    flops, tokens, rate = flops_per_step(sizes), sizes["batch_size"] * sizes["max_seq_len"], statistics.median(rates)
    ours = statistics.median(contestants[OURS].milliseconds)
    yield "| loop | ms/step (quartiles) | tokens/s | share of the matmul rate | peak memory | time, slm = 1 |"
    yield "|---|---|---|---|---|---|"
    for name, contestant in contestants.items():
        low, median, high = statistics.quantiles(contestant.milliseconds, n=4, method="inclusive")
        products = flops + facts["optimizer_flops"] if name in (OURS, BARE) else flops
        if name == TEACHING:
            products = flops_per_step({**sizes, "architecture": "gpt2", "num_kv_heads": None})
        share = products / (median / 1e3) / rate
        yield (
            f"| {name} | {median:.1f} ({low:.1f} to {high:.1f}) | {tokens / median * 1e3:,.0f} | {share:.0%} "
            f"| {contestant.memory:.2f} GB | {median / ours:.2f} |"
        )


def explanation(contestants: Mapping[str, Contestant], facts: Mapping[str, Any], rates: list[float]) -> str:
    """One paragraph on what the figures mean and what to change."""
    sizes = facts["sizes"]
    optimizer_flops = facts["optimizer_flops"]
    flops, rate = flops_per_step(sizes) + optimizer_flops, statistics.median(rates)
    head = 6 * sizes["vocab_size"] * sizes["embed_dim"] * sizes["batch_size"] * sizes["max_seq_len"] / flops
    ours, bare = (statistics.median(contestants[name].milliseconds) for name in (OURS, BARE))
    pairs = zip(contestants[OURS].milliseconds, contestants[BARE].milliseconds, strict=True)
    overhead = statistics.median(one / other - 1 for one, other in pairs)
    optimizer = ""
    if optimizer_flops and (times := contestants[BARE].optimizer_milliseconds):
        fastest = matmul_rate(facts["device"], getattr(torch, facts["fast_dtype"]))
        took = statistics.median(times)
        optimizer = (
            f"The optimizer's step, {optimizer_flops / 1e9:.1f} GFLOP of these in {facts['fast_dtype']}, takes "
            f"{took:.1f} ms, {optimizer_flops / (took / 1e3) / fastest:.0%} of the matmul rate in that type. "
        )
    is_alike = sizes["optimizer"] == "adamw" and not sizes["dropout"]
    others = "" if is_alike else "The other loops train with AdamW and without dropout. "
    return (
        f"A step is {flops / 1e9:.1f} GFLOP, {head:.0%} of them in the output layer (vocab_size), and this machine "
        f"({facts['machine']}) multiplies large matrices at {rate / 1e9:,.0f} GFLOP/s in {facts['precision']}: at that "
        f"rate a step would take {flops / rate * 1e3:.1f} ms and takes {ours:.1f}. The Trainer, with bar, curves and "
        f"checkpoints, costs {overhead:+.1%} over the bare loop's {bare:.1f} ms (median of the rounds' ratios). "
        f"{optimizer}{others}Where the share of the "
        "matmul rate is low, the matrices are too small for this machine: a larger batch_size or embed_dim costs less "
        "than it adds, and --model.compile true joins the small operations between them."
    )


def sweep(name: str, values: str, flags: list[str]) -> Iterator[str]:
    """The rows of a Markdown table: the command alone, with one flag at one value after another."""
    header = [f"| {name} | ms/step | GFLOP/step | share of the matmul rate | peak memory |", "|---|---|---|---|---|"]
    for value in values.split(","):
        contestants, facts, rates = measure([*flags, f"--{name}={value}"], SWEEP_ROUNDS, with_peers=False)
        ours, flops = contestants[OURS], flops_per_step(facts["sizes"]) + facts["optimizer_flops"]
        median = statistics.median(ours.milliseconds)
        share = flops / (median / 1e3) / statistics.median(rates)
        while header:
            yield header.pop(0)
        yield f"| {value} | {median:.0f} | {flops / 1e9:.1f} | {share:.0%} | {ours.memory:.2f} GB |"


def main(argv: list[str]) -> None:
    silence_notices()
    with ends_in_one_line():
        if argv and argv[0] in (OURS, BARE):
            prepare_cpu()
            if argv[0] == BARE:
                train_bare(argv[1:])
            else:
                train([*argv[1:], "--trainer.callbacks+=slm.benchmark.Clock"], Progress())
            return
        first = argv[0] if argv else "--"
        check(first.startswith("-"), f"{first}: the benchmark trains, give it the flags of train.py alone")
        names = [flag.partition("=")[0] for flag in argv]
        check("--ckpt_path" not in names, "the benchmark trains a new model: leave out --ckpt_path")
        check("--sweep" not in names[1:], "--sweep comes first: python -m slm.benchmark --sweep FLAG VALUES")
        if argv and argv[0] == "--sweep":
            given = " ".join(argv)
            check(len(argv) >= 3, f"{given}: give a flag and its values, as in --sweep model.vocab_size 1000,10000")
            for row in sweep(argv[1], argv[2], argv[3:]):
                print(row, flush=True)
            return
        measured = measure(argv, ROUNDS, with_peers=True)
        print(*table(*measured), "", explanation(*measured), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
