"""The door to the page, what it shows of checkpoints and tokens, and where it computes; the page itself: test_page."""

import asyncio
import socket
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import small_model

from slm.data.dummy import MarkovSource
from slm.data.text_stream import Numbers
from slm.data.tokenizer import ByteTokenizer, train_bpe
from slm.errors import InputError
from slm.look import main
from slm.model.insight import read
from slm.run.loading import load

pytest.importorskip("nicegui")

from slm.page.checkpoints import Checkpoint
from slm.page.drawing import Bar, attention_map, bars, layers, shaded, surprised
from slm.page.names import visible
from slm.page.page import ids_of
from slm.page.worker import Latest, SupersededError, Worker

FIRST = "untrained weights, seed 0"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--ckpt_path=none.pt", "error: ckpt_path=none.pt: there is no such file"),
        ("--port=0", "error: port=0 must be at least 1 and below 65536"),
        ("--accelerator=tpu", "error: accelerator=tpu must be auto, cpu, gpu, cuda or mps"),
        ("--shw=false", "error: unknown setting shw; the nearest known one is show"),
    ],
)
def test_a_mistake_is_one_line(flag: str, message: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([flag])
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_a_port_that_is_taken_is_named_with_another(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as exit_info:
            main([f"--port={port}"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"error: port={port} is taken: give another, such as --port {port + 1}\n"


def test_without_the_package_its_extra_is_named(
    rhyming: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    with pytest.raises(SystemExit):
        main([f"--ckpt_path={rhyming}"])
    assert capsys.readouterr().err == 'error: the page needs the package nicegui: pip install -e ".[look]"\n'


def test_a_run_offers_its_other_checkpoints_and_its_first_weights(trained: Path) -> None:
    checkpoint = Checkpoint("last", "cpu")
    assert checkpoint.path == trained / "checkpoints/last.ckpt"
    steps = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)["global_step"]
    assert checkpoint.others == {FIRST: None, f"best.ckpt, step {steps}": trained / "checkpoints/best.ckpt"}
    best = checkpoint.open(f"best.ckpt, step {steps}").transformer
    assert torch.equal(best.token_embedding.weight, load("best").transformer.token_embedding.weight)
    first = checkpoint.open(FIRST).transformer
    assert not torch.equal(first.token_embedding.weight, best.token_embedding.weight)
    assert not best.training
    assert not first.training


def test_the_weights_in_a_runs_folder_are_put_beside_its_checkpoints(trained: Path) -> None:
    names = list(Checkpoint(trained / "simple_language_model.pt", "cpu").others.values())
    assert names == [None, trained / "checkpoints/best.ckpt", trained / "checkpoints/last.ckpt"]


def test_a_damaged_checkpoint_is_not_offered(trained: Path) -> None:
    (trained / "checkpoints/last.ckpt").write_bytes(b"damaged")
    assert list(Checkpoint("best", "cpu").others) == [FIRST]


def test_a_lone_file_has_untrained_weights_beside_it(rhyming: Path) -> None:
    assert Checkpoint(rhyming, "cpu").others == {FIRST: None}


def test_a_checkpoint_with_another_tokenizer_is_not_put_beside_it(rhyming: Path, workdir: Path) -> None:
    content = torch.load(rhyming, weights_only=True)
    torch.save(content, "one.ckpt")
    torch.save({**content, "tokenizer": None}, "other.ckpt")
    torch.save({**content, "hyper_parameters": {**content["hyper_parameters"], "vocab_size": 300}}, "larger.ckpt")
    for name, what in (("other", "tokenizer"), ("larger", "vocab_size")):
        with pytest.raises(InputError, match=rf"{name}\.ckpt has another {what}"):
            Checkpoint("one.ckpt", "cpu").open(f"{name}.ckpt")


def test_the_source_of_a_run_is_the_one_that_it_was_trained_on(trained: Path, rhyming: Path) -> None:
    source = Checkpoint("best", "cpu").source
    assert isinstance(source, MarkovSource)
    assert torch.equal(source.rule, MarkovSource(20, seed=3).rule)  # as the run was given
    assert isinstance(Checkpoint(trained / "simple_language_model.pt", "cpu").source, MarkovSource)
    assert Checkpoint(rhyming, "cpu").source is None


@pytest.mark.parametrize(
    ("token", "expected"),
    [(0x61, "a"), (0x20, "·"), (0x0A, "↵"), (0xC3, "\\xc3"), (0xFF, "<end>"), (0, "\\x00"), (300, "<unused 300>")],
)
def test_every_byte_can_be_seen(token: int, expected: str) -> None:
    assert visible(ByteTokenizer(), token) == expected


def test_tokens_of_bpe_are_seen_as_their_text() -> None:
    pytest.importorskip("tokenizers")
    bpe = train_bpe(iter(["é é é the the the\n"]), 300)
    assert "".join(visible(bpe, token) for token in ids_of(bpe, "é the\n")) == "é·the↵"
    assert [visible(bpe, token) for token in ids_of(bpe, "ñ")] == ["\\xc3", "\\xb1"]
    assert visible(bpe, bpe.end_of_text) == "<end>"
    assert visible(Numbers(20), 17) == "17"


def test_half_a_character_is_no_text() -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        ids_of(ByteTokenizer(), "a\ud83d")


def test_what_a_token_says_is_text_and_never_a_part_of_the_page() -> None:
    name = "<script>'\"&"
    drawn = [
        bars([Bar(name, 0.5, 0.25)], name, name),
        shaded([name], [1.0]),
        attention_map(torch.eye(1), [name], 0, name),
        layers([[(name, 1.0)]], name, [(1.0, 1)]),
        surprised([name], [1.0], [name], 0),
    ]
    for html in drawn:
        parser = Parser()
        parser.feed(html)
        assert "script" not in parser.tags
        assert parser.texts & {name, "<script…"}
        assert not parser.values or name in parser.values


class Parser(HTMLParser):
    """Notes tags, texts, and the values of attributes that are read to somebody."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: set[str] = set()
        self.values: set[str | None] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        kinds = {"title"} | ({"aria-label"} if tag == "svg" else set())
        self.values |= {value for key, value in attrs if key in kinds and value != "100.0 %"}

    def handle_data(self, data: str) -> None:
        self.texts.add(data)


def test_a_map_has_a_label_for_each_row_and_column() -> None:
    html = attention_map(torch.eye(3), ["a", "b", "a-long-name"], 1, "a map")
    assert [html.count(f">{name}</text>") for name in ("a", "b", "a-long-…")] == [2, 2, 2]


def test_only_the_newest_of_what_is_asked_for_is_computed() -> None:
    latest, worker, release, done = Latest(), Worker(), threading.Event(), []

    async def ask() -> list[object]:
        def work(number: int) -> int:
            release.wait(60)
            done.append(number)
            return number

        asked = [asyncio.create_task(worker.run(lambda n=n: work(n), latest.new())) for n in range(5)]
        await asyncio.sleep(0)  # all are in the queue
        release.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    *others, newest = asyncio.run(ask())
    assert newest == 4
    assert {type(other) for other in others} == {SupersededError}
    assert done[-1] == 4
    assert len(done) <= 2  # the first may have begun


def test_what_is_no_longer_wanted_ends_at_the_next_block() -> None:
    transformer, latest, worker, reached = small_model(num_layers=3).transformer, Latest(), Worker(), []
    worker.interrupt(transformer)

    def reach(*_: object) -> None:
        reached.append(1)
        latest.new()  # a key is pressed while it computes

    for block in transformer.blocks:
        block.register_forward_hook(reach)
    with pytest.raises(SupersededError):
        asyncio.run(worker.run(lambda: read(transformer, torch.arange(5)), latest.new()))
    assert reached == [1]
    assert transformer.training  # and is as it was
    assert not any(len(block.attn._forward_pre_hooks) for block in transformer.blocks)


def test_the_server_answers_while_something_is_computed() -> None:
    worker, release = Worker(), threading.Event()

    async def ask() -> bool:
        task = asyncio.create_task(worker.run(lambda: release.wait(60), Latest().new()))
        await asyncio.sleep(0)
        release.set()  # this is only reached if the loop is free
        return await task

    assert asyncio.run(ask())
