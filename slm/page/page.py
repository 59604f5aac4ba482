"""The page: one text, and all that a model does with it."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from operator import attrgetter
from pathlib import Path

import torch
from nicegui import app, ui
from torch import Tensor

from slm.data.text_stream import Numbers
from slm.data.tokenizer import Tokenizer
from slm.errors import InputError, check
from slm.model.insight import Reading, layer_logits, next_logits, read, surprise
from slm.model.sampling import Sampler
from slm.model.transformer import Transformer
from slm.page.checkpoints import NONE, Checkpoint, Model
from slm.page.continuation import Settings, drawn_from
from slm.page.drawing import Bar, attention_map, bars, layers, percent, picture, shaded, surprised
from slm.page.names import visible
from slm.page.parts import Menu, Slider, Tokens, note, panel, tag
from slm.page.worker import Latest, SupersededError, Worker
from slm.page.writing import Writing

EXAMPLE = "The model reads a text, and after each word it has an idea of the next."
NUM_BARS, NUM_SAID, NUM_NAMED = 15, 5, 3
MAP_TOKENS = 64
CUT_MAP = f"A map shows {MAP_TOKENS} tokens, the chosen one among them; a row lacks what goes to earlier ones."
LARGEST_TOP_K = 50
MOST_SEEN = 1024
"""Tokens of a text that are shown, which is all that GPT-2 reads: each is a button, and more are slow in a browser."""
LONGEST_TEXT = 100_000
"""Characters that the box takes: a longer message would not reach the server."""
TEXT = "text"
"""What a window of the browser keeps when it is loaded anew."""


@dataclass(frozen=True)
class Seen:
    """A text as a model sees it.

    Attributes:
        text: all of it.
        tokens: the ids (T,) that it sees.
        num_tokens: how many the whole text has.
        names: of the tokens.
        reading: what the model computed.
        nats: surprise at each token, and None for the first.
        ranks: its place by probability, and None likewise.
        own: the surprise of the source itself, likewise; None where no source is known.
    """

    text: str
    tokens: list[int]
    num_tokens: int
    names: list[str]
    reading: Reading
    nats: list[float | None]
    ranks: list[int | None]
    own: list[float | None] | None


def mean(values: Sequence[float | None]) -> float:
    """Of those that are there; NaN where none is."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else math.nan


def ids_of(tokenizer: Tokenizer | Numbers, text: str) -> list[int]:
    """The tokens of a text; raises InputError where it has none."""
    try:
        return array(tokenizer.typecode, tokenizer.encode([(text, False)])).tolist()
    except UnicodeEncodeError as error:
        raise InputError("the text is not UTF-8: a character in it is half of one") from error


class Page:
    """One window of the browser.

    Args:
        checkpoint: what is looked at.
        worker: where it computes.
    """

    def __init__(self, checkpoint: Checkpoint, worker: Worker) -> None:
        self.checkpoint, self.worker = checkpoint, worker
        self.transformer = checkpoint.model.transformer
        self.vocab_size = self.transformer.output_weight.shape[0]
        self.longest = min(self.transformer.max_seq_len, MOST_SEEN)
        self.seen: Seen | None = None
        self.other: Model | None = None
        self.theirs: tuple[Model, Seen, Seen] | None = None  # the other model, a text as ours sees it, and as it does
        self.head = self.num_layers = 0
        self._reading, self._placing, self._next, self._layers, self._attention, self._other = (
            Latest() for _ in range(6)
        )
        ui.add_css(Path(__file__).with_name("style.css"))
        self._build()
        ui.timer(0, self._begin, once=True)

    # ---- what stands there

    def _build(self) -> None:
        transformer = self.transformer
        num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
        facts = [
            str(self.checkpoint.path.parent),
            self.checkpoint.model.name,
            f"{num_parameters:,} parameters",
            f"{len(transformer.blocks)} blocks",
            f"sees {transformer.max_seq_len:,} tokens",
            f"{self.vocab_size:,} ids",
            f"on {transformer.output_weight.device.type}",
        ]
        with ui.element("header"):
            tag("h1", "Inside a language model")
            tag("p", " · ".join(facts), "muted")
        has_source = self.checkpoint.source is not None
        with panel("Your text", "Type, and everything below follows. " + self._what_to_type()):
            self.text = ui.textarea(value=self._example(), on_change=self.read_text)
            self.text.props("outlined autogrow debounce=200 spellcheck=false input-class=text")
            self.text.props["maxlength"] = LONGEST_TEXT
            self.text.props["aria-label"] = "your text"
            self.text.style("width: 100%")
            self.note = note()
        self.panels = ui.element("div").style("display: contents")
        with self.panels:
            blind = math.log(self.vocab_size)
            known = (
                "The source of these numbers is known, so beside the model's surprise stands the source's own. On "
                "average over what the source itself gives no model is less surprised; over what you type, one may be."
            )
            with panel(
                "How surprised is it?",
                "Before each token the model gives every possible token a probability. Its surprise is minus the "
                "logarithm of the one that it gave to the token that came, in nats: 0 is certainty, "
                f"{blind:.2f} is a blind guess among {self.vocab_size:,}.",
                *([known] if has_source else []),
            ):
                self.figures = ui.html("", sanitize=False, tag="dl").classes("figures")
                legend = f"<span>0 nats</span><span class=scale></span><span>{blind:.2f} nats or more</span>"
                ui.html(legend, sanitize=False).classes("legend").props("aria-hidden=true")
                self.tokens = Tokens("your text, token by token", self.place)
                tag(
                    "p",
                    "Choose a token, with a click or with the arrow keys and Enter: the panels below are about what "
                    "the model expects after it.",
                    "explained",
                )
            with ui.element("div").classes("two"):
                self._build_next()
                with panel(
                    "What would each layer say?",
                    "The same question, put to the model before it is done: its state after each block goes straight "
                    "to the output layer (this is called the logit lens). So one sees where an answer takes shape.",
                ):
                    self.layers_note = note()
                    self.layers = ui.html("", sanitize=False)
            self._build_attention()
            self.writing = Writing(self.checkpoint, self.worker, self.settings, self.share_of_probability)
            self._build_other()

    def _what_to_type(self) -> str:
        if self.checkpoint.tokenizer.end_of_text is not None:
            signs = (
                r"A space is shown as ·, a line break as ↵, a token that is a part of a character by its bytes: \xc3."
            )
            return f"Its last {self.longest:,} tokens are seen. {signs}"
        return f"This model knows no letters: its tokens are the numbers from 0 to {self.vocab_size - 1:,}."

    def _example(self) -> str:
        if self.checkpoint.tokenizer.end_of_text is not None:
            return EXAMPLE
        return " ".join(map(str, self.checkpoint.example[: self.longest]))

    def _build_next(self) -> None:
        with panel(
            "What comes next?",
            "A temperature below 1 makes likely tokens likelier still, one above 1 evens them out, and 0 leaves the "
            "likeliest alone. Top-k keeps the k likeliest; top-p keeps the likeliest that together have this share.",
        ):
            with ui.element("div").classes("sliders"):
                all_of_them = min(LARGEST_TOP_K, self.vocab_size) + 1
                self.temperature = Slider("temperature", (0, 2), 0.05, 0.8, self.show_next)
                self.top_k = Slider("top-k", (1, all_of_them), 1, all_of_them, self.show_next)
                self.top_p = Slider("top-p", (0.05, 1), 0.05, 1, self.show_next)
            self.next_title = tag("h3")
            self.next = ui.html("", sanitize=False)
            self.next_left = tag("p", classes="muted")

    def _build_attention(self) -> None:
        self.head_buttons: list[ui.html] = []
        with panel(
            "What does it attend to?",
            "In every layer each head mixes into a token what it finds at earlier ones. In a map, a row is a token "
            "that looks back, a column one that it may look at; a row adds up to 1. The fuller the colour, the more: "
            "it goes with the square root of the weight, so that small ones are seen.",
        ):
            self.attention_note = note()
            with ui.element("div").classes("row"):
                self.layer_choice = Menu("layer", ["1"], self.show_attention)
                tag("span", "and its heads; choose one to see it large.", "muted")
            self.heads = ui.element("div").classes("heads")
            self.attended_title = tag("h3")
            self.attended_most = tag("p", classes="muted")
            self.attended = ui.html("", sanitize=False).classes("text attended")
            self.map_title = tag("h3")
            self.map_note = tag("p", classes="muted")
            self.map = ui.html("", sanitize=False)

    def _build_other(self) -> None:
        self.others = [*self.checkpoint.others, NONE]
        with panel(
            "What has it learned?",
            "Another state of the model reads the same text. Untrained weights know nothing: all that is better than "
            "there was learned. Other checkpoints are those in the same folder.",
        ):
            self.other_choice = Menu("beside it", self.others, self._choose_other)
            self.other_note = note()
            self.compared = ui.html("", sanitize=False).classes("compared")

    # ---- what is computed

    def settings(self) -> Settings:
        """Temperature, top-k and top-p as the sliders have them."""
        is_all = self.top_k.value > min(LARGEST_TOP_K, self.vocab_size)
        return Settings(self.temperature.value, None if is_all else int(self.top_k.value), self.top_p.value)

    def share(self, nats: float | None) -> float:
        """How strong the colour of a surprise is: full for a blind guess."""
        return 0.0 if nats is None else min(1.0, nats / math.log(max(2, self.vocab_size)))

    def share_of_probability(self, probability: float) -> float:
        """The same of the probability of a token."""
        return self.share(-math.log(max(probability, 1e-30)))

    def _look(self, transformer: Transformer, text: str) -> Seen:
        """What a model makes of a text; raises InputError where it cannot read it."""
        tokenizer = self.checkpoint.tokenizer
        all_ids = ids_of(tokenizer, text)
        check(bool(all_ids), "The text is empty: type a token at least.")
        ids = all_ids[-min(transformer.max_seq_len, MOST_SEEN) :]
        tokens = torch.tensor(ids)
        reading = read(transformer, tokens.to(transformer.output_weight.device))
        found = surprise(transformer, reading)
        next_logits(transformer, reading.hidden[-1])  # which may not be finite either
        source = self.checkpoint.source
        return Seen(
            text=text,
            tokens=ids,
            num_tokens=len(all_ids),
            names=[visible(tokenizer, token) for token in ids],
            reading=reading,
            nats=[None, *found.nats.tolist()],
            ranks=[None, *found.ranks.tolist()],
            own=None if source is None else [None, *source.surprise(tokens).tolist()],
        )

    def _tip(self, seen: Seen, place: int) -> str:
        """What is said of a token."""
        what = f"“{seen.names[place]}” · token {seen.tokens[place]}"
        nats, rank = seen.nats[place], seen.ranks[place]
        if nats is None or rank is None:
            return f"{what} · the first that the model sees: there is nothing to expect it from"
        own = "" if seen.own is None else f" · the source's own surprise {seen.own[place]:.2f}"
        facts = f"surprise {nats:.2f} nats{own} · probability {percent(math.exp(-nats))}"
        return f"{what} · {facts} · rank {rank:,} of {self.vocab_size:,}"

    # ---- what follows what

    async def _begin(self) -> None:
        await ui.context.client.connected()
        self.text.value = app.storage.tab.setdefault(TEXT, self.text.value)
        await self.read_text()
        await self._choose_other()

    async def read_text(self) -> None:
        """Show everything anew, for another text."""
        is_wanted = self._reading.new()
        self._placing.new()
        self.writing.begin([])
        text = str(self.text.value or "")
        if ui.context.client.has_socket_connection:
            app.storage.tab[TEXT] = text
        try:
            seen = await self.worker.run(partial(self._look, self.transformer, text), is_wanted)
        except SupersededError:
            return
        except InputError as error:
            self.note.set_content(escape(str(error)))
            self.panels.set_visibility(False)
            return
        self.panels.set_visibility(True)
        self.seen = seen
        sentences = [f"The text has {seen.num_tokens:,} tokens. The model sees its last {self.longest:,}, those below."]
        if len(text.encode("utf-16-le", "surrogatepass")) >= 2 * LONGEST_TEXT:  # as a browser counts
            sentences.append(f"The box is full: it takes {LONGEST_TEXT:,} characters, and leaves out what comes after.")
        self.note.set_content(" ".join(sentences) if seen.num_tokens > self.longest else "")
        self.writing.begin(seen.tokens)
        self.figures.set_content(self._figures(seen))
        tips = [self._tip(seen, place) for place in range(len(seen.tokens))]
        self.tokens.show(seen.names, tips, [self.share(nats) for nats in seen.nats], len(seen.tokens) - 1)
        await self.place(len(seen.tokens) - 1)

    def _figures(self, seen: Seen) -> str:
        loss = mean(seen.nats)
        if math.isnan(loss):
            return "<div><dt>mean surprise</dt><dd>needs two tokens</dd></div>"
        figures = [("mean surprise (the loss)", f"{loss:.3f} nats"), ("perplexity", f"{math.exp(min(loss, 99)):,.2f}")]
        if seen.own is not None:
            figures.append(("the source's own mean", f"{mean(seen.own):.3f} nats"))
        return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)

    async def place(self, place: int) -> None:
        """Show all that depends on the chosen token, for another one."""
        is_latest = self._placing.new()
        self.tokens.choose(place)
        for show in (self.show_next, self.show_layers, self.show_attention, self.show_other):
            if is_latest():
                await show()

    def _after(self, seen: Seen, place: int) -> str:
        return f"After token {place + 1} of {len(seen.tokens)}, “{seen.names[place]}”"

    async def show_next(self) -> None:
        """Show the probabilities of the next token."""
        temperature, top_k, top_p = self.settings()
        self.temperature.say(f"{temperature:.2f}")
        self.top_k.say("all" if top_k is None else str(top_k))
        self.top_p.say(f"{top_p:.2f}")
        if (seen := self.seen) is None:
            return
        sampler, place = Sampler(temperature, top_k, top_p), self.tokens.chosen

        def compute() -> tuple[list[Bar], int]:
            logits = next_logits(self.transformer, seen.reading.hidden[place])
            own, changed = logits.softmax(-1), drawn_from(self.checkpoint, sampler, logits)
            likeliest = own.topk(min(NUM_BARS, len(own))).indices
            rows = zip(likeliest.tolist(), own[likeliest].tolist(), changed[likeliest].tolist(), strict=True)
            return [Bar(self._name(token), *both) for token, *both in rows], int((changed > 0).sum())

        try:
            rows, num_left = await self.worker.run(compute, self._next.new())
        except SupersededError:
            return
        except InputError as error:
            self.next_title.set_content("")
            self.next.set_content(escape(str(error)))
            self.next_left.set_content("")
            return
        self.next_title.set_content(escape(self._after(seen, place)))
        self.next.set_content(bars(rows, "model", "drawn", left_out="left out"))
        tokens = "1 token" if num_left == 1 else f"{num_left:,} tokens"
        self.next_left.set_content(f"{tokens} of {self.checkpoint.tokenizer.vocab_size:,} can be drawn.")

    def _name(self, token: int) -> str:
        return visible(self.checkpoint.tokenizer, token)

    async def show_layers(self) -> None:
        """Show what each layer would say."""
        if (seen := self.seen) is None:
            return
        place = self.tokens.chosen
        following = seen.tokens[place + 1] if place + 1 < len(seen.tokens) else None

        def compute() -> str:
            logits = layer_logits(self.transformer, seen.reading, place)
            found = logits.softmax(-1).topk(min(NUM_SAID, self.vocab_size))
            rows = [
                [(self._name(token), probability) for token, probability in zip(*row, strict=True)]
                for row in zip(found.indices.tolist(), found.values.tolist(), strict=True)
            ]
            if following is None:
                return layers(rows, "", [])
            own = logits[:, following, None]
            ranks, probabilities = (logits > own).sum(-1) + 1, logits.softmax(-1)[:, following]
            places = list(zip(probabilities.tolist(), ranks.tolist(), strict=True))
            return layers(rows, self._name(following), places)

        try:
            table = await self.worker.run(compute, self._layers.new())
        except SupersededError:
            return
        except InputError as error:
            self.layers_note.set_content(escape(str(error)))
            self.layers.set_content("")
            return
        self.layers_note.set_content("")
        self.layers.set_content(table)

    async def _choose_head(self, head: int) -> None:
        self.head = head
        await self.show_attention()

    async def show_attention(self) -> None:
        """Show what the heads of a layer attend to."""
        if (seen := self.seen) is None:
            return
        num_layers = len(seen.reading.inputs)
        if num_layers == 0:
            self.attention_note.set_content("This network has none of the attention layers that this page can read.")
            return
        if num_layers != self.num_layers:
            self.num_layers = num_layers
            self.layer_choice.offer([str(layer + 1) for layer in range(num_layers)])
        layer, place = self.layer_choice.chosen, self.tokens.chosen
        end = min(len(seen.tokens), max(MAP_TOKENS, place + 1))
        start = max(0, end - MAP_TOKENS)

        def compute() -> tuple[Tensor, Tensor]:
            weights = seen.reading.attention(layer, start, end).cpu()
            return weights[:, place - start], weights[:, :, start:]

        try:
            rows, maps = await self.worker.run(compute, self._attention.new())
        except SupersededError:
            return
        except InputError as error:
            self.attention_note.set_content(escape(str(error)))
            return
        self.attention_note.set_content("")
        self.head = min(self.head, len(maps) - 1)
        if len(self.head_buttons) != len(maps):
            self._build_heads(len(maps))
        for number, (button, weights) in enumerate(zip(self.head_buttons, maps, strict=True)):
            button.set_content(f"<img src='{picture(weights)}' alt=''>head {number + 1}")
            button.props["aria-pressed"] = "true" if number == self.head else "false"
        name, row = f"Layer {layer + 1}, head {self.head + 1}", rows[self.head].tolist()
        self.attended_title.set_content(f"{name}: what token {place + 1}, “{escape(seen.names[place])}”, attends to")
        most = sorted(range(place + 1), key=lambda at: -row[at])[:NUM_NAMED]
        named = ", ".join(f"“{seen.names[at]}” (token {at + 1}) {percent(row[at])}" for at in most)
        self.attended_most.set_content(escape(f"Most to {named}."))
        self.attended.set_content(shaded(seen.names[: place + 1], row[: place + 1]))
        is_cut = len(seen.tokens) > MAP_TOKENS
        self.map_title.set_content(f"{name}: {f'tokens {start + 1} to {end}' if is_cut else 'every token'}")
        self.map_note.set_content(CUT_MAP if is_cut else "")
        label = f"attention of layer {layer + 1}, head {self.head + 1}, between tokens {start + 1} to {end}"
        self.map.set_content(attention_map(maps[self.head], seen.names[start:end], place - start, label))

    def _build_heads(self, num_heads: int) -> None:
        self.heads.clear()
        with self.heads:
            self.head_buttons = [tag("button", classes="head").props("type=button") for _ in range(num_heads)]
        for head, button in enumerate(self.head_buttons):
            button.on("click", partial(self._choose_head, head), args=[])

    async def _choose_other(self) -> None:
        name, self.other = self.others[self.other_choice.chosen], None
        self.other_note.set_content("")
        is_wanted = self._other.new()
        if name != NONE:
            try:
                self.other = await self.worker.run(partial(self.checkpoint.open, name), is_wanted)
                self.worker.interrupt(self.other.transformer)
            except SupersededError:
                return
            except InputError as error:
                self.other_note.set_content(escape(str(error)))
        await self.show_other()

    async def show_other(self) -> None:
        """Show the other model beside the one that is looked at."""
        seen, other, place = self.seen, self.other, self.tokens.chosen
        if seen is None or other is None:
            self.compared.set_content("")
            return

        def compute() -> str:
            if self.theirs is None or self.theirs[0] is not other or self.theirs[1] is not seen:
                self.theirs = other, seen, self._look(other.transformer, seen.text)
            theirs = self.theirs[2]
            there = place - len(seen.tokens) + len(theirs.tokens)  # both see the end of the text
            check(there >= 0, f"{other.name} sees the last {len(theirs.tokens)} tokens alone, and not the chosen one")
            looks = ((self.checkpoint.model, seen, place), (other, theirs, there))
            ours, others = (
                next_logits(model.transformer, found.reading.hidden[at]).softmax(-1) for model, found, at in looks
            )
            size = min(NUM_BARS, self.vocab_size) // 2
            both = [*ours.topk(size).indices.tolist(), *others.topk(size).indices.tolist()]
            rows = [Bar(self._name(id), others[id].item(), ours[id].item()) for id in dict.fromkeys(both)]
            rows.sort(key=attrgetter("second"), reverse=True)
            texts = [self._told(model.name, found, at) for model, found, at in looks]
            title = f"<h3>{escape(self._after(seen, place))}</h3>"
            return "".join(texts) + title + bars(rows, other.name, self.checkpoint.model.name)

        try:
            compared = await self.worker.run(compute, self._other.new())
        except SupersededError:
            return
        except InputError as error:
            self.other_note.set_content(escape(str(error)))
            self.compared.set_content("")
            return
        self.other_note.set_content("")
        self.compared.set_content(compared)

    def _told(self, name: str, seen: Seen, place: int) -> str:
        """A text with its surprise in colours, and what it comes to."""
        loss = mean(seen.nats)
        figures = "" if math.isnan(loss) else f": {loss:.3f} nats, perplexity {math.exp(min(loss, 99)):,.2f}"
        tips = [self._tip(seen, number) for number in range(len(seen.tokens))]
        tokens = surprised(seen.names, [self.share(nats) for nats in seen.nats], tips, place)
        return f"<h3>{escape(name)}{figures}</h3><div class=text>{tokens}</div>"
