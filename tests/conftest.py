"""What all tests share: one thread, so that results are the same bits on every machine of a kind, and small sizes."""

import functools
import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from slm.cli import main
from slm.command.parser import TrainingParser
from slm.command.settings import read_command
from slm.command.trainer import check_trainer, new_trainer
from slm.data import DummyData, TextData, TokenData
from slm.data.tokenizer import train_bpe
from slm.errors import InputError
from slm.hardware import prepare_cpu
from slm.training.language_model import LanguageModel

ROOT = Path(__file__).parent.parent
SMALL = {"vocab_size": 20, "embed_dim": 16, "num_heads": 2, "num_layers": 1, "hidden_dim": 32, "max_seq_len": 16}
SMALL_FLAGS = [f"--model.{name}={size}" for name, size in SMALL.items()] + ["--data.num_tokens=2000"]
UNSHOWN = [f"--watch.{part}=false" for part in ("samples", "attention", "embedding", "loss_figure")]
"""Nothing is drawn beside the curves, which takes as long as a small run itself."""

OF_THE_MACHINE = re.compile("precision 16-mixed(:| becomes) | tokens/s on ")
"""Lines that a run says on some machines alone: those with a certain precision, and those that take their time."""

RHYME = "one two three four five six seven. "

torch.set_num_threads(1)
prepare_cpu()
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """What was imported stays; a collection of garbage that looks through all of it takes longer than a small test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared texts stay out of the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def parsers() -> Iterator[None]:
    """A parser is built once for each class of model, which takes longer than to use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slm.command.settings.TrainingParser", functools.cache(TrainingParser))
        yield


@pytest.fixture(scope="session")
def rhyming(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that know a rhyme by heart, so surely that they write it on every processor."""
    folder = tmp_path_factory.mktemp("rhyming")
    (folder / "rhyme.txt").write_text(RHYME * 200)
    data = TextData(256, 16, path=str(folder / "rhyme.txt"), batch_size=8)
    sizes = {"vocab_size": 256, "embed_dim": 64, "num_heads": 4, "hidden_dim": 128}
    model = small_model(**sizes, learning_rate=3e-3, schedule="cosine")
    fit(model, data, max_epochs=10, limit_val_batches=0)
    letters = torch.tensor(list((RHYME * 2).encode())).unfold(0, 17, 1)[: len(RHYME)]  # begun at each of its letters
    with torch.no_grad():
        probabilities = model(letters[:, :-1]).softmax(-1).gather(-1, letters[:, 1:, None])[..., 0]
    assert probabilities[:, 3:].min() > 0.95  # any four letters of it tell the next
    assert probabilities[0, 2] > 0.95  # and so does "one"
    content = {"hyper_parameters": dict(model.hparams), "tokenizer": "bytes"}
    torch.save({**content, "state_dict": model.transformer.state_dict()}, folder / "weights.pt")
    return folder / "weights.pt"


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that `trained` copies."""
    folder = tmp_path_factory.mktemp("shared_run")
    flags = ["--trainer.max_epochs=2", "--data.seed=3", "--trainer.precision=32-true", "--trainer.log_every_n_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*SMALL_FLAGS, *UNSHOWN, "--trainer.enable_progress_bar=false", *flags])
    return folder / "runs"


@pytest.fixture
def trained(shared_run: Path, workdir: Path) -> Path:
    """A run of two epochs with settings of its own, in runs/version_0: as good as one trained there, and sooner."""
    shutil.copytree(shared_run, workdir / "runs")
    return Path("runs/version_0")


@pytest.fixture
def slm(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command line in this process, in an empty directory; returns all that it prints."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        main(list(argv))
        return "".join(capsys.readouterr())

    return run


def not_of_the_machine(said: str) -> list[str]:
    """The lines that are said on every machine."""
    return [line for line in said.splitlines() if not OF_THE_MACHINE.search(line)]


@pytest.fixture
def refused(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command line, which must refuse: exit status 2, one line on stderr, no new file; returns the line."""

    def run(*argv: str) -> str:
        before = sorted(workdir.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main(list(argv))
        assert exit_info.value.code == 2
        said = not_of_the_machine(capsys.readouterr().err)
        lines = [line for line in said if not re.search(r" is now .* \(the run had ", line)]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert [path for path in sorted(workdir.rglob("*")) if path not in before and path.name != "runs"] == []
        return lines[0]

    return run


def refusal(*argv: str) -> str:
    """The message with which a command is refused before anything is trained or written."""
    with pytest.raises(InputError) as error_info:
        prepare(argv)
    return str(error_info.value)


def prepare(argv: Sequence[str]) -> None:
    """What `slm.cli.train` does before a run has a folder, with the Trainer made."""
    command = read_command(argv)
    data = command.new_data(command.new_model())
    settings = command.instantiate()
    check_trainer(vars(settings.trainer))
    data.setup()
    new_trainer(command, settings, None)


def slow_after_first(values: Iterable[Any]) -> list[Any]:
    """The values of a test's parameters, of which all but the first are tried among the slow tests."""
    sets = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=[pytest.mark.slow] if number else []) for number, value in enumerate(sets)]


def small_model(**changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(**{**SMALL, **changes})


def small_data(**changes: Any) -> DummyData:
    return DummyData(**{"vocab_size": 20, "max_seq_len": 16, "num_tokens": 2000, **changes})


def fit(model: LanguageModel, data: TokenData | None = None, **flags: Any) -> Trainer:
    """Train without any of the command line's help."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            **quiet,
            **flags,
        }
    )
    trainer.fit(model, datamodule=data or small_data())
    return trainer


def llama_folder(
    folder: str, dtype: torch.dtype = torch.float32, sizes: Mapping[str, Any] = {}, **settings: Any
) -> Any:
    """A small model in the shape of SmolLM2 and a tokenizer that cuts words as its does, in a folder; returns it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 300, "hidden_size": 36, "intermediate_size": 48, "max_position_embeddings": 24}
    config = transformers.LlamaConfig(
        **{**small, **sizes}, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3,
        rope_theta=100_000.0, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder, **settings)
    Path(folder, "tokenizer.json").write_text(cutting_digits(train_bpe(iter([RHYME]), 280).dump()))
    return model


def cutting_digits(bpe: str) -> str:
    """The same tokenizer cutting as SmolLM2's does: every digit is a word of its own."""
    library = pytest.importorskip("tokenizers")
    tokenizer, pre = library.Tokenizer.from_str(bpe), library.pre_tokenizers
    tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    tokenizer.add_tokens(["Katze"])
    return str(tokenizer.to_str())


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each sequence, which must be so by far more than rounding can change."""
    first, second = logits.topk(2).values.unbind(-1)
    assert (first - second).min() > 1e-3
    return logits.argmax(-1)


def run_command(*argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A real process of this interpreter, which may take its time on a slow machine, but not hang."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
