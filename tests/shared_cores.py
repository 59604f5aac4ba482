"""What training beside other programs costs: `python -m tests.shared_cores`.

The command trains `small_text` and the default model alone, beside one and beside two processes that never rest, with
threads that give way (`slm.run.cores`) and without. What it prints is how many tokens it trains on in a second.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from slm.benchmark import endless
from slm.messages import say

ROOT = Path(__file__).parent.parent
CONFIGS = {"small_text": ["--config=configs/small_text.yaml", "--data.path=README.md"], "default": []}
BUSY = "while True: pass"
TRAIN = """
import sys, time
from lightning.pytorch import Callback
import slm.cli, slm.run.cores
class Count(Callback):
    def on_train_start(self, trainer, module):
        self.seconds = []
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seconds.append(time.perf_counter())
        if self.seconds[-1] - self.seconds[0] > SECONDS:
            trainer.should_stop = True
    def on_train_end(self, trainer, module):
        end = self.seconds[-1]
        later = [s for s in self.seconds if s > self.seconds[0] + SECONDS / 3]  # once it has noticed
        tokens = trainer.datamodule.hparams["batch_size"] * module.hparams["max_seq_len"]
        print("rate", (len(later) - 1) * tokens / (end - later[0]))
"""


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """So many processes that never rest."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rate(flags: list[str], seconds: float, gives_way: bool, folder: str) -> float:
    """Tokens/s of a run, from a third of its time on."""
    program = TRAIN.replace("SECONDS", str(seconds))
    if not gives_way:
        program += "slm.run.cores.waited = lambda: None\n"
    argv = [*flags, *endless(folder), "--trainer.callbacks+=__main__.Count"]
    program += f"slm.cli.main({argv!r})\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("rate ")]
    if not lines:
        sys.exit(done.stderr)
    return float(lines[0].split()[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each model and number of busy processes, with the median and the range of the turns."""
    parser = argparse.ArgumentParser(prog="python -m tests.shared_cores")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of processes that never rest")
    parser.add_argument("--seconds", type=float, default=6.0, help="that each run trains")
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args(argv)
    if asked.seconds <= 0 or asked.turns < 1 or min(asked.busy) < 0:
        parser.error("--seconds must be above 0, --turns at least 1, --busy at least 0")
    print("| model | busy processes | threads give way, tokens/s | they do not |")
    print("|---|---|---|---|")
    for name, flags in CONFIGS.items():
        for number in asked.busy:
            rates: dict[bool, list[float]] = {True: [], False: []}
            with busy_processes(number), tempfile.TemporaryDirectory() as folder:
                for turn in range(asked.turns):
                    say(f"{name} beside {number}, turn {turn + 1} of {asked.turns}")
                    for gives_way, measured in rates.items():
                        measured.append(rate(flags, asked.seconds, gives_way, folder))
            cells = [f"{statistics.median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})" for r in rates.values()]
            print(f"| {name} | {number} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
