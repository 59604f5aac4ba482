"""How Lightning's Trainer writes and reads checkpoints: whole on the disk, or not at all, and verified."""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from slm.durable import replace_file
from slm.errors import InputError
from slm.run.checkpoint import read_checkpoint


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints durably and reads them verified; a URL goes to Lightning's own writer, without that promise.

    Nothing that is read is ever run: no argument changes it.

    Args:
        content: what the first file that is asked for holds, where that is read already; it is given away then, since
            it is as large as model and optimizer.
    """

    def __init__(self, content: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._content = content

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if _is_url(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            what = re.search(r"GLOBAL (\S+)", str(error))
            raise InputError(
                f"{path} would hold {what[1] if what else 'more than tensors and plain values'} and could not be read "
                "again: let the state of every callback be tensors and plain values"
            ) from error
        replace_file(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        if _is_url(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        content, self._content = self._content, None
        return content or read_checkpoint(Path(path))


def _is_url(path: Any) -> bool:
    return "://" in str(path)
