"""The models that the page shows: the checkpoint asked for, the others of its run, and how the run began."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slm.command.flags import read_settings
from slm.data import DummyData
from slm.data.dummy import MarkovSource, UniformSource
from slm.data.text_stream import Numbers, stored_tokenizer
from slm.data.tokenizer import Tokenizer
from slm.errors import check
from slm.model.transformer import Transformer
from slm.run.checkpoint import WEIGHTS_NAME, open_checkpoint, read_checkpoint
from slm.run.loading import class_path_of, first_network, restore_network

NONE = "nothing"
EXAMPLE_NUMBERS = 24
KEPT = ("hyper_parameters", "model_class", "tokenizer")


@dataclass(frozen=True)
class Model:
    """A network to look at.

    Attributes:
        name: how the page calls it.
        transformer: in eval mode, on the device that computes.
    """

    name: str
    transformer: Transformer


class Checkpoint:
    """The checkpoint that the page is about.

    Args:
        ckpt_path: `last` or `best` (of the newest run under `runs/`), a run folder (its best), a `.ckpt` or a `.pt`.
        device: where its networks compute.

    Raises:
        InputError: there is no such checkpoint.

    Attributes:
        path: its file.
        model: its network.
        tokenizer: of its text; of dummy data the numbers.
        source: of its dummy tokens, whose probabilities are known; None for text, and where the data is not known.
        example: tokens of the source, or where none is known any.
        others: what can be put beside it: names, each with the file, or None for untrained weights, which come first.
    """

    def __init__(self, ckpt_path: str | Path, device: str) -> None:
        self.path, self._content = open_checkpoint(ckpt_path, prefer="best")
        self._device = device
        hparams = self._content["hyper_parameters"]
        self.model = Model(_name(self.path, self._content), restore_network(self.path, self._content).to(device))
        self.tokenizer: Tokenizer | Numbers = stored_tokenizer(self._content.get("tokenizer"), hparams["vocab_size"])
        self._settings = self._settings_of_run()
        self.source = _source(self._content.get("data") or self._settings.get("data"), hparams)
        numbers = torch.arange(EXAMPLE_NUMBERS) if self.source is None else self.source.sample(EXAMPLE_NUMBERS)
        self.example = [number % hparams["vocab_size"] for number in numbers.tolist()]
        self._seed = seed if isinstance(seed := self._settings.get("seed_everything"), int) else 0
        self.others = self._others()
        self._opened: Model | None = None
        self._content = {name: self._content[name] for name in KEPT if name in self._content}  # without the optimizer

    def open(self, name: str) -> Model:
        """One of the others, the latest of which is kept; raises InputError where it cannot be read or compared."""
        if self._opened is None or self._opened.name != name:
            self._opened = None
            self._opened = Model(name, self._network(self.others[name]).to(self._device))
        return self._opened

    def _network(self, path: Path | None) -> Transformer:
        if path is None:
            return first_network(self.path, self._content, self._seed)
        content, remedy = read_checkpoint(path), f"than {self.path}: the same text is other tokens there"
        check(content.get("tokenizer") == self._content.get("tokenizer"), f"{path} has another tokenizer {remedy}")
        sizes = [given["hyper_parameters"]["vocab_size"] for given in (content, self._content)]
        check(sizes[0] == sizes[1], f"{path} has another vocab_size {remedy}")
        return restore_network(path, content)

    def _run(self) -> Path | None:
        """The folder of its run; None where it lies in none."""
        run = self.path.parent if self.path.name == WEIGHTS_NAME else self.path.parent.parent
        is_in_run = self.path.name == WEIGHTS_NAME or self.path.parent.name == "checkpoints"
        return run if is_in_run and (run / "config.yaml").is_file() else None

    def _settings_of_run(self) -> dict[str, Any]:
        run = self._run()
        return {} if run is None else read_settings(str(run / "config.yaml"))

    def _others(self) -> dict[str, Path | None]:
        others: dict[str, Path | None] = {f"untrained weights, seed {self._seed}": None}
        run = self._run()
        folder = self.path.parent if run is None else run / "checkpoints"
        for path in sorted(folder.glob("*.ckpt")):
            if path != self.path:
                with contextlib.suppress(Exception):  # a damaged file can make torch raise anything
                    others[_name(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))] = path
        return others


def _name(path: Path, content: Mapping[str, Any]) -> str:
    return f"{path.name}, step {content['global_step']:,}" if "global_step" in content else path.name


def _source(data: Any, hparams: Mapping[str, Any]) -> MarkovSource | UniformSource | None:
    """The source of a run's tokens, where its settings name our dummy data."""
    if not isinstance(data, dict) or data.get("class_path") not in ("DummyData", class_path_of(DummyData)):
        return None
    options = data.get("init_args") or {}
    kind = UniformSource if options.get("source") == "uniform" else MarkovSource
    return kind(hparams["vocab_size"], options.get("seed", 0))
