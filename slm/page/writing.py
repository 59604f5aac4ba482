"""The panel in which the model writes, one token after another, and in which one goes another way."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from html import escape

import torch
from nicegui import ui
from torch import Tensor

from slm.errors import InputError
from slm.model.sampling import Sampler, decode
from slm.page.checkpoints import Checkpoint
from slm.page.drawing import percent
from slm.page.names import visible
from slm.page.parts import Tokens, action, note, panel, tag
from slm.page.worker import Latest, SupersededError, Worker

ALTERNATIVES = 10
MOST_TOKENS = 400
"""Where it stops by itself: more would be more than one reads."""
PAUSE = 0.02
"""Seconds between tokens, in which the browser draws."""


@dataclass(frozen=True)
class Choice:
    """A token that was written.

    Attributes:
        token: its id.
        alternatives: the likeliest tokens there, each with the model's probability and with the one that was drawn
            from; `token` is one of them.
    """

    token: int
    alternatives: dict[int, tuple[float, float]]


class Writing:
    """The panel.

    Args:
        checkpoint: whose model writes.
        worker: where it computes.
        settings: gives temperature, top-k (None for all) and top-p, as they are when a token is chosen.
        share: how strong the colour of a token with a probability is, from 0 to 1.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        worker: Worker,
        settings: Callable[[], tuple[float, int | None, float]],
        share: Callable[[float], float],
    ) -> None:
        self._checkpoint, self._worker, self._settings, self._share = checkpoint, worker, settings, share
        self._prompt: list[int] = []
        self._written: list[Choice] = []
        self._steps: Iterator[Tensor] | None = None
        self._last_choice: Choice | None = None
        self._turn = Latest()
        title = "Let it write"
        with panel(
            title,
            "The model goes on from your text: it draws a token, reads it, and draws the next, with temperature, top-k "
            "and top-p as they are set above. The same seed draws the same text.",
            "Choose a written token to see what else could have stood there. Choose an alternative, and the text goes "
            "on from there.",
        ):
            with ui.element("div").classes("row"):
                self._start = action("Start", self.run, "first")
                self._stop = action("Stop", self.stop)
                action("One token", self.step)
                action("Start over", self._start_over)
                self._seed = ui.number("seed", value=0, min=0, max=2**31, precision=0).props("dense outlined")
                self._seed.style("width: 7rem")
            self._note = note()
            self._tokens = Tokens("what the model wrote", self._show_alternatives)
            self._heading = tag("h3")
            self._choices = ui.element("div").classes("choices").props("role=group")
            self._choices.props["aria-label"] = "alternatives"
        self._mark_running(False)
        ui.context.client.on_disconnect(self.stop)

    def begin(self, prompt: list[int]) -> None:
        """Forget what was written; from here on it goes on from another prompt, the ids of tokens."""
        self._prompt = prompt
        self._start_over()

    async def run(self) -> None:
        """Write until it is told to stop, the text ends, or there is enough."""
        is_wanted = self._turn.new()
        self._mark_running(True)
        while is_wanted() and await self._write_one(is_wanted):
            await asyncio.sleep(PAUSE)
        if is_wanted():
            self._mark_running(False)

    async def step(self) -> None:
        """Write one token."""
        self.stop()
        await self._write_one(self._turn.new())

    def stop(self) -> None:
        """Write no more."""
        self._turn.new()
        self._mark_running(False)

    def _start_over(self) -> None:
        self.stop()
        self._cut(0)
        self._note.set_content("")

    def _cut(self, length: int) -> None:
        del self._written[length:]
        self._steps = None
        self._tokens.cut(length)
        self._heading.set_content("")
        self._choices.clear()

    def _mark_running(self, is_running: bool) -> None:
        for button, is_off in ((self._start, is_running), (self._stop, not is_running)):
            button.props["disabled"] = is_off

    async def _write_one(self, is_wanted: Callable[[], bool]) -> bool:
        """Write a token; returns whether there is more to write."""
        if len(self._written) >= MOST_TOKENS:
            self._note.set_content(f"{MOST_TOKENS} tokens are written, which is enough here: start over for more.")
            return False
        if not self._prompt:
            return False
        try:
            choice = await self._worker.run(self._next, is_wanted)
        except SupersededError:
            self._steps = None  # one step may have been taken that is not shown
            return False
        except InputError as error:
            self._note.set_content(escape(str(error)))
            return False
        self._show(choice)
        if choice.token == self._checkpoint.tokenizer.end_of_text:
            self._note.set_content("The model ended the text here.")
            return False
        self._note.set_content("")
        return True

    def _next(self) -> Choice:
        if self._steps is None:
            seed = int(self._seed.value or 0)
            self._sampler = Sampler(seed=seed)
            ids = [*self._prompt, *(choice.token for choice in self._written)]
            transformer = self._checkpoint.model.transformer
            tokens = torch.tensor([ids], device=transformer.output_weight.device)
            for _ in self._written:  # each has a random number of its own, so that a seed always writes the same
                self._sampler(torch.zeros(1, 2, device=tokens.device))
            self._steps = decode(transformer, tokens, self._choose)
        next(self._steps)
        assert self._last_choice is not None
        return self._last_choice

    def _choose(self, logits: Tensor) -> Tensor:
        logits = logits[:, : self._checkpoint.tokenizer.vocab_size].float()
        self._sampler.temperature, self._sampler.top_k, self._sampler.top_p = self._settings()
        chosen = self._sampler(logits)
        own, drawn_from = logits.softmax(-1)[0], self._sampler.probabilities(logits)[0]
        drawn_from = drawn_from / drawn_from.sum()
        likeliest = own.topk(min(ALTERNATIVES, len(own))).indices.tolist()
        token = int(chosen)
        shown = likeliest if token in likeliest else [*likeliest[:-1], token]
        self._last_choice = Choice(token, {id: (own[id].item(), drawn_from[id].item()) for id in shown})
        return chosen

    def _show(self, choice: Choice) -> None:
        self._written.append(choice)
        name = visible(self._checkpoint.tokenizer, choice.token)
        own, drawn_from = choice.alternatives[choice.token]
        said = f"the model's probability {percent(own)}, drawn with {percent(drawn_from)}"
        tip = f"“{name}” · token {choice.token} · {said}"
        self._tokens.add(name, tip, self._share(own))
        self._show_alternatives(len(self._written) - 1)

    def _show_alternatives(self, place: int) -> None:
        self._tokens.choose(place)
        choice = self._written[place]
        self._heading.set_content(f"What could stand at place {place + 1}")
        self._choices.clear()
        with self._choices:
            for token, (own, drawn_from) in choice.alternatives.items():
                name, is_there = visible(self._checkpoint.tokenizer, token), token == choice.token
                button = tag("button", classes="choice").props("type=button")
                button.set_content(f"<span class=name>{escape(name)}</span><small>{percent(own)}</small>")
                said = "stands there" if is_there else "choose it to go on from there"
                button.props["aria-label"] = f"“{name}”, {percent(own)}, drawn with {percent(drawn_from)}: {said}"
                button.props["aria-current"] = "true" if is_there else "false"
                button.on("click", partial(self._go_another_way, place, token), args=[])

    async def _go_another_way(self, place: int, token: int) -> None:
        """Put another token at a place, cut what comes after it, and go on."""
        self.stop()
        choice = replace(self._written[place], token=token)
        self._cut(place)
        self._show(choice)
        await self.run()
