"""What is exported for llama.cpp computes the same there: in `transformers`, which reads GGUF too, and in itself."""

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


def dumped(kind: str) -> str:
    bpe = "bytes" if kind == "bytes" else train_bpe(iter([README, "1234 12345 99 Katze Привет мир " * 9]), 600).dump()
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
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "digits"])
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


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        main(["--format=gguf", *argv])
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sorted(Path().rglob("*")) == before
    return line


def metaspace(bpe: str) -> str:
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer.from_str(bpe)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace()
    return str(tokenizer.to_str())


@pytest.mark.parametrize(
    ("tokenizer", "options", "message"),
    [
        (lambda: None, {}, "llama.cpp reads text, but this model has the numbers of tokens: train it on a text"),
        (lambda: "bytes", {"num_kv_heads": 2}, "the format gguf has no GPT-2 with num_kv_heads=2: export one whose"),
        (
            lambda: metaspace(dumped("bpe")),
            {},
            "the tokenizer, BPE that cuts by Metaspace, has no counterpart in llama",
        ),
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
