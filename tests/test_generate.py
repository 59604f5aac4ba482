"""A trained model writes text: what it is asked for, the same each time, or one line that says why not."""

import gzip
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import RHYME, small_model

import slm
from slm.data.documents import read_documents
from slm.data.files import look_at
from slm.data.tokenizer import train_bpe
from slm.generate import Settings, Writer, main, write

GREEDY = ["--temperature=0", "--max_new_tokens=8"]


@pytest.fixture
def numbers(rhyming: Path, workdir: Path) -> str:
    """The same without a tokenizer."""
    torch.save({**torch.load(rhyming, weights_only=True), "tokenizer": None}, "numbers.pt")
    return "--ckpt_path=numbers.pt"


def made_by_hand(written: bytes, path: Path) -> Path:
    """Weights that put these bytes after the first token, the second, and so on: all that counts is the position."""
    model = small_model(vocab_size=256)
    state = {name: torch.zeros_like(value) for name, value in model.transformer.state_dict().items()}
    state["final_norm.weight"] += 1.0
    state["position_embedding.weight"] += 100.0 * torch.eye(16)
    for position, byte in enumerate(written):
        state["token_embedding.weight"][byte, position] = 10.0
    torch.save({"hyper_parameters": dict(model.hparams), "tokenizer": "bytes", "state_dict": state}, path)
    return path


def test_a_model_writes_what_it_learned(rhyming: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write("one two three f", rhyming, max_new_tokens=8, temperature=0) == "one two three four five"
    assert slm.write is write
    main([f"--ckpt_path={rhyming}", "--prompt=one two three f", *GREEDY])
    assert capsys.readouterr() == ("one two three four five\n", "")
    assert write(ckpt_path=made_by_hand(b"a text", tmp_path / "a.pt"), max_new_tokens=5) == "a tex"


def test_nothing_of_lightning_is_imported_to_write(rhyming: Path) -> None:
    without = "import sys; sys.modules['lightning'] = None; import slm.generate; slm.generate.main()"
    flags = [f"--ckpt_path={rhyming}", "--prompt=one two three f", *GREEDY]
    written = subprocess.run([sys.executable, "-c", without, *flags], capture_output=True, text=True, check=True)
    assert written.stdout == "one two three four five\n"


def test_what_is_written_past_the_context_still_follows_the_rhyme(rhyming: Path) -> None:
    assert write("one two", rhyming, max_new_tokens=100, temperature=0) == (RHYME * 4)[:107]


def test_several_prompts_are_gone_on_with_one_after_another(
    rhyming: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompt.txt").write_text("three f")
    main([f"--ckpt_path={rhyming}", "--prompt=one", "--prompt=[5]", "--prompt_file=prompt.txt", *GREEDY])
    out, err = capsys.readouterr()
    other = write("[5]", rhyming, max_new_tokens=8, temperature=0)
    assert out == f"one two thr\n{other}\nthree four five\n"
    assert err.splitlines() == [f"--- prompt {number} of 3" for number in (1, 2, 3)]


def test_samples_are_what_their_seeds_give_alone(rhyming: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--ckpt_path={rhyming}", "--prompt=one", "--max_new_tokens=12", "--temperature=99", "--top_k=3"]
    main([*flags, "--num_samples=3", "--seed=7"])
    out, err = capsys.readouterr()
    alone = []
    for seed in (7, 8, 9):
        main([*flags, f"--seed={seed}"])
        alone.append(capsys.readouterr().out)
    assert "".join(alone) == out
    assert len(set(alone)) == 3
    assert err.splitlines() == [f"--- sample {number} of 3" for number in (1, 2, 3)]


def test_text_comes_as_it_is_made_and_other_samples_wait_for_their_turn(rhyming: Path) -> None:
    pieces = list(Writer(rhyming).stream("one", Settings(max_new_tokens=5, temperature=0, num_samples=2)))
    assert pieces == [(0, "one "), *[(0, letter) for letter in "two "], (1, "one two ")]


@pytest.mark.parametrize(
    ("stops", "expected"),
    [(["four"], "one two three "), (["xyz", "e f"], "one two thre"), (["zzz"], "one two three four")],
)
def test_a_stop_text_ends_what_is_written_and_is_not_shown(rhyming: Path, stops: list[str], expected: str) -> None:
    assert write("one two th", rhyming, max_new_tokens=8, temperature=0, stop=stops) == expected


def test_a_document_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    assert write("one", made_by_hand(b"ne two\xffthree", tmp_path / "ending.pt"), temperature=0) == "one two"


def test_a_prompt_longer_than_the_context_keeps_its_tail_and_says_so(
    rhyming: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"--ckpt_path={rhyming}", f"--prompt={'x' * 30}seven. one two t", *GREEDY])
    out, err = capsys.readouterr()
    assert out == f"{'x' * 30}seven. one two three fou\n"
    assert err == "the prompt has 46 tokens: the model sees the last 16, its context\n"


def test_without_a_prompt_each_line_of_the_input_is_one(
    rhyming: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two\n\nthree f\n"))
    main([f"--ckpt_path={rhyming}", *GREEDY])
    assert capsys.readouterr() == ("one two three f\nthree four five\n", "")


def test_in_a_terminal_a_prompt_is_asked_for(
    rhyming: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO("one two\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    main([f"--ckpt_path={rhyming}", *GREEDY])
    assert capsys.readouterr() == ("one two three f\n", "> > ")


def test_a_model_without_a_tokenizer_reads_and_writes_numbers(numbers: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([numbers, f"--prompt={' '.join(str(byte) for byte in b'one two')}", *GREEDY])
    assert bytes(map(int, capsys.readouterr().out.split())) == b"one two three f"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "error: the prompt is empty: numbers.pt has no tokenizer, it needs a token to begin with"),
        ("3 four", "error: numbers.pt: 'four' is no token id: this model was trained without a tokenizer"),
        ("3 256", "error: numbers.pt: '256' is no token id: this model was trained without a tokenizer"),
    ],
)
def test_what_is_no_number_of_a_token_is_refused(
    prompt: str, message: str, numbers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([numbers, f"--prompt={prompt}"])
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--ckpt_path=none.pt", "error: ckpt_path=none.pt: there is no such file"),
        ("--max_new_tokens=0", "error: max_new_tokens=0 must be at least 1"),
        ("--num_samples=0", "error: num_samples=0 must be at least 1"),
        ("--temperature=-1", "error: temperature=-1.0 must be at least 0"),
        ("--top_k=0", "error: top_k=0 must be at least 1"),
        ("--top_p=1.1", "error: top_p=1.1 must be above 0 and at most 1"),
        ("--seed=-1", "error: seed=-1 must be at least 0"),
        ("--stop=", "error: stop='' would end every text"),
        ("--accelerator=tpu", "error: accelerator=tpu must be auto, cpu, gpu, cuda or mps"),
        ("--prompt_file=none.txt", "error: prompt_file=none.txt cannot be read: No such file"),
        ("--tmperature=1", "error: unknown setting tmperature; the nearest known one is temperature"),
        ("--seed=x", "error: seed=x: expected "),
        ("--prompt", "error: prompt needs a value"),
    ],
)
def test_a_mistake_is_one_line(flag: str, message: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([flag])
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize("stdin", [io.StringIO(""), None], ids=["empty", "closed"])
def test_no_prompt_at_all_is_refused(
    stdin: io.StringIO | None, rhyming: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(SystemExit):
        main([f"--ckpt_path={rhyming}"])
    message = "error: there is no prompt: give --prompt, --prompt_file, or lines to standard input\n"
    assert capsys.readouterr() == ("", message)


def test_a_prompt_that_is_no_text_is_refused(rhyming: Path, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    bpe = train_bpe(iter([RHYME]), 256 + 1)
    content = torch.load(rhyming, weights_only=True)
    torch.save({**content, "tokenizer": bpe.dump()}, "bpe.pt")
    for path in (str(rhyming), "bpe.pt"):
        with pytest.raises(SystemExit):
            main([f"--ckpt_path={path}", "--prompt=a\udcff"])
        assert capsys.readouterr() == ("", "error: prompt='a\\udcff' is not UTF-8 text\n")


def test_a_prompt_file_that_is_no_text_is_refused(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompt.txt").write_bytes(b"ab\xff")
    with pytest.raises(SystemExit):
        main(["--prompt_file=prompt.txt"])
    message = "error: prompt_file=prompt.txt is not UTF-8 text: byte 0xff at offset 2; give a file of UTF-8 text\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", b"a\r\nb\rc\n", "a\r\nb\rc\n"),
        ("a.txt", b"\xef\xbb\xbfa\r\n", "a\r\n"),
        ("a.txt.gz", gzip.compress(b"a\r\nb", mtime=0), "a\r\nb"),
        ("a", b" a\0\n\n", " a\0\n\n"),
    ],
)
def test_a_prompt_file_is_the_text_that_training_sees(
    name: str, content: bytes, text: str, rhyming: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_bytes(content)
    assert "".join(block.text for block in read_documents(look_at(Path(name)), "text", "strict")) == text
    main([f"--ckpt_path={rhyming}", f"--prompt_file={name}", *GREEDY])
    assert capsys.readouterr().out == write(text, rhyming, max_new_tokens=8, temperature=0) + "\n"


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="a shell there has no <(command)")
def test_a_prompt_file_may_be_a_pipe(rhyming: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"one two")
    os.close(writer)
    main([f"--ckpt_path={rhyming}", f"--prompt_file=/dev/fd/{reader}", *GREEDY])
    os.close(reader)
    assert capsys.readouterr().out == "one two three f\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "words".encode("utf-16"), "is UTF-16 text: give a file of UTF-8 text"),
        (
            "a.txt",
            "some words".encode("utf-16-le"),
            "is a binary file, or text in UTF-16 or UTF-32: give a file of UTF-8 text",
        ),
        ("a.txt", b"PK\x03\x04and more", "is a zip archive, as docx, xlsx, epub and .pt are: give a file"),
        ("a.txt.gz", b"not packed", "is not a whole gzip file: "),
        ("folder", None, "cannot be read: Is a directory"),
    ],
)
def test_a_prompt_file_that_training_would_refuse_is_refused(
    name: str, content: bytes | None, message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).mkdir() if content is None else Path(name).write_bytes(content)
    with pytest.raises(SystemExit):
        main([f"--prompt_file={name}"])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: prompt_file={name} {message}")


def test_lines_of_the_input_end_at_their_line_break_alone(
    rhyming: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = "\ufeffone\rtwo\r\n\r\nthree \r\r\nfour\x85\u2028\r".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    main([f"--ckpt_path={rhyming}", *GREEDY])
    prompts = ["one\rtwo", "three \r", "four\x85\u2028\r"]
    expected = [write(prompt, rhyming, max_new_tokens=8, temperature=0) + "\n" for prompt in prompts]
    assert capsys.readouterr().out == "".join(expected)


def test_a_value_that_begins_with_a_dash_is_shown_as_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--seed=1", "--prompt", "--the"])
    line = "error: prompt needs a value: one that begins with a dash is given as --prompt=--the\n"
    assert capsys.readouterr().err == line
