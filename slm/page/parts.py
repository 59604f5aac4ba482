"""The parts that the page is made of."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from html import escape

from nicegui import ui
from nicegui.events import GenericEventArguments

MOVE_FOCUS = """(event) => {
  const tokens = [...event.currentTarget.querySelectorAll("button")];
  const place = tokens.indexOf(event.target);
  const next = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (next !== undefined) { tokens[next]?.focus(); event.preventDefault(); }
}"""
"""The one thing that a browser must do by itself, since a focus that moves with a delay is none to work with."""


EMIT_VALUE = "(event) => emit(event.target.value)"
"""What a slider or a menu tells the server; these are written as HTML, since Vue would set them back now and then."""


def tag(name: str, text: str = "", classes: str = "") -> ui.html:
    """A plain element with a text."""
    return ui.html(escape(text), tag=name, sanitize=False).classes(classes)


def panel(title: str, *explained: str) -> ui.element:
    """A card with a heading and sentences that explain what it shows."""
    card = ui.element("section").classes("card")
    with card:
        tag("h2", title)
        for sentence in explained:
            tag("p", sentence, "explained")
    return card


def note() -> ui.html:
    """A place for a sentence about what cannot be shown, which is read out when it changes."""
    place = tag("p", classes="note")
    place.props("role=status")
    return place


def action(text: str, on_click: Callable[[], Awaitable[None] | None], classes: str = "") -> ui.html:
    """A button."""
    button = tag("button", text, f"action {classes}").props("type=button")
    button.on("click", on_click, args=[])
    return button


class Slider:
    """A browser's own slider, which all keys move, under its name and its value.

    Args:
        name: what it sets.
        bounds: the lowest value and the highest.
        step: between values.
        value: at first.
        on_change: what is done when it moves.
    """

    def __init__(
        self,
        name: str,
        bounds: tuple[float, float],
        step: float,
        value: float,
        on_change: Callable[[], Awaitable[None]],
    ) -> None:
        self.value = value
        self._name, self._on_change = name, on_change
        with ui.element("div"):
            self._label = ui.html("", sanitize=False)
            low, high = bounds
            slider = (
                f"<input type=range class=slider aria-label='{name}' min={low} max={high} step={step} value={value}>"
            )
            ui.html(slider, sanitize=False).on("input", self._move, js_handler=EMIT_VALUE, throttle=0.05)

    def say(self, value: str) -> None:
        """Show the value in words."""
        self._label.set_content(f"{self._name} <output>{value}</output>")

    async def _move(self, event: GenericEventArguments) -> None:
        self.value = float(event.args)
        await self._on_change()


class Menu:
    """A browser's own menu, from which one thing is chosen.

    Args:
        label: what is chosen with it.
        options: what there is to choose.
        on_change: what is done when another is chosen.
    """

    def __init__(self, label: str, options: Sequence[str], on_change: Callable[[], Awaitable[None]]) -> None:
        self.chosen = 0
        self._label, self._on_change = label, on_change
        self._menu = ui.html("", sanitize=False).classes("menu")
        self._menu.on("change", self._choose, js_handler=EMIT_VALUE)
        self.offer(options)

    def offer(self, options: Sequence[str]) -> None:
        """Offer these; which of them is chosen, by its place, stays as it is."""
        self.chosen = min(self.chosen, len(options) - 1)
        lines = (
            f"<option value={number}{' selected' * (number == self.chosen)}>{escape(option)}</option>"
            for number, option in enumerate(options)
        )
        self._menu.set_content(f"<label>{self._label} <select>{''.join(lines)}</select></label>")

    async def _choose(self, event: GenericEventArguments) -> None:
        self.chosen = int(event.args)
        await self._on_change()


class Tokens:
    """Tokens in a row, each a button with a colour and with what is to be said of it.

    Pointing at one, or moving the focus to it, says it above the row; where neither is, it is said of the chosen one.
    Of the row, Tab reaches the chosen token alone, and the arrow keys the others.

    Args:
        label: what the row is.
        on_choose: what is done when a token is chosen, given its place.
    """

    def __init__(self, label: str, on_choose: Callable[[int], Awaitable[None] | None]) -> None:
        self._on_choose = on_choose
        self._buttons: list[ui.html] = []
        self._breaks: dict[int, ui.element] = {}
        self._tokens: list[tuple[str, str, float]] = []
        self._box = ui.element("div").classes("tokens").props("role=group")
        self._box.props["aria-label"] = label
        self._box.on("keydown", js_handler=MOVE_FOCUS)
        with self._box:
            self._detail = tag("div", classes="detail")
        self.chosen = -1

    def show(self, names: Sequence[str], tips: Sequence[str], shares: Sequence[float], chosen: int) -> None:
        """Put other tokens in the place of those there; see `add`. The first ones stay as far as they are the same."""
        new = list(zip(names, tips, shares, strict=True))
        pairs = zip(new, self._tokens, strict=False)
        num_same = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
        self.cut(min(len(new), len(self._tokens)) if num_same is None else num_same)
        for token in new[len(self._tokens) :]:
            self.add(*token)
        self.choose(chosen)

    def add(self, name: str, tip: str, share: float) -> None:
        """Add one at the end.

        Args:
            name: what is seen of it.
            tip: what is to be said of it.
            share: how strong its colour is, from 0 to 1.
        """
        place = len(self._buttons)
        with self._box:
            button = tag("button", name, "token")
            button.props["type"] = "button"
            button.props["tabindex"] = -1
            button.props["data-tip"] = tip
            button.props["aria-label"] = tip
            button.props["aria-pressed"] = "false"
            button.style(f"--share:{share:.3f}")
            button.on("click", partial(self._on_choose, place), args=[])
            if "↵" in name:
                self._breaks[place] = ui.element("br")
        self._buttons.append(button)
        self._tokens.append((name, tip, share))

    def cut(self, length: int) -> None:
        """Take away all tokens from a place on."""
        for place in range(length, len(self._buttons)):
            self._buttons[place].delete()
            if place in self._breaks:
                self._breaks.pop(place).delete()
        del self._buttons[length:], self._tokens[length:]
        if self.chosen >= length:
            self.chosen = -1
            self._detail.set_content("")

    def choose(self, place: int) -> None:
        """Mark one as the chosen one."""
        for number, is_chosen in ((self.chosen, False), (place, True)):
            if number >= 0:
                button = self._buttons[number]
                button.classes(add="selected" if is_chosen else "", remove="" if is_chosen else "selected")
                button.props["tabindex"] = 0 if is_chosen else -1
                button.props["aria-pressed"] = "true" if is_chosen else "false"
        self.chosen = place
        self._detail.set_content(escape(self._tokens[place][1]))
