"""What is exported for llama.cpp computes the same there: in `transformers`, which reads GGUF too, and in itself."""

import errno
import json
import sys
from array import array
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, cutting_digits, small_model

from slm.data.tokenizer import load_tokenizer, train_bpe
from slm.export import main
from slm.formats.gguf import LLAMA_3_PATTERN
from slm.model.sampling import Sampler, decode
from slm.training.language_model import LanguageModel

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
TEXT = "Die Katze saß auf 猫 🙂👩‍👩‍👧\n\n  def f(x):\n\treturn x -- Привет мир! مرحبا بالعالم नमस्ते ٣٤ 12345 it's"
README = (ROOT / "README.md").read_text()
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"norm_eps": 1e-3},
    "gpt2, untied": {"tie_embeddings": False},
    "llama, grouped": {"architecture": "llama", "num_kv_heads": 2, "rope_theta": 500.0, "norm_eps": 1e-3},
    "llama, untied": {"architecture": "llama", "tie_embeddings": False},
}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": False}
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA_3_PATTERN}, "behavior": "Isolated", "invert": False}
LLAMA_3 = {"type": "Sequence", "pretokenizers": [SPLIT, {**BYTE_LEVEL, "use_regex": False}]}


def dumped(kind: str) -> str:
    bpe = "bytes" if kind == "bytes" else train_bpe(iter([README, "1234 12345 99 Katze Привет мир " * 9]), 600).dump()
    if kind == "llama 3":
        settings = json.loads(bpe)
        settings["model"]["ignore_merges"] = True
        return json.dumps({**settings, "pre_tokenizer": LLAMA_3})
    return cutting_digits(bpe) if kind == "digits" else bpe


def save(path: str, tokenizer: str | None, **options: Any) -> LanguageModel:
    vocab_size = 256 if tokenizer in (None, "bytes") else 640  # more than the tokenizer has
    sizes = {
        "vocab_size": vocab_size,
        "embed_dim": 32,
        "num_heads": 4,
        "num_layers": 2,
        "max_seq_len": 256,
        "hidden_dim": 128,
    }
    model = small_model(**{**sizes, **options}).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    content = {"hyper_parameters": dict(model.hparams), "tokenizer": tokenizer}
    torch.save({**content, "state_dict": model.transformer.state_dict()}, path)
    return model


def ids_of(tokenizer: str, text: str) -> list[int]:
    ours = load_tokenizer(tokenizer)
    return list(array(ours.typecode, ours.encode([(text, False)])))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_network(family: str, workdir: Path) -> None:
    model = save("model.pt", "bytes", max_seq_len=1024, **FAMILIES[family])  # a GPT-2 is taken to have as many
    main(["--ckpt_path=model.pt", "--format=gguf", "--output=model.gguf"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf").eval()
    tokens = torch.randint(256, (2, 100))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=0)


@pytest.mark.llama
@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "digits", "llama 3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_reads_the_same_network_and_tokenizer(family: str, tokenizer: str, workdir: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    content = dumped(tokenizer)
    model = save("model.pt", content, **FAMILIES[family])
    main(["--ckpt_path=model.pt", "--format=gguf", "--output=model.gguf"])
    in_32_bits = {"type_k": 0, "type_v": 0, "flash_attn": False}
    theirs = llama_cpp.Llama("model.gguf", n_ctx=256, logits_all=True, verbose=False, n_threads=1, **in_32_bits)
    try:
        ids = ids_of(content, TEXT)
        assert theirs.tokenize(TEXT.encode(), add_bos=False, special=False) == ids
        assert theirs.detokenize(ids) == TEXT.encode()
        assert 50 < len(ids) <= 200
        theirs.eval(ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0]
        torch.testing.assert_close(torch.tensor(theirs.scores[: len(ids)]), logits, atol=1e-3, rtol=0)
        expected = torch.cat(
            list(islice(decode(model.transformer, torch.tensor([ids]), Sampler(temperature=0)), 50))
        ).tolist()
        theirs.reset()
        assert [*islice(theirs.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0), 50)] == expected
    finally:
        theirs.close()


def test_the_file_says_what_the_model_is_and_where_its_texts_end(workdir: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = save("model.pt", dumped("digits"), **FAMILIES["llama, grouped"])
    main(["--ckpt_path=model.pt", "--format=gguf", "--output=model.gguf"])
    reader = gguf.GGUFReader("model.gguf")
    found = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama", "general.file_type": 0, "llama.block_count": 2, "llama.context_length": 256,
        "llama.embedding_length": 32, "llama.feed_forward_length": 128, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 8, "llama.rope.freq_base": 500.0,
        "llama.vocab_size": 640, "model": "gpt2", "pre": "smollm", "add_bos_token": False,
        "eos_token_id": load_tokenizer(dumped("digits")).end_of_text,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert (kinds["<|endoftext|>"], kinds["Katze"], kinds["a"], kinds["[unused 639]"]) == (3, 4, 1, 5)
    assert {*reader.tensors[0].shape} == {32, 640}
    assert len(reader.tensors) == 2 + 2 * 9
    assert sum(int(tensor.n_elements) for tensor in reader.tensors) == sum(
        parameter.numel() for parameter in model.transformer.parameters()
    )


def test_a_file_that_cannot_be_written_whole_is_not_there(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")

    def full(self: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    save("model.pt", "bytes")
    with pytest.raises(SystemExit) as exit_info:
        main(["--format=gguf", "--ckpt_path=model.pt", "--output=new.gguf"])
    assert exit_info.value.code != 0
    assert "new.gguf cannot be written: No space left on device" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["model.pt"]


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        main(["--format=gguf", *argv])
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sorted(Path().rglob("*")) == before
    return line


def changed(**settings: Any) -> str:
    """A tokenizer that differs from one of ours in some settings of its JSON."""
    return json.dumps({**json.loads(dumped("bpe")), **settings})


def words() -> str:
    library = pytest.importorskip("tokenizers")
    return str(library.Tokenizer(library.models.WordLevel({"<eos>": 0, "a": 1}, "a")).to_str())


def with_added(**places: bool) -> str:
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer.from_str(dumped("bpe"))
    tokenizer.add_tokens([library.AddedToken("Katze", **places)])
    return str(tokenizer.to_str())


@pytest.mark.parametrize(
    ("tokenizer", "options", "message"),
    [
        (lambda: None, {}, "llama.cpp reads text, but this model has the numbers of tokens: train it on a text"),
        (lambda: "bytes", {"num_kv_heads": 2}, "the format gguf has no GPT-2 with num_kv_heads=2: export one whose"),
        (words, {}, "the tokenizer is WordLevel with the decoder None: llama.cpp is known here to read byte-level BPE"),
        (lambda: changed(decoder=None), {}, "the tokenizer is BPE with the decoder None: llama.cpp is known"),
        (
            lambda: changed(normalizer={"type": "NFC"}),
            {},
            "the tokenizer changes texts by NFC before it cuts them: llama",
        ),
        (lambda: changed(pre_tokenizer=None), {}, "the tokenizer cuts texts by None: llama.cpp is known here to read"),
        (lambda: changed(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}), {}, "cuts texts by ByteLevel: llama"),
        (lambda: changed(pre_tokenizer={**BYTE_LEVEL, "use_regex": False}), {}, "cuts texts by nothing: llama.cpp"),
        (lambda: changed(pre_tokenizer=DIGITS), {}, "the tokenizer cuts texts by Digits: llama.cpp"),
        (lambda: changed(pre_tokenizer=LLAMA_3), {}, "the tokenizer has ignore_merges=False: llama.cpp is known here"),
        (lambda: with_added(lstrip=True), {}, "finds 'Katze' by its surroundings, which llama.cpp does not"),
        (lambda: with_added(rstrip=True), {}, "finds 'Katze' by its surroundings, which llama.cpp does not"),
        (lambda: with_added(single_word=True), {}, "finds 'Katze' by its surroundings, which llama.cpp does not"),
        (lambda: dumped("bpe"), {"vocab_size": 300}, "the tokenizer has 600 ids, but the model vocab_size=300"),
    ],
)
def test_what_llama_cpp_does_not_have_is_refused(
    tokenizer: Callable[[], str | None], options: Any, message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("model.pt", tokenizer(), **options)
    assert message in refuse(capsys, "--ckpt_path=model.pt", "--output=new.gguf")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=new"], "output=new must end in .gguf"),
        (["--output=model.pt"], "output=model.pt is there already: give another name, or remove it"),
        (["--output=new.pt", "--from_hf=."], "format=gguf is not read, only written: leave out --format or --from_hf"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("model.pt", "bytes")
    assert message in refuse(capsys, *flags, *([] if "--from_hf=." in flags else ["--ckpt_path=model.pt"]))


def test_without_the_package_the_remedy_is_named(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save("model.pt", "bytes")
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = 'the format gguf needs the package gguf: pip install -e ".[gguf]"'
    assert message in refuse(capsys, "--ckpt_path=model.pt", "--output=new.gguf")
