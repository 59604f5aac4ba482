"""Training sharded by FSDP2, on two processes of this machine; one process is what it is compared with."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, SMALL, UNSHOWN, fit, run_command, slow_after_first, small_model
from torch import Tensor

from slm import load
from slm.command.settings import read_command
from slm.command.trainer import new_trainer
from slm.errors import InputError
from slm.model.loss import CHUNK_ELEMENTS_ON_A_GPU, LARGEST_CHUNK
from slm.run.checkpoint import last_checkpoint
from slm.run.control import Control
from slm.run.processes import Processes
from slm.training.language_model import LanguageModel

Run = Callable[..., str]
RUN = Path("runs/version_0")
CONFIG = ROOT / "configs/1b.yaml"
UNEVEN = {**SMALL, "vocab_size": 21, "embed_dim": 15, "num_heads": 3, "num_layers": 2, "hidden_dim": 33}
"""Sizes of which two processes cannot have equal shares."""
FLAGS = [
    "--trainer.accelerator=cpu",
    "--trainer.strategy=fsdp2",
    "--trainer.enable_progress_bar=false",
    "--trainer.precision=64-true",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.gradient_clip_val=0.01",
    "--trainer.max_steps=8",
    *(f"--model.{name}={size}" for name, size in UNEVEN.items()),
    "--data.num_tokens=850",  # an epoch ends with a smaller batch, and with fewer batches than make a step
    "--data.batch_size=8",
]

TRAINED = {
    "adamw": "optimizer=adamw",
    "llama": "optimizer=muon architecture=llama embed_dim=18 num_kv_heads=1 tie_embeddings=false",
    "sgd": "optimizer=sgd",
}


def on_two(*flags: str, cwd: Path = Path()) -> str:
    """What a command prints that trains on two processes."""
    cwd.mkdir(exist_ok=True)
    result = run_command(str(ROOT / "train.py"), *flags, "--trainer.devices=2", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def on_one(*flags: str, cwd: Path = Path()) -> None:
    cwd.mkdir(exist_ok=True)
    result = run_command(str(ROOT / "train.py"), *flags, *UNSHOWN, "--trainer.devices=1", cwd=cwd)
    assert result.returncode == 0, result.stderr


def tensors(content: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in nested dictionaries and lists, by the way to each."""
    if isinstance(content, Tensor):
        return {name: content}
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return {key: tensor for part, value in parts for key, tensor in tensors(value, f"{name}.{part}").items()}


def state(folder: Path = Path()) -> dict[str, Tensor]:
    """The weights and the state of the optimizer where a run ended."""
    content = torch.load(last_checkpoint(folder / RUN), weights_only=True)
    return tensors({name: content[name] for name in ("state_dict", "optimizer_states")})


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-10, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("case", slow_after_first(TRAINED))
def test_two_processes_with_a_shard_each_train_as_one_does(workdir: Path, case: str) -> None:
    """With clipping, accumulation, and an epoch's end in the middle of a step."""
    flags = [*FLAGS, *(f"--model.{option}" for option in TRAINED[case].split())]
    output = on_two(*flags, cwd=Path("two"))
    assert "samples, attention and embedding are not shown of a sharded model" in output
    assert re.search(r"^val/loss +\d", output, re.M)
    on_one(*flags, cwd=Path("one"))
    assert_close(state(Path("two")), state(Path("one")))
    weights = torch.load(Path("two") / RUN / "simple_language_model.pt", weights_only=True)["state_dict"]
    best = torch.load(Path("two") / RUN / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    model = load(Path("two") / RUN / "simple_language_model.pt")
    assert weights.keys() == model.transformer.state_dict().keys()
    assert all(torch.equal(best[f"transformer.{name}"], value) for name, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_run_goes_on_exact_to_the_bit(workdir: Path, optimizer: str) -> None:
    flags = [*FLAGS, *UNSHOWN, f"--model.optimizer={optimizer}", "--model.dropout=0.1"]
    on_two(*flags, cwd=Path("whole"))
    on_two(*flags, "--trainer.max_steps=4", cwd=Path("halves"))
    on_two("--ckpt_path=last", "--trainer.max_steps=8", cwd=Path("halves"))
    first, second = state(Path("whole")), state(Path("halves"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_a_run_goes_on_under_another_number_of_processes(workdir: Path, optimizer: str) -> None:
    flags = [*FLAGS, *UNSHOWN, f"--model.optimizer={optimizer}"]
    on_one(*flags, cwd=Path("whole"))
    on_two(*flags, "--trainer.max_steps=4", cwd=Path("two"))
    on_one("--ckpt_path=last", "--trainer.max_steps=8", "--trainer.strategy=auto", cwd=Path("two"))
    assert_close(state(Path("two")), state(Path("whole")))
    on_one(*flags, "--trainer.max_steps=4", cwd=Path("one"))
    on_two("--ckpt_path=last", "--trainer.max_steps=8", cwd=Path("one"))
    assert_close(state(Path("one")), state(Path("whole")))


@pytest.mark.slow
def test_a_changed_hyper_parameter_wins_in_a_sharded_run_that_goes_on(workdir: Path) -> None:
    on_two(*FLAGS, *UNSHOWN, "--trainer.max_steps=2")
    on_two("--ckpt_path=last", "--trainer.max_steps=4", "--model.weight_decay=0.2", "--model.learning_rate=0.0007")
    [optimizer] = torch.load(last_checkpoint(RUN), weights_only=True)["optimizer_states"]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.2, 0.0]
    assert [group["lr"] for group in optimizer["param_groups"]] == [0.0007, 0.0007]


@pytest.mark.slow
def test_sharded_weights_are_evaluated_as_whole_ones_are(workdir: Path) -> None:
    on_one(*FLAGS)
    for command, path in (("validate", "best"), ("test", str(RUN / "simple_language_model.pt"))):
        flags = ["--trainer.accelerator=cpu", "--trainer.precision=64-true", f"--ckpt_path={path}"]
        sharded = on_two(command, *flags, "--trainer.strategy=fsdp2")
        alone = run_command(str(ROOT / "train.py"), command, *flags, "--trainer.devices=1", cwd=workdir).stdout
        losses = [re.findall(r"/loss[ │]+(\d[\d.]+)", output) for output in (sharded, alone)]
        assert losses[0]
        assert [float(loss) for loss in losses[0]] == [pytest.approx(float(loss), abs=1e-6) for loss in losses[1]]


@pytest.mark.slow
def test_the_billion_parameters_train_and_go_on_in_miniature(workdir: Path) -> None:
    sizes = ["embed_dim=48", "num_layers=2", "hidden_dim=64", "max_seq_len=32", "vocab_size=50", "warmup_steps=2"]
    flags = [*(f"--model.{size}" for size in sizes), "--data.batch_size=4", "--data.num_tokens=5000"]
    flags += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_steps=6"]
    flags += ["--trainer.val_check_interval=3"]
    on_two(f"--config={CONFIG}", *flags)
    hparams = torch.load(last_checkpoint(RUN), weights_only=True)["hyper_parameters"]
    assert (hparams["activation_checkpointing"], hparams["schedule"], hparams["num_heads"]) == (True, "cosine", 16)
    output = on_two("--ckpt_path=last", "--trainer.max_steps=9")
    assert re.search(r"^val/loss +\d", output, re.M)
    assert torch.load(last_checkpoint(RUN), weights_only=True)["global_step"] == 9
    model = load(RUN)
    assert math.isfinite(model(torch.zeros(1, 32, dtype=torch.int64)).sum().item())


def test_on_one_device_fsdp2_trains_as_any_other_strategy(slm: Run) -> None:
    assert "fsdp2: on one device nothing is sharded" in slm(*FLAGS, *UNSHOWN, "--trainer.max_steps=2")


def test_shards_with_a_scaled_gradient_are_refused(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.command.trainer.resolve_precision_of", lambda asked: "16-mixed")  # as on a GPU
    command = read_command(FLAGS)
    with pytest.raises(InputError, match="use bf16-mixed"):
        new_trainer(command, command.instantiate(), None, Control(Processes(world_size=2)))


def test_the_plan_of_the_billion_parameters_follows_from_its_sizes() -> None:
    text = CONFIG.read_text()
    settings = yaml.safe_load(text)
    sizes = settings["model"]
    with torch.device("meta"):
        network = LanguageModel(**sizes).transformer
    num_parameters, in_block = (sum(p.numel() for p in part.parameters()) for part in (network, network.blocks[0]))
    layers, width, hidden, vocab = (sizes[name] for name in ("num_layers", "embed_dim", "hidden_dim", "vocab_size"))
    outside, num_windows = num_parameters - layers * in_block, settings["data"]["init_args"]["batch_size"]
    tokens = num_windows * sizes["max_seq_len"]
    prose = re.sub(r"\s*\n# *", " ", text)
    num_steps = settings["trainer"]["max_steps"]
    for said in (
        f"{num_parameters:,} parameters: {in_block:,} in a block, {outside:,} outside",
        f"{num_windows} windows, which are {tokens:,} tokens",
        f"{num_steps:,} steps are {num_steps * tokens // num_parameters} tokens for each parameter",
    ):
        assert said in prose
    rows = [[float(cell) for cell in re.findall(r"[\d.]+", line)] for line in re.findall(r"^# \| (\d.*)", text, re.M)]
    assert [row[0] for row in rows] == [8, 64, 512]
    for num_gpus, windows, *gigabytes in rows:
        assert windows == num_windows / num_gpus
        here = windows * sizes["max_seq_len"]
        chunk = min(here, max(CHUNK_ELEMENTS_ON_A_GPU // vocab, width), LARGEST_CHUNK)
        parts = [
            16 * num_parameters / num_gpus,
            8 * outside + 16 * in_block,
            here * (4 * width * layers + 2 * (32 * width + 4 * hidden)),
            12 * chunk * vocab + 6 * vocab * width,
        ]
        assert gigabytes == [pytest.approx(part / 1e9, abs=0.05) for part in (*parts, sum(parts))]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activations_that_are_computed_again_give_the_same_gradients(dropout: float) -> None:
    gradients, kept = [], []
    tokens = torch.randint(20, (4, 17))
    for recomputes in (False, True):
        model = small_model(num_layers=3, dropout=dropout, activation_checkpointing=recomputes)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            torch.manual_seed(1)
            loss = model.loss(model.transformer(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        kept.append(sum(saved))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert kept[1] < 0.5 * kept[0]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])  # type: ignore[arg-type]


def test_a_run_that_computes_activations_again_ends_with_the_same_weights() -> None:
    models = [
        small_model(num_layers=2, dropout=0.1, activation_checkpointing=recomputes) for recomputes in (False, True)
    ]
    for model in models:
        torch.manual_seed(5)
        fit(model, max_steps=4)
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
