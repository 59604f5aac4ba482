"""The panel in which the model writes, one token after another, and in which one goes another way."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html import escape

from nicegui import ui
from nicegui.events import GenericEventArguments

from slm.errors import InputError
from slm.page.checkpoints import Checkpoint
from slm.page.continuation import Choice, Continuation, Place, Settings
from slm.page.drawing import percent
from slm.page.names import visible
from slm.page.parts import Tokens, action, note, panel, tag
from slm.page.worker import Latest, SupersededError, Worker

MOST_TOKENS = 400
"""Where it stops by itself: more would be more than one reads."""
PAUSE, LONGER_PAUSE = 0.02, 0.5
"""Seconds between tokens, in which the browser draws; and between looks whether a browser is back."""
EMIT_CHOICE = "(event) => emit(event.currentTarget.dataset.place, event.currentTarget.dataset.token)"
"""What was seen when it was clicked: meanwhile the server may have put other alternatives there."""


class Writing:
    """The panel.

    Args:
        checkpoint: whose model writes.
        worker: where it computes.
        settings: gives temperature, top-k and top-p as they are when a token is asked for.
        share: how strong the colour of a token with a probability is, from 0 to 1.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        worker: Worker,
        settings: Callable[[], Settings],
        share: Callable[[float], float],
    ) -> None:
        self._checkpoint, self._worker, self._settings, self._share = checkpoint, worker, settings, share
        self._continuation = Continuation(checkpoint, worker.check)
        self._prompt: list[int] = []
        self._written: list[Choice] = []
        self._turn = Latest()
        self._client = ui.context.client
        with panel(
            "Let it write",
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
            self._buttons: list[ui.html] = []
        self._mark_running(False)
        self._client.on_delete(self.stop)

    def begin(self, prompt: list[int]) -> None:
        """Forget what was written; from here on it goes on from another prompt, the ids of tokens."""
        self._prompt = prompt
        self._start_over()

    async def run(self) -> None:
        """Write until it is told to stop, the text ends, or there is enough; it rests while no browser listens."""
        is_wanted = self._turn.new()
        self._mark_running(True)
        while is_wanted() and await self._write_one(is_wanted):
            await asyncio.sleep(PAUSE)
            while is_wanted() and not self._client.has_socket_connection:
                await asyncio.sleep(LONGER_PAUSE)
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
        self._heading.set_content("")
        self._choices.clear()
        self._buttons = []

    def _cut(self, length: int) -> None:
        del self._written[length:]
        self._tokens.cut(length)

    def _mark_running(self, is_running: bool) -> None:
        for button, is_off in ((self._start, is_running), (self._stop, not is_running)):
            button.props["aria-disabled"] = "true" if is_off else "false"  # a disabled one would lose the focus

    async def _write_one(self, is_wanted: Callable[[], bool]) -> bool:
        """Write a token; returns whether there is more to write."""
        if len(self._written) >= MOST_TOKENS:
            self._note.set_content(f"{MOST_TOKENS} tokens are written, which is enough here: start over for more.")
            return False
        if not self._prompt:
            return False
        written = tuple(choice.token for choice in self._written)
        place = Place(tuple(self._prompt), written, int(self._seed.value or 0))
        try:
            choice = await self._worker.run(partial(self._continuation.next, place, self._settings()), is_wanted)
        except SupersededError:
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

    def _show(self, choice: Choice) -> None:
        self._written.append(choice)
        name = visible(self._checkpoint.tokenizer, choice.token)
        own, drawn = choice.alternatives[choice.token]
        said = f"the model's probability {percent(own)}, drawn with {percent(drawn)}"
        tip = f"“{name}” · token {choice.token} · {said}"
        self._tokens.add(name, tip, self._share(own))
        self._show_alternatives(len(self._written) - 1)

    def _show_alternatives(self, place: int) -> None:
        self._tokens.choose(place)
        choice = self._written[place]
        self._heading.set_content(f"What could stand at place {place + 1}")
        with self._choices:
            while len(self._buttons) < len(choice.alternatives):
                button = tag("button", classes="choice").props("type=button")
                button.on("click", self._go_another_way, js_handler=EMIT_CHOICE)
                self._buttons.append(button)
        for button, (token, (own, drawn)) in zip(self._buttons, choice.alternatives.items(), strict=True):
            name, is_there = visible(self._checkpoint.tokenizer, token), token == choice.token
            button.set_content(f"<span class=name>{escape(name)}</span><small>{percent(own)}</small>")
            said = "stands there; choose it to write on from there" if is_there else "choose it to go on from there"
            button.props["aria-label"] = f"“{name}”, {percent(own)}, drawn with {percent(drawn)}: {said}"
            button.props["aria-current"] = "true" if is_there else "false"
            button.props["data-place"], button.props["data-token"] = place, token

    async def _go_another_way(self, event: GenericEventArguments) -> None:
        """Put another token at a place, cut what comes after it, and go on."""
        place, token = map(int, event.args)
        if place >= len(self._written) or token not in self._written[place].alternatives:
            return  # of a text that is no longer there
        self.stop()
        choice = replace(self._written[place], token=token)
        self._cut(place)
        self._show(choice)
        await self.run()
