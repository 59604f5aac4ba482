"""Four swaps that a researcher makes: each trains by a flag, resumes exactly, writes from its cache, and is listed."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, UNSHOWN, slow_after_first
from patches import ExpertsModel, RotaryModel, ZLossModel
from torch import Tensor

import slm as package
from slm import export, runs
from slm.cli import main
from slm.errors import InputError
from slm.model.sampling import decode
from slm.run.checkpoint import open_checkpoint, read_checkpoint
from slm.run.loading import restore_network
from slm.training.optimizers import build_optimizer

Run = Callable[..., str]
SIZES = [f"--model.{name}={size}" for name, size in SMALL.items()]
COMMON = [*SIZES, *UNSHOWN, "--model.dropout=0.1", "--trainer.enable_progress_bar=false", "--trainer.precision=32-true"]
DUMMY = ["--data.num_tokens=2000", "--data.batch_size=8"]
PATCHES = {
    "rotary positions": ["--model", "patches.RotaryModel", "--model.rope_theta=500", *DUMMY],
    "experts": ["--config=experts.yaml", "--model.optimizer=muon", *DUMMY],
    "experts and adamw": ["--model.class_path=patches.ExpertsModel", "--model.num_experts=2", *DUMMY],
    "z-loss": ["--model.z_loss=0.01", "--model=patches.ZLossModel", *DUMMY],
    "other data": ["--data=patches.Multiples", "--data.factor=7", "--data.batch_size=8"],
}
LISTED = {
    "rotary positions": "model=RotaryModel",
    "experts": "model=ExpertsModel",
    "experts and adamw": "model=ExpertsModel",
    "z-loss": "model=ZLossModel",
    "other data": "data=Multiples",
}
UNLIKE_GPT2 = {
    "rotary positions": "RotaryTransformer",
    "experts": "ExpertsTransformer",
    "experts and adamw": "ExpertsTransformer",
}


@pytest.mark.parametrize("patch", slow_after_first(PATCHES))
def test_a_swap_trains_resumes_exactly_writes_from_its_cache_and_is_listed(
    patch: str, slm: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("experts.yaml").write_text("model: {class_path: patches.ExpertsModel, num_experts: 3}\n")
    through = [*PATCHES[patch], *COMMON, "--trainer.max_epochs=-1", "--trainer.max_steps=21"]
    slm(*through)
    slm(*through, "--trainer.max_steps=8")
    slm("--ckpt_path=last", "--trainer.max_steps=21")
    ends = [read_checkpoint(Path(f"runs/version_{number}/checkpoints/last.ckpt")) for number in (0, 1)]
    for name, weights in ends[0]["state_dict"].items():
        assert torch.equal(weights, ends[1]["state_dict"][name]), name

    model = package.load("runs/version_0")
    assert type(restore_network(*open_checkpoint("runs/version_0", "best"))) is type(model.transformer)
    check_cache(model)
    slm(*SIZES, *COMMON, *DUMMY, "--trainer.max_epochs=1")
    runs.main([])
    assert LISTED[patch] in capsys.readouterr().out
    if patch in UNLIKE_GPT2:
        with pytest.raises(SystemExit):
            export.main(["--ckpt_path=runs/version_0", "--output=exported"])
        assert f"the format hf cannot hold a {UNLIKE_GPT2[patch]}" in capsys.readouterr().err
        assert not Path("exported").exists()


def check_cache(model: Any) -> None:
    """The cache gives the logits of the whole sequence, also past the end of the context."""
    window = [1, 2, 3]

    def choose(logits: Tensor) -> Tensor:
        nonlocal window
        if len(window) > SMALL["max_seq_len"]:
            has_rotary = model.transformer.rotary is not None  # then what is left was as if read alone, in one layer
            window = [*window[:4], *window[6:]] if has_rotary else window[-SMALL["max_seq_len"] // 2 :]
        expected = model(torch.tensor([window]))[0, -1]
        assert (logits[0] - expected).abs().max() <= 1e-4
        window = [*window, int(expected.argmax())]
        return expected.argmax()[None]

    list(islice(decode(model.transformer, torch.tensor([window]), choose), 30))


def test_experts_are_stepped_as_matrices_and_decay() -> None:
    model = ExpertsModel(**SMALL, optimizer="muon")
    matrices, _, _ = build_optimizer(model.transformer, model.hparams, fused=False).param_groups
    assert {tuple(p.shape) for p in matrices["params"] if p.ndim == 3} == {(4, 16, 32), (4, 32, 16)}


def test_a_swaps_options_are_flags_and_hyper_parameters() -> None:
    assert RotaryModel(**SMALL).hparams["rope_theta"] == 10_000.0
    assert ZLossModel(z_loss=0.5, **SMALL).hparams["z_loss"] == 0.5
    assert {"rope_theta", "embed_dim", "learning_rate"} <= RotaryModel.signature().parameters.keys()


def test_the_z_loss_is_a_part_of_what_is_minimized() -> None:
    hidden, targets = torch.randn(6, 16), torch.randint(20, (6,))
    model = ZLossModel(z_loss=0.5, **SMALL)
    normalizer = (hidden @ model.transformer.token_embedding.weight.T).exp().sum(-1).log()
    plain = package.LanguageModel.loss(model, hidden, targets)
    assert model.loss(hidden, targets).item() == pytest.approx((plain + 0.5 * (normalizer**2).mean()).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("patches.Nothing", "model=patches.Nothing: there is no such class"),
        ("nowhere.Model", "model=nowhere.Model: there is no such class"),
        ("patches.Multiples", "model=patches.Multiples is no LanguageModel"),
    ],
)
def test_what_is_no_model_is_refused(model: str, message: str, refused: Run) -> None:
    assert message in refused("--model", model)


def test_an_option_of_another_model_is_refused(refused: Run) -> None:
    assert "unknown setting model.num_experts" in refused("--model.num_experts=5")


def test_a_run_goes_on_with_its_own_class_alone(slm: Run, refused: Run) -> None:
    slm(*PATCHES["rotary positions"], *COMMON, "--trainer.max_epochs=1")
    message = "model=LanguageModel cannot apply to runs/version_0/checkpoints/last.ckpt, whose model is patches.Rotary"
    assert message in refused("--ckpt_path=last", "--model=LanguageModel")
    assert "rope_theta=3.0 cannot apply to a checkpoint" in refused("--ckpt_path=last", "--model.rope_theta=3")


def test_a_file_alone_does_not_choose_whose_code_is_imported(slm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("stranger.py").write_text("raise SystemExit('this code was run')\n")
    monkeypatch.syspath_prepend(str(Path().absolute()))
    model = package.LanguageModel(**SMALL)
    content = {"hyper_parameters": dict(model.hparams), "model_class": "stranger.Model"}
    torch.save({**content, "state_dict": model.transformer.state_dict()}, "weights.pt")
    with pytest.raises(InputError, match=r"weights\.pt holds a stranger\.Model, which is not imported for a file"):
        package.load("weights.pt")
    with pytest.raises(SystemExit):
        main(["validate", "--ckpt_path=weights.pt"])


class Scaled(package.LanguageModel):
    """Changes its network after that is made."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.transformer.final_norm.eps = 0.5


def test_what_a_class_does_to_its_network_is_done_where_the_network_alone_is_read() -> None:
    model = Scaled(**SMALL)
    name = f"{__name__}.Scaled"
    content = {
        "hyper_parameters": dict(model.hparams),
        "model_class": name,
        "state_dict": model.transformer.state_dict(),
    }
    assert restore_network(Path("scaled.pt"), content).final_norm.eps == 0.5
