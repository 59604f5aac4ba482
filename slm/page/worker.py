"""Where the page computes: in a thread beside its server, one thing at a time, and nothing that is no longer wanted."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from slm.errors import InputError
from slm.model.transformer import Transformer

_Result = TypeVar("_Result")


class SupersededError(Exception):
    """What was asked for is no longer wanted: something newer is."""


class Latest:
    """Numbers requests of one kind, of which only the latest counts."""

    def __init__(self) -> None:
        self._number = 0

    def new(self) -> Callable[[], bool]:
        """Begin a request; returns what tells whether it is still the latest."""
        self._number += 1
        number = self._number

        def is_latest() -> bool:
            return number == self._number

        return is_latest


class Worker:
    """A single thread for all that takes time, for all windows of the browser."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._is_wanted: Callable[[], bool] = Latest().new()
        self._interrupted: WeakSet[Transformer] = WeakSet()

    async def run(self, work: Callable[[], _Result], is_wanted: Callable[[], bool]) -> _Result:
        """What the work gives, in inference mode.

        Raises:
            SupersededError: it is not wanted any more. It ends where `check` is called next.
            InputError: it failed. What the page did not foresee, such as too little memory, is logged too.
        """
        result = await asyncio.get_running_loop().run_in_executor(self._thread, self._do, work, is_wanted)
        if not is_wanted():
            raise SupersededError
        return result

    def interrupt(self, network: Transformer) -> None:
        """Let work that is not wanted any more end at the next of a network's blocks."""
        for block in network.blocks if network not in self._interrupted else []:
            block.register_forward_pre_hook(self.check)
        self._interrupted.add(network)

    def check(self, *_: Any) -> None:
        """Raise SupersededError where the work that is being done is not wanted any more."""
        if not self._is_wanted():
            raise SupersededError

    @torch.inference_mode()
    def _do(self, work: Callable[[], _Result], is_wanted: Callable[[], bool]) -> _Result:
        self._is_wanted = is_wanted
        self.check()
        try:
            return work()
        except (InputError, SupersededError):
            raise
        except Exception as error:
            logging.exception("this could not be computed")
            raise InputError(f"this could not be computed: {type(error).__name__}: {error}") from error
