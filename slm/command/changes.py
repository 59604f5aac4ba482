"""How what is asked for differs from what belongs to a checkpoint: said, or refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.command.arguments import Request
from slm.errors import check
from slm.messages import say


def say_what_changed(before: Mapping[str, Any], now: Mapping[str, Any], request: Request) -> bool:
    """Say which settings differ from those that belong to the checkpoint; returns whether other data is meant.

    Raises:
        InputError: a run would go on with other data, on which its best loss means nothing, and that is not meant; or
            it has done more epochs than are asked for.
    """
    check(
        request.subcommand == "fit" or not now.get("allow_changed_data"),
        f"{request.subcommand} takes any data: leave out --allow_changed_data",
    )
    done, wanted = (request.content or {}).get("position", {}).get("epoch", 0), now.get("trainer.max_epochs")
    check(
        request.subcommand != "fit" or wanted is None or not 0 <= wanted < done,
        f"trainer.max_epochs={wanted} is less than the {done} epochs that the run has done: ask for more",
    )
    is_meant = bool(now.get("allow_changed_data"))
    goes_on = request.run is not None and request.checkpoint is not None
    of_text = ("path", "val_path", "glob", "text_field", "errors")  # which is told by its fingerprint
    harmless = ("batch_size", "num_workers", *(of_text if goes_on else []))
    for name in sorted(now.keys() - {"config", "allow_changed_data"}):
        value, stored = now[name], before.get(name)
        if value == stored or (request.run is None and not name.startswith(("model.", "data."))):
            continue
        if name == "data.init_args.tokenizer" and Path(str(value)).is_absolute():
            check(Path(value).is_file(), f"data.tokenizer={value}: there is no such file")
        if name.startswith("data.") and name.rpartition(".")[2] not in harmless:
            check(
                is_meant or not goes_on,
                f"{name}={value} cannot apply to a run that was trained with {stored}: leave it out, or say "
                "--allow_changed_data true, or copy its checkpoint elsewhere and go on from there",
            )
            is_meant = True
        say(f"{name} is now {value} (the run had {stored})")
    return is_meant


def check_same_data(request: Request, fingerprint: str | None) -> None:
    """Raise InputError where a run would go on with data that has changed."""
    stored = (request.content or {}).get("fingerprint")
    check(
        stored in (None, fingerprint),
        f"the data is not what {request.checkpoint} was trained on: its fingerprint is {fingerprint}, the run had "
        f"{stored}; restore it, or say --allow_changed_data true",
    )
