"""A trained model writes text: what it is asked for, the same each time, or one line that says why not."""

import gzip
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import fit, small_model

import slm
from slm.data import TextData
from slm.documents import read_documents
from slm.files import look_at
from slm.generate import Settings, Writer, main, write
from slm.tokenizer import train_bpe

RHYME = "one two three four five six seven. "
GREEDY = ["--temperature=0", "--max_new_tokens=8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that know a rhyme by heart."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rhyme.txt").write_text(RHYME * 200)
    data = TextData(256, 16, path=str(folder / "rhyme.txt"), batch_size=8)
    model = small_model(vocab_size=256, learning_rate=1e-2)
    fit(model, data, max_epochs=12, limit_val_batches=1)
    content = {"hyper_parameters": dict(model.hparams), "tokenizer": "bytes"}
    torch.save({**content, "state_dict": model.transformer.state_dict()}, folder / "weights.pt")
    return folder / "weights.pt"


@pytest.fixture
def numbers(trained: Path, workdir: Path) -> str:
    """The same without a tokenizer."""
    torch.save({**torch.load(trained, weights_only=True), "tokenizer": None}, "numbers.pt")
    return "--ckpt_path=numbers.pt"


def test_a_model_writes_what_it_learned(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write("one two three f", trained, max_new_tokens=8, temperature=0) == "one two three four five"
    assert slm.write is write
    main([f"--ckpt_path={trained}", "--prompt=one two three f", *GREEDY])
    assert capsys.readouterr() == ("one two three four five\n", "")
    assert len(write(ckpt_path=trained, max_new_tokens=5)) == 5


def test_what_is_written_past_the_context_still_follows_the_rhyme(trained: Path) -> None:
    assert write("one two", trained, max_new_tokens=100, temperature=0) == (RHYME * 4)[:107]


def test_several_prompts_are_gone_on_with_one_after_another(
    trained: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompt.txt").write_text("three f")
    main([f"--ckpt_path={trained}", "--prompt=one", "--prompt=[5]", "--prompt_file=prompt.txt", *GREEDY])
    out, err = capsys.readouterr()
    one, other, three = out.splitlines()
    assert (one, three) == ("one two thr", "three four five")
    assert other.startswith("[5]")
    assert err.splitlines() == [f"--- prompt {number} of 3" for number in (1, 2, 3)]


def test_samples_are_what_their_seeds_give_alone(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--ckpt_path={trained}", "--prompt=one", "--max_new_tokens=12", "--temperature=3"]
    main([*flags, "--num_samples=3", "--seed=7"])
    out, err = capsys.readouterr()
    for seed in (7, 8, 9):
        main([*flags, f"--seed={seed}"])
    assert capsys.readouterr().out == out
    assert len(set(out.split("\n")[:-1])) == 3
    assert err.splitlines() == [f"--- sample {number} of 3" for number in (1, 2, 3)]


def test_text_comes_as_it_is_made_and_other_samples_wait_for_their_turn(trained: Path) -> None:
    pieces = list(Writer(trained).stream("one", Settings(max_new_tokens=5, temperature=0, num_samples=2)))
    assert pieces == [(0, "one "), *[(0, letter) for letter in "two "], (1, "one two ")]


@pytest.mark.parametrize(
    ("stops", "expected"),
    [(["four"], "one two three "), (["xyz", "e f"], "one two thre"), (["zzz"], "one two three four")],
)
def test_a_stop_text_ends_what_is_written_and_is_not_shown(trained: Path, stops: list[str], expected: str) -> None:
    assert write("one two th", trained, max_new_tokens=8, temperature=0, stop=stops) == expected


def test_a_document_ends_where_the_model_ends_it(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained, weights_only=True)
    weight = content["state_dict"]["token_embedding.weight"]
    weight[0xFF] = 100 * content["state_dict"]["final_norm.bias"].sign() + weight[0xFF]
    content["state_dict"]["final_norm.bias"] *= 100
    torch.save(content, tmp_path / "ending.pt")
    assert write("one", tmp_path / "ending.pt", temperature=0) == "one"


def test_a_prompt_longer_than_the_context_keeps_its_tail_and_says_so(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"--ckpt_path={trained}", f"--prompt={'x' * 30}seven. one two t", *GREEDY])
    out, err = capsys.readouterr()
    assert out == f"{'x' * 30}seven. one two three fou\n"
    assert err == "the prompt has 46 tokens: the model sees the last 16, its context\n"


def test_without_a_prompt_each_line_of_the_input_is_one(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two\n\nthree f\n"))
    main([f"--ckpt_path={trained}", *GREEDY])
    assert capsys.readouterr() == ("one two three f\nthree four five\n", "")


def test_in_a_terminal_a_prompt_is_asked_for(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO("one two\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    main([f"--ckpt_path={trained}", *GREEDY])
    assert capsys.readouterr() == ("one two three f\n", "> > ")


def test_a_model_without_a_tokenizer_reads_and_writes_numbers(numbers: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([numbers, f"--prompt={' '.join(str(byte) for byte in b'one two')}", *GREEDY])
    assert bytes(map(int, capsys.readouterr().out.split())) == b"one two three f"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "error: the prompt is empty: numbers.pt has no tokenizer, it needs a token to begin with"),
        ("3 four", "error: numbers.pt: prompt 'four' is no token id: this model was trained without a tokenizer"),
        ("3 256", "error: numbers.pt: prompt '256' is no token id: this model was trained without a tokenizer"),
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
    stdin: io.StringIO | None, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(SystemExit):
        main([f"--ckpt_path={trained}"])
    message = "error: there is no prompt: give --prompt, --prompt_file, or lines to standard input\n"
    assert capsys.readouterr() == ("", message)


def test_a_prompt_that_is_no_text_is_refused(trained: Path, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    bpe = train_bpe(iter([RHYME]), 256 + 1)
    content = torch.load(trained, weights_only=True)
    torch.save({**content, "tokenizer": bpe.dump()}, "bpe.pt")
    for path in (str(trained), "bpe.pt"):
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
        ("a.txt.gz", gzip.compress(b"a\r\nb"), "a\r\nb"),
        ("a", b" a\0\n\n", " a\0\n\n"),
    ],
)
def test_a_prompt_file_is_the_text_that_training_sees(
    name: str, content: bytes, text: str, trained: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_bytes(content)
    assert "".join(block.text for block in read_documents(look_at(Path(name)), "text", "strict")) == text
    main([f"--ckpt_path={trained}", f"--prompt_file={name}", *GREEDY])
    assert capsys.readouterr().out == write(text, trained, max_new_tokens=8, temperature=0) + "\n"


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="a shell there has no <(command)")
def test_a_prompt_file_may_be_a_pipe(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"one two")
    os.close(writer)
    main([f"--ckpt_path={trained}", f"--prompt_file=/dev/fd/{reader}", *GREEDY])
    os.close(reader)
    assert capsys.readouterr().out == "one two three f\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "words".encode("utf-16"), "is UTF-16 text: give a file of UTF-8 text"),
        ("a.txt", "some words".encode("utf-16-le"), "is UTF-16 text without its mark: give a file of UTF-8 text"),
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
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = "\ufeffone\rtwo\r\n\r\nthree \r\r\nfour\x85\u2028\r".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    main([f"--ckpt_path={trained}", *GREEDY])
    prompts = ["one\rtwo", "three \r", "four\x85\u2028\r"]
    expected = [write(prompt, trained, max_new_tokens=8, temperature=0) + "\n" for prompt in prompts]
    assert capsys.readouterr().out == "".join(expected)
