"""The page in a real browser: all of it is used and seen, it asks this machine alone, and nothing is an error."""

import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import RHYME, ROOT, small_model

from slm.data.dummy import MarkovSource
from slm.run.checkpoint import open_checkpoint
from slm.run.loading import first_network, load

pytest.importorskip("nicegui", reason="the extra look is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]

PATIENCE = 60_000
"""Milliseconds until something that should be seen is given up: a slow machine is no fault."""
NOTING = """
import os, time
from slm import LanguageModel
from slm.model.transformer import Transformer

class NotingTransformer(Transformer):
    def forward(self, tokens, caches=None):
        with open("calls", "a") as file:
            file.write(".")
        time.sleep(0.05)
        return super().forward(tokens, caches)

class Noting(LanguageModel):
    network = NotingTransformer
"""


@contextmanager
def served(cwd: Path, ckpt_path: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page of a checkpoint, at an address, from a process of its own, which is ended with Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "slm.look", f"--ckpt_path={ckpt_path}", "--show=false", f"--port={port}"]
    environment = {"PATH": "/usr/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(cwd)}
    log = cwd / "log"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where it is ignored, its children ignore it too
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=file, stderr=file, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/", process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    said = log.read_text()
    assert said == f"http://127.0.0.1:{port} shows {ckpt_path_of(cwd, ckpt_path)}; Ctrl-C ends it\n"
    assert process.returncode == 130
    assert not (cwd / ".nicegui").exists()


def ckpt_path_of(cwd: Path, ckpt_path: str) -> str:
    return f"runs/version_0/checkpoints/{ckpt_path}.ckpt" if ckpt_path in ("best", "last") else ckpt_path


@pytest.fixture(scope="module")
def rhyme_page(rhyming: Path) -> Iterator[str]:
    """Of a model of bytes that knows a rhyme by heart."""
    with served(rhyming.parent, rhyming.name) as (address, _):
        yield address


@pytest.fixture(scope="module")
def run_page(shared_run: Path) -> Iterator[str]:
    """Of a run of dummy data."""
    with served(shared_run.parent, "best") as (address, _):
        yield address


def bytes_model(**changes: Any) -> dict[str, Any]:
    """A checkpoint of a model of bytes with weights that were moved, so that all differs."""
    model = small_model(vocab_size=256, num_layers=2, max_seq_len=96, **changes)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    content = {"hyper_parameters": dict(model.hparams), "tokenizer": "bytes"}
    return {**content, "state_dict": model.transformer.state_dict()}


@pytest.fixture(scope="module")
def llama_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a Llama of two layers that was not trained."""
    folder = tmp_path_factory.mktemp("llama")
    torch.save(bytes_model(architecture="llama", num_heads=4, num_kv_heads=2), folder / "llama.pt")
    with served(folder, "llama.pt") as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page and waits until it is complete; at the end, nothing may have gone wrong or to another machine."""
    pages, asked, wrong = [], [], []

    def open_page(address: str, width: int = 1200, is_complete: bool = True) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(PATIENCE)
        sync_api.expect.set_options(timeout=PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda websocket: asked.append(websocket.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        if is_complete:
            page.locator("svg[role=img]").wait_for()
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert asked
    others = [url for url in asked if not re.match(r"(http|ws)://127\.0\.0\.1:\d+/|data:|blob:", url)]
    assert others == []
    assert wrong == []


def tokens_in(page: Any) -> Any:
    return page.get_by_role("group", name="your text, token by token").get_by_role("button")


def written_in(page: Any) -> Any:
    return page.get_by_role("group", name="what the model wrote").get_by_role("button")


def section(page: Any, title: str) -> Any:
    return page.locator("section").filter(has=page.get_by_role("heading", name=title, exact=True))


def type_text(page: Any, text: str, num_tokens: int) -> None:
    page.get_by_label("your text", exact=True).fill(text)
    sync_api.expect(tokens_in(page)).to_have_count(num_tokens)


def column(page: Any, title: str, number: int) -> list[str]:
    """The cells of a column of a panel's chart."""
    return section(page, title).locator(f"table.chart tbody tr td:nth-child({number})").all_inner_texts()


def choose_beside(page: Any, name: str) -> None:
    menu = page.get_by_role("combobox", name="beside it")
    menu.select_option(label=menu.locator("option").filter(has_text=name).inner_text())


def slide(page: Any, name: str, key: str, times: int = 1) -> None:
    for _ in range(times):
        page.get_by_role("slider", name=name).press(key)


def test_each_token_says_how_surprised_the_model_was(visit: Callable[..., Any], rhyme_page: str, rhyming: Path) -> None:
    page, text = visit(rhyme_page), "one two thXee"
    type_text(page, text, len(text))
    ids = torch.tensor(list(text.encode()))
    with torch.no_grad():
        logits = load(rhyming)(ids[None])[0, :-1]
    nats = F.cross_entropy(logits, ids[1:], reduction="none")
    for place, tip in enumerate([button.get_attribute("aria-label") for button in tokens_in(page).all()]):
        assert f"token {ids[place]} ·" in tip
        if place:
            probability = 100 * math.exp(-nats[place - 1])
            rank = int((logits[place - 1] > logits[place - 1, ids[place]]).sum()) + 1
            assert f"surprise {nats[place - 1]:.2f} nats" in tip
            assert f"rank {rank} of 256" in tip
            assert float(re.search(r"probability <? ?([\d.]+) %", tip)[1]) == pytest.approx(probability, abs=0.06)
    shares = [
        float(re.search(r"--share: ?([\d.]+)", button.get_attribute("style"))[1]) for button in tokens_in(page).all()
    ]
    assert shares[text.index("X")] == 1.0 > max(shares[:7])
    figures = section(page, "How surprised is it?").locator("dl")
    sync_api.expect(figures).to_contain_text(f"{nats.mean():.3f} nats")
    sync_api.expect(figures).to_contain_text(f"{nats.mean().exp():,.2f}")


def test_pointing_and_the_focus_show_what_is_to_be_said_of_a_token(visit: Callable[..., Any], rhyme_page: str) -> None:
    page = visit(rhyme_page)
    type_text(page, "one two", 7)
    shown = "element => getComputedStyle(element, '::after').content"
    second = tokens_in(page).nth(1)
    assert second.evaluate(shown) == "none"
    second.hover()
    assert "“n” · token 110 · surprise" in second.evaluate(shown)
    page.mouse.move(0, 0)
    assert second.evaluate(shown) == "none"
    tokens_in(page).nth(6).focus()
    page.keyboard.press("ArrowLeft")
    assert "“w” · token 119 · surprise" in tokens_in(page).nth(5).evaluate(shown)


def test_the_sources_own_surprise_stands_beside_the_models(visit: Callable[..., Any], run_page: str) -> None:
    page, numbers = visit(run_page), [3, 5, 17, 2, 2, 11]
    type_text(page, " ".join(map(str, numbers)), 6)
    own = MarkovSource(20, seed=3).surprise(torch.tensor(numbers))
    sync_api.expect(section(page, "How surprised is it?")).to_contain_text(f"{own.mean():.3f} nats")
    for place in range(1, 6):
        tip = tokens_in(page).nth(place).get_attribute("aria-label")
        assert f"the source's own surprise {own[place - 1]:.2f}" in tip


def test_the_example_of_a_model_of_numbers_is_from_its_source(visit: Callable[..., Any], run_page: str) -> None:
    page = visit(run_page)
    numbers = page.get_by_label("your text", exact=True).input_value().split()
    assert numbers == [str(number) for number in MarkovSource(20, seed=3).sample(24)[:16].tolist()]


def test_sliders_change_what_is_drawn_with_and_not_what_the_model_says(
    visit: Callable[..., Any], llama_page: str
) -> None:
    page, title = visit(llama_page), "What comes next?"
    type_text(page, "one", 3)
    own, drawn = column(page, title, 3), column(page, title, 4)
    assert len(own) == 15
    slide(page, "temperature", "Home")
    panel = section(page, title)
    sync_api.expect(panel).to_contain_text("1 token of 256 can be drawn")
    assert column(page, title, 3) == own
    assert column(page, title, 4) == ["100.0 %", *["left out"] * 14]
    slide(page, "temperature", "End")
    sync_api.expect(panel).to_contain_text("256 tokens of 256 can be drawn")
    assert float(column(page, title, 4)[0].split()[0]) < float(drawn[0].split()[0])  # 2.0 evens them out
    slide(page, "top-k", "Home")
    sync_api.expect(panel).to_contain_text("1 token of 256 can be drawn")
    slide(page, "top-k", "ArrowRight", times=3)
    sync_api.expect(panel).to_contain_text("4 tokens of 256 can be drawn")
    assert column(page, title, 4)[4:] == ["left out"] * 11
    slide(page, "top-k", "End")
    slide(page, "top-p", "Home")
    sync_api.expect(panel).not_to_contain_text("256 tokens of 256 can be drawn")
    assert column(page, title, 4).count("left out") > 5


def test_a_chosen_token_is_what_the_other_panels_are_about(visit: Callable[..., Any], llama_page: str) -> None:
    page = visit(llama_page)
    type_text(page, "one two", 7)
    tokens_in(page).nth(2).click()
    sync_api.expect(tokens_in(page).nth(2)).to_have_attribute("aria-pressed", "true")
    sync_api.expect(section(page, "What comes next?")).to_contain_text("After token 3 of 7, “e”")
    sync_api.expect(section(page, "What does it attend to?")).to_contain_text("what token 3, “e”, attends to")
    sync_api.expect(section(page, "What would each layer say?")).to_contain_text("· followed")
    assert section(page, "What does it attend to?").locator(".attended span").count() == 3


def test_the_last_layer_says_what_the_model_says(visit: Callable[..., Any], llama_page: str) -> None:
    page = visit(llama_page)
    type_text(page, "one two", 7)
    tokens_in(page).nth(2).click()
    lens = section(page, "What would each layer say?")
    sync_api.expect(lens.locator("tbody tr")).to_have_count(3)
    sync_api.expect(lens.locator("thead")).to_contain_text("· followed")
    assert lens.locator("tbody th").all_inner_texts() == ["embedding", "block 1", "block 2"]
    rows = [row.locator("td.said small").all_inner_texts() for row in lens.locator("tbody tr").all()]
    sync_api.expect(section(page, "What comes next?")).to_contain_text("After token 3 of 7")
    assert rows[2] == column(page, "What comes next?", 3)[:5]
    assert rows[0] != rows[2]
    space = tokens_in(page).nth(3).get_attribute("aria-label")
    rank = re.search(r"rank (\d+) of", space)[1]
    assert lens.locator("tbody tr").nth(2).locator("td.rank").inner_text().split()[1] == rank


def test_every_head_of_every_layer_can_be_looked_at(visit: Callable[..., Any], llama_page: str) -> None:
    page = visit(llama_page)
    text = "x" * 70
    type_text(page, text, 70)
    panel = section(page, "What does it attend to?")
    heads = panel.get_by_role("button", name=re.compile("head"))
    sync_api.expect(heads).to_have_count(4)
    seen = set()
    for layer in ("layer 1", "layer 2"):
        page.get_by_role("combobox", name="layer").select_option(label=layer.split()[1])
        for head in range(4):
            heads.nth(head).click()
            label = f"attention of {layer}, head {head + 1}, between tokens 7 to 70"
            drawing = panel.get_by_role("img", name=label)
            drawing.wait_for()
            seen.add(drawing.locator("image").get_attribute("href"))
            assert drawing.locator("text").count() == 2 * 64
            sync_api.expect(heads.nth(head)).to_have_attribute("aria-pressed", "true")
    assert len(seen) == 8
    sync_api.expect(panel).to_contain_text("A map shows 64 tokens, the chosen one among them")


def test_it_writes_what_it_knows_and_stops(visit: Callable[..., Any], rhyme_page: str) -> None:
    page = visit(rhyme_page)
    type_text(page, "one two three f", 15)
    slide(page, "temperature", "Home")
    page.get_by_role("button", name="One token").click()
    sync_api.expect(written_in(page)).to_have_count(1)
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.tokens')[1].querySelectorAll('button').length > 30")
    page.get_by_role("button", name="Stop").click()
    sync_api.expect(page.get_by_role("button", name="Start", exact=True)).to_be_enabled()
    count = written_in(page).count()
    said = "".join(written_in(page).all_inner_texts()).replace("·", " ")
    assert said == (RHYME * 20)[15 : 15 + count]
    page.wait_for_timeout(1000)
    assert written_in(page).count() == count
    page.get_by_role("button", name="Start over").click()
    sync_api.expect(written_in(page)).to_have_count(0)


def test_an_alternative_is_another_way_from_there(visit: Callable[..., Any], rhyme_page: str) -> None:
    page = visit(rhyme_page)
    type_text(page, "one two three f", 15)
    slide(page, "temperature", "Home")
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.tokens')[1].querySelectorAll('button').length > 12")
    page.get_by_role("button", name="Stop").click()
    written_in(page).nth(1).click()  # "four": "u" after "fo"
    sync_api.expect(page.get_by_text("What could stand at place 2", exact=True)).to_be_visible()
    choices = page.get_by_role("group", name="alternatives").get_by_role("button")
    sync_api.expect(choices).to_have_count(10)
    assert choices.nth(0).get_attribute("aria-current") == "true"
    assert "%" in choices.nth(1).inner_text()
    other = choices.nth(1).locator(".name").inner_text()
    choices.nth(1).click()
    sync_api.expect(written_in(page).nth(1)).to_have_text(other)
    page.wait_for_function("document.querySelectorAll('.tokens')[1].querySelectorAll('button').length > 12")
    page.get_by_role("button", name="Stop").click()
    assert written_in(page).nth(0).inner_text() == "o"


def write_at_least(page: Any, num_tokens: int) -> list[str]:
    """Start, wait for so many tokens, stop; returns so many of them."""
    if page.get_by_role("button", name="Start", exact=True).is_enabled():
        page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_function(f"document.querySelectorAll('.tokens')[1].querySelectorAll('button').length >= {num_tokens}")
    page.get_by_role("button", name="Stop").click()
    sync_api.expect(page.get_by_role("button", name="Start", exact=True)).to_be_enabled()
    return written_in(page).all_inner_texts()[:num_tokens]


def test_a_seed_writes_the_same_wherever_it_goes_on(visit: Callable[..., Any], run_page: str) -> None:
    page = visit(run_page)
    type_text(page, "3 5 17", 3)  # numbers, which have no end of a text
    text = write_at_least(page, 10) and write_at_least(page, 24)
    assert len({*text}) > 5
    written_in(page).nth(5).click()
    choices = page.get_by_role("group", name="alternatives").get_by_role("button")
    sync_api.expect(page.get_by_text("What could stand at place 6")).to_be_visible()
    choices.and_(page.locator("[aria-current=true]")).click()  # cuts what comes after it, and writes it once more
    sync_api.expect(written_in(page).nth(6)).to_be_visible()
    assert write_at_least(page, 24) == text
    page.get_by_role("spinbutton", name="seed").fill("1")
    page.get_by_role("button", name="Start over").click()
    sync_api.expect(written_in(page)).to_have_count(0)
    assert write_at_least(page, 24) != text


def test_nothing_is_written_for_a_window_that_was_closed(visit: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "runs/version_0"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "noting.py").write_text(NOTING)
    (run / "config.yaml").write_text("seed_everything: 0\nmodel:\n  class_path: noting.Noting\n")
    torch.save({**bytes_model(), "model_class": "noting.Noting"}, run / "checkpoints/best.ckpt")
    calls = tmp_path / "calls"
    with served(tmp_path, "best") as (address, _):
        page = visit(address)
        page.get_by_role("button", name="Start", exact=True).click()
        sync_api.expect(written_in(page).nth(5)).to_be_visible()
        page.goto("about:blank")
        counts = [-1, 0]
        while counts[-1] != counts[-2]:  # it would go on to 400
            page.wait_for_timeout(2000)
            counts.append(len(calls.read_text()))
        assert counts[-1] < 300


def test_two_checkpoints_stand_side_by_side(visit: Callable[..., Any], run_page: str, shared_run: Path) -> None:
    page, numbers = visit(run_page), [3, 5, 17, 2, 2, 11]
    type_text(page, " ".join(map(str, numbers)), 6)
    ids, panel = torch.tensor(numbers), section(page, "What has it learned?")

    def loss(path: Path) -> float:
        with torch.no_grad():
            return F.cross_entropy(load(path)(ids[None])[0, :-1], ids[1:]).item()

    kept = shared_run / "version_0/checkpoints"
    with torch.no_grad():
        first = first_network(*open_checkpoint(kept / "best.ckpt"), seed=0)
        untrained = F.cross_entropy(first.logits(first(ids[None]))[0, :-1], ids[1:]).item()
    assert abs(untrained - loss(kept / "best.ckpt")) > 0.01
    sync_api.expect(panel).to_contain_text(f": {loss(kept / 'best.ckpt'):.3f} nats")
    sync_api.expect(panel.locator("h3").nth(1)).to_contain_text(f"untrained weights, seed 0: {untrained:.3f} nats")
    assert panel.locator(".text").nth(1).locator("span.token").count() == 6
    before = column(page, "What has it learned?", 3)
    choose_beside(page, "last.ckpt")
    sync_api.expect(panel.locator("h3").nth(1)).to_contain_text("last.ckpt")
    sync_api.expect(panel.locator("h3").nth(1)).to_contain_text(f": {loss(kept / 'last.ckpt'):.3f} nats")
    assert column(page, "What has it learned?", 3) != before
    choose_beside(page, "nothing")
    sync_api.expect(panel.locator("h3")).to_have_count(0)


def test_a_text_that_is_too_long_shows_what_the_model_sees_of_it(visit: Callable[..., Any], rhyme_page: str) -> None:
    page = visit(rhyme_page)
    type_text(page, "one two three four five", 16)
    sync_api.expect(
        page.get_by_text("The text has 23 tokens. The model sees its last 16, those below.")
    ).to_be_visible()
    assert "".join(tokens_in(page).all_inner_texts()) == "·three·four·five"
    type_text(page, "one", 3)
    sync_api.expect(page.get_by_text("The text has")).to_have_count(0)


def test_an_empty_text_is_a_sentence(visit: Callable[..., Any], rhyme_page: str) -> None:
    page = visit(rhyme_page)
    page.get_by_label("your text", exact=True).fill("")
    sync_api.expect(page.get_by_text("The text is empty: type a token at least.")).to_be_visible()
    sync_api.expect(page.get_by_role("button", name="Start", exact=True)).to_be_hidden()
    type_text(page, "one", 3)
    sync_api.expect(page.get_by_role("button", name="Start", exact=True)).to_be_visible()


@pytest.mark.parametrize("text", ["3 four", "3 20", "-1"])
def test_what_is_no_token_is_a_sentence(text: str, visit: Callable[..., Any], run_page: str) -> None:
    page = visit(run_page)
    page.get_by_label("your text", exact=True).fill(text)
    word = text.split()[-1]
    sync_api.expect(page.get_by_text(f"'{word}' is no token id: this model was trained without")).to_be_visible()
    type_text(page, "3 4", 2)


def test_a_single_token_needs_another_to_be_measured_by(visit: Callable[..., Any], run_page: str) -> None:
    page = visit(run_page)
    type_text(page, "7", 1)
    sync_api.expect(section(page, "How surprised is it?")).to_contain_text("needs two tokens")
    sync_api.expect(section(page, "What comes next?")).to_contain_text("After token 1 of 1, “7”")


def test_logits_that_are_not_finite_are_a_sentence(visit: Callable[..., Any], tmp_path: Path) -> None:
    content = bytes_model()
    content["state_dict"]["final_norm.weight"] = torch.full((16,), math.nan)
    torch.save(content, tmp_path / "nan.pt")
    with served(tmp_path, "nan.pt") as (address, _):
        page = visit(address, is_complete=False)
        sync_api.expect(page.get_by_text("the model's logits are not finite: take a checkpoint from")).to_be_visible()
        page.close()


def test_bytes_that_are_no_character_are_seen_as_such(visit: Callable[..., Any], llama_page: str) -> None:
    page = visit(llama_page)
    type_text(page, "é <b>&\n\ty", 10)
    assert " ".join(tokens_in(page).all_inner_texts()) == r"\xc3 \xa9 · < b > & ↵ ⇥ y"


def test_what_is_typed_is_followed_letter_by_letter(visit: Callable[..., Any], llama_page: str) -> None:
    page = visit(llama_page)
    area = page.get_by_label("your text", exact=True)
    area.fill("")
    area.press_sequentially("one two three four five six", delay=60)
    sync_api.expect(tokens_in(page)).to_have_count(27)
    assert "".join(tokens_in(page).all_inner_texts()) == "one·two·three·four·five·six"
    sync_api.expect(section(page, "What comes next?")).to_contain_text("After token 27 of 27, “x”")


def focused(page: Any) -> str:
    """What the focus is on: its name, or that of the label around it."""
    named = "[e.ariaLabel, e.labels?.[0]?.innerText, e.innerText].find(Boolean)"
    return page.evaluate(f"(e => {named} ?? '')(document.activeElement)")


def tab_to(page: Any, name: str) -> None:
    for _ in range(40):
        page.keyboard.press("Tab")
        if focused(page).startswith(name):
            return
    raise AssertionError(f"{name} cannot be reached with Tab")


def test_the_keyboard_is_enough(visit: Callable[..., Any], llama_page: str) -> None:
    page = visit(llama_page)
    tab_to(page, "your text")
    page.keyboard.press("Control+A")
    page.keyboard.type("one two")
    sync_api.expect(tokens_in(page)).to_have_count(7)
    sync_api.expect(section(page, "What comes next?")).to_contain_text("After token 7 of 7")
    tab_to(page, "“o” · token 111")  # the chosen one
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    assert focused(page).startswith("“t”")
    for key, name in (("Home", "“o”"), ("End", "“o”"), ("ArrowLeft", "“w”"), ("ArrowLeft", "“t”")):
        page.keyboard.press(key)
        assert focused(page).startswith(name)
    page.keyboard.press("Enter")
    sync_api.expect(section(page, "What comes next?")).to_contain_text("After token 5 of 7, “t”")
    assert focused(page).startswith("“t”")  # and the focus stays
    tab_to(page, "temperature")
    page.keyboard.press("Home")
    sync_api.expect(section(page, "What comes next?")).to_contain_text("1 token of 256 can be drawn")
    tab_to(page, "layer")
    tab_to(page, "head 2")
    page.keyboard.press("Enter")
    sync_api.expect(section(page, "What does it attend to?")).to_contain_text("Layer 1, head 2")
    tab_to(page, "One token")
    page.keyboard.press("Enter")
    sync_api.expect(written_in(page)).to_have_count(1)
    tab_to(page, written_in(page).nth(0).get_attribute("aria-label"))
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert "choose it to go on from there" in focused(page)
    page.keyboard.press("Enter")
    sync_api.expect(written_in(page).nth(3)).to_be_visible()
    assert page.evaluate("document.activeElement.className") == "choice"  # and the focus stays
    tab_to(page, "Stop")
    page.keyboard.press("Enter")
    sync_api.expect(page.get_by_role("button", name="Start", exact=True)).to_be_enabled()
    assert focused(page) == "Stop"


@pytest.mark.parametrize("width", [400, 320])
def test_a_narrow_window_needs_no_scrolling_sideways(
    width: int, visit: Callable[..., Any], run_page: str, llama_page: str
) -> None:
    for address, text, count in ((run_page, "3 5 17 2 2 11", 6), (llama_page, "x" * 90, 90)):
        page = visit(address, width=width)
        type_text(page, text, count)
        page.get_by_role("button", name="One token").click()
        sync_api.expect(written_in(page)).to_have_count(1)
        sync_api.expect(section(page, "What does it attend to?")).to_contain_text(f"what token {count},")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelector('#app').scrollWidth") <= width


def test_it_is_served_to_this_machine_alone(llama_page: str) -> None:
    port = int(llama_page.rstrip("/").rpartition(":")[2])
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", port))
    request = urllib.request.Request(llama_page, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=60)


@pytest.mark.parametrize("path", ["", "_nicegui_ws/socket.io/?EIO=4&transport=polling"])
def test_a_page_of_another_site_is_not_answered(path: str, llama_page: str) -> None:
    for origin, status in (("http://elsewhere.example", 403), ("null", 403), (llama_page.rstrip("/"), 200)):
        request = urllib.request.Request(llama_page + path, headers={"Origin": origin})
        try:
            found = urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            found = error.code
        assert found == status


def test_no_socket_is_opened_to_a_page_of_another_site(
    visit: Callable[..., Any], browser: Any, llama_page: str
) -> None:
    own = visit(llama_page)
    address = llama_page.replace("http", "ws") + "_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    page = browser.new_page()
    page.goto("data:text/html,elsewhere")
    opens = (
        "address => new Promise(done => { const socket = new WebSocket(address);"
        "socket.onopen = () => done(true); socket.onerror = () => done(false); })"
    )
    assert own.evaluate(opens, address) is True
    assert page.evaluate(opens, address) is False
    page.close()


def test_a_text_is_kept_when_the_page_is_loaded_anew(visit: Callable[..., Any], llama_page: str) -> None:
    page = visit(llama_page)
    type_text(page, "my own text", 11)
    page.reload()
    sync_api.expect(page.get_by_label("your text", exact=True)).to_have_value("my own text")
    sync_api.expect(tokens_in(page)).to_have_count(11)


def test_a_text_that_is_longer_than_the_box_is_cut_with_a_sentence(visit: Callable[..., Any], llama_page: str) -> None:
    page = visit(llama_page)
    area = page.get_by_label("your text", exact=True)
    area.fill("a" * 99_998)
    area.press("End")
    page.keyboard.insert_text("bcde")
    sync_api.expect(page.get_by_text("The text has 100,000 tokens. The model sees its last 96")).to_be_visible()
    sync_api.expect(page.get_by_text("The box is full: it takes 100,000 characters, and leaves out")).to_be_visible()
    assert "".join(tokens_in(page).all_inner_texts()).endswith("aabc")
    assert area.evaluate("area => area.getBoundingClientRect().height <= 0.41 * innerHeight")


def test_a_choice_that_is_clicked_many_times_writes_as_many_tokens_as_it_shows(
    visit: Callable[..., Any], rhyme_page: str
) -> None:
    page = visit(rhyme_page)
    type_text(page, "one two three f", 15)
    slide(page, "temperature", "Home")
    page.get_by_role("button", name="One token").dblclick()
    page.get_by_role("button", name="One token").click()
    sync_api.expect(written_in(page).nth(0)).to_be_visible()
    text = "".join(write_at_least(page, 12)).replace("·", " ")
    assert text == (RHYME * 2)[15:27]
