"""A small causal Transformer language model on PyTorch Lightning.

`slm.load(path)` gives a trained one back, `slm.write(prompt, path)` what it writes. The files, each with its one idea;
a file imports only from those above it:

    errors.py               the errors that speak to the user
    paths.py                settings that are paths: what `~` in them means
    streams.py              standard streams that no message can break
    notices.py              what is said: our own lines; the libraries' notices, silenced by name or made one line
    transformer.py          tokens (B, T) in, hidden states (B, T, D) out: GPT-2's decoder
    loss.py                 cross-entropy from hidden states, without the whole logits
    accumulation.py         what the batches of one optimizer step add up to
    hardware.py             what this machine can do
    optimizer.py            which optimizer steps which parameters, and the learning rate of every step
    source.py               random tokens whose entropy is known exactly
    durable.py              files that are there whole or not at all
    splits.py               what the names in a folder tell: which are data, and of which split
    files.py                which files make up a text, and in which order
    binary.py               what is no text, known by its bytes
    documents.py            a file → its documents, in each kind of file that can hold some
    tokenizer.py            text ↔ token ids: bytes, and byte-level BPE
    streaming.py            token ids, one after another → their text, as soon as it can be shown
    text.py                 a text as it is asked for: its files, and the documents in them
    prepared.py             streams of tokens that were prepared once: kept, known, mapped
    corpus.py               text → one memory-mapped stream of tokens
    loader.py               which window of the stream comes when: a function of (seed, epoch, position)
    token_data.py           a stream as a LightningDataModule: a part held out, windows, their order
    data.py                 the data that there is: DummyData, TextData
    checkpoint.py           how checkpoints are found, read and written
    slurm.py                a job that is requeued, and goes on in the same run
    hyperparameters.py      their ranges, which of them a checkpoint is tied to, and how the others change at a resume
    module.py               the LightningModule: loss, metrics, optimizer, schedule
    trained.py              a checkpoint → the model that it holds
    decoding.py             tokens out of a trained network, one after another
    random_states.py        the states of all random numbers: taken, and put back
    resume.py               where a run stands between two steps, and how it goes on there
    keeper.py               what a run keeps of itself, and when: best, last, at a signal
    drawing.py              pictures: a chart of losses, maps of attention
    curves.py               a run's event files → its curves
    monitor.py              what a run shows while it runs: bar, speed, known optimum
    watch.py                what it shows in TensorBoard beside its curves: samples, attention, embedding
    report.py               what a run reached, and how to go on
    policy.py               the Trainer's settings as asked → the arguments it is built with
    arguments.py            what a command line asks for, and where a resumed run starts
    changes.py              how that differs from what belongs to a checkpoint: said, or refused
    endings.py              how a command ends: exit status and last line
    generate.py             text out of a trained model
    runs.py                 what runs reached, side by side
    gpt2.py                 a network and its tokenizer ↔ the format of GPT-2
    export.py               the commands for it, and the model card
    cli.py                  command line → data, module, trainer
    generate_benchmark.py   how fast text comes
    peers.py                the same model in plain loops, and the turns in which loops are compared
    benchmark.py            how fast, and how far from the limit, for the flags that train.py takes
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["InputError", "LanguageModel", "Settings", "Writer", "load", "write"]
_HOME = {
    "InputError": "errors",
    "LanguageModel": "module",
    "Settings": "generate",
    "Writer": "generate",
    "load": "trained",
    "write": "generate",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import slm` alone stays instant and changes nothing."""
    if name in _HOME:
        return getattr(import_module(f"slm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'slm' has no attribute {name!r}")
