"""To the formats of the Hugging Face ecosystem and of llama.cpp, and back from the first.

`python -m slm.export --ckpt_path last --output DIR` writes a folder that `transformers` loads, with `--format gguf
--output FILE.gguf` a file that llama.cpp loads; `python -m slm.export --from_hf DIR --output FILE.pt` makes a folder of
the first kind a file that everything here takes.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from slm.command.exit_codes import ends_in_one_line
from slm.command.flags import new_parser, parse_flags
from slm.durable import TEMPORARY, give_usual_modes
from slm.errors import NotWrittenError, check
from slm.formats.gguf import import_gguf, write_gguf
from slm.formats.hugging_face import as_transformers, import_transformers, read_transformers
from slm.formats.tokenizers import as_transformers_tokenizer, dumped_tokenizer
from slm.messages import say, silence_notices
from slm.research.runs import read_run
from slm.run.checkpoint import open_checkpoint
from slm.run.checkpoint_io import DurableCheckpointIO
from slm.run.loading import restore

TOLD = ("data.", "trainer.max_", "trainer.precision", "trainer.gradient_clip", "trainer.accumulate", "seed_everything")
"""Settings that a card tells of, beside those of the model."""
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A causal Transformer language model of the family of {family}, trained with slm; its weights are those of `{source}`.

| | |
|---|---|
{figures}

Losses are in nats per token of the held-out split. The settings of its run:

```yaml
{settings}
```
"""


def write_folder(ckpt_path: str, output: Path) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load: weights, tokenizer and a model card.

    Raises:
        InputError: there is no such checkpoint, the folder is not empty or cannot be written, or `transformers` is not
            there.
    """
    import_transformers()
    is_free = not os.path.exists(output) or (output.is_dir() and not any(output.iterdir()))
    check(is_free, f"output={output} is there and no empty folder: give another name, or remove it")
    path, content = open_checkpoint(ckpt_path, prefer="best")
    model = restore(path, content)
    hparams = model.hparams
    tokenizer = as_transformers_tokenizer(content.get("tokenizer"), hparams["vocab_size"], hparams["max_seq_len"])
    exported = as_transformers(model, tokenizer.eos_token_id)
    unfinished = output.absolute().with_name(output.absolute().name + TEMPORARY)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        exported.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        _name_tokenizer_class(unfinished / "tokenizer_config.json")
        _write_merges_as_text(unfinished / "tokenizer.json")
        num_parameters = sum(weight.numel() for weight in model.transformer.parameters())
        (unfinished / "README.md").write_text(model_card(path, content, num_parameters), encoding="utf-8")
        give_usual_modes(unfinished)
        os.replace(unfinished, output.absolute())
    except Exception as error:  # the writer of weights has errors of its own
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, OSError) and "SafetensorError" not in type(error).__name__:
            raise
        raise NotWrittenError(f"output={output} cannot be written: {error}; make room, or permit writing") from error
    say(f"{path} is exported to {output}")


def _name_tokenizer_class(path: Path) -> None:
    """Name the class as every version of `transformers` knows it."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_merges_as_text(path: Path) -> None:
    """Write the merges of BPE as `"a b"`, which every version of `tokenizers` reads; before 0.20 none read pairs."""
    content = json.loads(path.read_text(encoding="utf-8"))
    merges = content["model"].get("merges", [])
    if any(" " in part for merge in merges for part in merge):  # as text it could not be taken apart again
        return
    content["model"]["merges"] = [" ".join(merge) for merge in merges]
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(source: Path, content: Mapping[str, Any], num_parameters: int) -> str:
    """A checkpoint's card in Markdown, with the figures and settings of its run where the folder of that is there."""
    settings = {f"model.{name}": value for name, value in content["hyper_parameters"].items()}
    source = source.absolute()
    folder = source.parent.parent if source.parent.name == "checkpoints" else source.parent
    run = read_run(folder) if (folder / "config.yaml").is_file() else None
    figures = [("parameters", f"{num_parameters:,}")]
    if run is not None:
        settings |= {name: _without_folders(value) for name, value in run.settings.items() if name.startswith(TOLD)}
        figures += run.figures(run.last_step(content["global_step"]) if "global_step" in content else run.best_step)
    return CARD.format(
        name=folder.absolute().name if run else source.stem,
        family={"gpt2": "GPT-2", "llama": "Llama"}[content["hyper_parameters"].get("architecture", "gpt2")],
        source=source.name,
        figures="\n".join(f"| {name} | {value} |" for name, value in figures),
        settings="\n".join(f"{name}: {json.dumps(value)}" for name, value in settings.items()),
    )


def _without_folders(value: Any) -> Any:
    """A path is nobody else's business."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def write_file(ckpt_path: str, output: Path) -> None:
    """Write a file that llama.cpp loads: weights and tokenizer.

    Raises:
        InputError: there is no such checkpoint, llama.cpp knows no such network or tokenizer, the file is there or
            cannot be written, or the package `gguf` is not there.
    """
    _check_new(output, ".gguf")
    import_gguf()
    path, content = open_checkpoint(ckpt_path, prefer="best")
    write_gguf(restore(path, content), content.get("tokenizer"), output)
    say(f"{path} is exported to {output}")


def _check_new(output: Path, suffix: str) -> None:
    check(not os.path.exists(output), f"output={output} is there already: give another name, or remove it")
    check(output.suffix == suffix, f"output={output} must end in {suffix}")


def import_folder(from_hf: Path, output: Path) -> None:
    """Make a folder in the format of `transformers` a file like `simple_language_model.pt`.

    Raises:
        InputError: there is no such folder, what it holds is not a network of this project, or the file is there.
    """
    _check_new(output, ".pt")
    has_config = (from_hf / "config.json").is_file()
    check(has_config, f"from_hf={from_hf} is no folder with a model: give one with config.json and weights")
    hparams, state = read_transformers(from_hf)
    tokenizer = dumped_tokenizer(from_hf, hparams["vocab_size"])
    content = {"hyper_parameters": hparams, "state_dict": state, "tokenizer": tokenizer}
    DurableCheckpointIO().save_checkpoint(content, output)
    without = f"without a tokenizer, since {from_hf} has none of text: it reads and writes the numbers of tokens"
    say(f"{output} holds the weights of {from_hf}, {without if tokenizer is None else 'with its tokenizer'}")


def run(
    ckpt_path: str | None = None,
    format: Literal["hf", "gguf"] = "hf",
    from_hf: Path | None = None,
    output: Path | None = None,
) -> None:
    """Write a trained model in another format, or with `from_hf` read one.

    Args:
        ckpt_path: `last` or `best` (of the newest run under `runs/`), a run folder (its best), a `.ckpt` or a `.pt`;
            left out, it is `best`.
        format: `hf`, a folder for `transformers`, or `gguf`, a file for llama.cpp.
        from_hf: a folder with a GPT-2 or a Llama in the format of `transformers`, to be read.
        output: the new or empty folder, or the new `.gguf` file; with `from_hf` the new `.pt` file.

    Raises:
        InputError: see `write_folder`, `write_file` and `import_folder`.
    """
    check(output is not None, "output is missing: say where to with --output")
    assert output is not None
    if from_hf is not None:
        check(ckpt_path is None, f"ckpt_path={ckpt_path} is not read with --from_hf: leave one of them out")
        check(format == "hf", f"format={format} is not read, only written: leave out --format or --from_hf")
        import_folder(from_hf, output)
    elif format == "gguf":
        write_file(ckpt_path or "best", output)
    else:
        write_folder(ckpt_path or "best", output)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = new_parser("export")
    parser.add_function_arguments(run)
    silence_notices()
    with ends_in_one_line():
        run(**vars(parse_flags(parser, argv)))


if __name__ == "__main__":
    main()
