"""To and from the GPT-2 format of the Hugging Face ecosystem.

`python -m slm.export --ckpt_path last --output DIR` writes a folder that `transformers` loads, and
`python -m slm.export --from_gpt2 DIR --output FILE.pt` makes such a folder a file that everything here takes.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm.command.exit_codes import ends_in_one_line
from slm.command.parser import new_parser, parse_flags
from slm.durable import TEMPORARY, give_usual_modes
from slm.errors import NotWrittenError, check
from slm.messages import say, silence_notices
from slm.run.checkpoint import DurableCheckpointIO, open_checkpoint
from slm.run.gpt2 import as_gpt2, as_gpt2_tokenizer, import_transformers, read_gpt2
from slm.run.loading import restore
from slm.runs import read_run

TOLD = ("data.", "trainer.max_", "trainer.precision", "trainer.gradient_clip", "trainer.accumulate", "seed_everything")
"""Settings that a card tells of, beside those of the model."""
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A causal Transformer language model in the format of GPT-2, trained with slm; its weights are those of `{source}`.

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
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    check(is_free, f"output={output} is there and no empty folder: give another name, or remove it")
    path, content = open_checkpoint(ckpt_path, prefer="best")
    model = restore(path, content)
    tokenizer = as_gpt2_tokenizer(content.get("tokenizer"), model.hparams["vocab_size"], model.hparams["max_seq_len"])
    exported = as_gpt2(model, tokenizer.eos_token_id)
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
        source=source.name,
        figures="\n".join(f"| {name} | {value} |" for name, value in figures),
        settings="\n".join(f"{name}: {json.dumps(value)}" for name, value in settings.items()),
    )


def _without_folders(value: Any) -> Any:
    """A path is nobody else's business."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def import_gpt2(from_gpt2: Path, output: Path) -> None:
    """Make a folder with a GPT-2 in the format of `transformers` a file like `simple_language_model.pt`.

    Raises:
        InputError: there is no such folder, what it holds is not the network of this project, the file is there, or
            `transformers` is not.
    """
    check(from_gpt2.is_dir(), f"from_gpt2={from_gpt2} is no folder: give one with config.json and weights")
    check(not output.exists(), f"output={output} is there already: give another name, or remove it")
    check(output.suffix == ".pt", f"output={output} must end in .pt")
    content = read_gpt2(from_gpt2)
    DurableCheckpointIO().save_checkpoint(content, output)
    kind = "without a tokenizer" if content["tokenizer"] is None else "with its tokenizer"
    say(f"{output} holds the weights of {from_gpt2}, {kind}")


def run(ckpt_path: str | None = None, from_gpt2: Path | None = None, output: Path | None = None) -> None:
    """Write a trained model in the format of GPT-2, or with `from_gpt2` read one in it.

    Args:
        ckpt_path: `last` or `best` (of the newest run under `runs/`), a run folder (its best), a `.ckpt` or a `.pt`;
            left out, it is `best`.
        from_gpt2: a folder with a GPT-2 in the format of `transformers`, to be read.
        output: the new or empty folder to be written, or with `from_gpt2` the new `.pt` file.

    Raises:
        InputError: see `write_folder` and `import_gpt2`.
    """
    check(output is not None, "output is missing: say where to with --output")
    assert output is not None
    if from_gpt2 is not None:
        check(ckpt_path is None, f"ckpt_path={ckpt_path} is not read with --from_gpt2: leave one of them out")
        import_gpt2(from_gpt2, output)
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
