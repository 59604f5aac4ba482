"""What is exported computes the same in `transformers`, and what is read from there computes the same here."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL_FLAGS, UNSHOWN, likeliest, llama_folder, slow_after_first, small_model

from slm.command.settings import read_command
from slm.data.tokenizer import ByteTokenizer, train_bpe
from slm.export import main
from slm.generate import write
from slm.model.sampling import decode
from slm.run.checkpoint import read_checkpoint
from slm.run.loading import load
from slm.training.language_model import LanguageModel

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
Run = Callable[..., str]
README = (ROOT / "README.md").read_text()
TEXT = "Die Katze saß auf 猫 🙂\n\n  def f(x):\n\treturn x"


def save(path: str, tokenizer: str | None, **sizes: Any) -> LanguageModel:
    model = small_model(**{"num_layers": 2, **sizes}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # biases and norms count too
    content = {"hyper_parameters": dict(model.hparams), "tokenizer": tokenizer}
    torch.save({**content, "state_dict": model.transformer.state_dict()}, path)
    return model


def dumped(kind: str) -> str | None:
    return {"none": None, "bytes": "bytes", "bpe": train_bpe(iter([README]), 300).dump()}[kind]


GROUPED = {"architecture": "llama", "num_heads": 4, "num_kv_heads": 2, "rope_theta": 500.0, "norm_eps": 1e-3}
FAMILIES = {
    "gpt2": {},
    "gpt2, untied": {"tie_embeddings": False, "norm_eps": 1e-3},
    "llama": {"architecture": "llama"},
    "llama, grouped": GROUPED,
    "llama, grouped and untied": {**GROUPED, "tie_embeddings": False},
}
CASES = [("gpt2", "none"), ("gpt2", "bytes"), ("llama, grouped", "bpe"), ("gpt2, untied", "bytes")]
CASES += [("llama", "none"), ("llama, grouped and untied", "bytes"), ("gpt2", "bpe")]


@pytest.fixture(params=CASES, ids=" with ".join)
def exported(request: pytest.FixtureRequest, workdir: Path) -> tuple[LanguageModel, str | None]:
    """A model and its tokenizer, exported to the folder `out`."""
    family, kind = request.param
    tokenizer = dumped(kind)
    model = save("model.pt", tokenizer, vocab_size=300 if kind == "bpe" else 256, **FAMILIES[family])
    main(["--ckpt_path=model.pt", "--output=out"])
    return model, tokenizer


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library's RMSNorm compute in the type of its input: it computes in 32 bits whatever that is."""
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * self.weight

    monkeypatch.setattr(norm, "forward", forward)


def test_logits_and_greedy_tokens_are_the_same(exported: tuple[LanguageModel, str | None], exact_norms: None) -> None:
    model, _ = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    tokens = torch.randint(256, (3, 16))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() <= 1e-4
        assert (theirs.double()(tokens).logits - model.double()(tokens)).abs().max() <= 1e-10
    theirs, model = theirs.float(), model.float()
    given = {"input_ids": tokens[:1, :5], "attention_mask": torch.ones(1, 5), "do_sample": False}
    expected = theirs.generate(**given, max_new_tokens=11, eos_token_id=None, pad_token_id=0)[0, 5:]
    found = torch.cat(list(islice(decode(model.transformer, tokens[:1, :5], likeliest), 11)))
    assert found.tolist() == expected.tolist()


def test_the_tokenizer_has_the_same_ids_and_text(exported: tuple[LanguageModel, str | None]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained("out")
    if exported[1] is None:
        assert theirs("5 17 255").input_ids == [5, 17, 255]
        assert theirs.decode([5, 17]) == "5 17"
        return
    ours = ByteTokenizer() if exported[1] == "bytes" else train_bpe(iter([README]), 300)
    encoded = ours.encode([(TEXT, False)])
    ids = list(encoded) if ours.typecode == "B" else torch.frombuffer(bytearray(encoded), dtype=torch.uint16).tolist()
    assert theirs(TEXT).input_ids == ids
    assert theirs.decode(ids) == TEXT
    assert theirs.eos_token_id == ours.end_of_text
    assert theirs.model_max_length == 16


def test_the_way_back_gives_the_same_file(exported: tuple[LanguageModel, str | None]) -> None:
    main(["--from_hf=out", "--output=back.pt"])
    before, after = (read_checkpoint(Path(name)) for name in ("model.pt", "back.pt"))
    assert before["hyper_parameters"] == after["hyper_parameters"]
    assert before["tokenizer"] == after["tokenizer"]
    assert before["state_dict"].keys() == after["state_dict"].keys()
    assert all(torch.equal(value, after["state_dict"][name]) for name, value in before["state_dict"].items())


def test_merges_are_written_as_every_version_reads_them(workdir: Path) -> None:
    save("model.pt", dumped("bpe"), vocab_size=300)
    main(["--ckpt_path=model.pt", "--output=out"])
    merges = json.loads(Path("out/tokenizer.json").read_text())["model"]["merges"]
    pairs = json.loads(train_bpe(iter([README]), 300).dump())["model"]["merges"]
    assert merges == [f"{first} {second}" for first, second in pairs]


def test_merges_of_tokens_with_spaces_stay_pairs(workdir: Path) -> None:
    library = pytest.importorskip("tokenizers")
    vocabulary = {"<eos>": 0, "a": 1, " ": 2, "a ": 3, "b": 4, "a b": 5}
    plain = library.Tokenizer(library.models.BPE(vocabulary, [("a", " "), ("a ", "b")]))
    save("model.pt", plain.to_str(), vocab_size=6)
    main(["--ckpt_path=model.pt", "--output=out"])
    assert json.loads(Path("out/tokenizer.json").read_text())["model"]["merges"] == [["a", " "], ["a ", "b"]]
    assert transformers.AutoTokenizer.from_pretrained("out")("a b").input_ids == [5]


def test_a_tokenizer_after_the_mark_of_utf8_is_read(workdir: Path) -> None:
    save("model.pt", dumped("bpe"), vocab_size=300)
    main(["--ckpt_path=model.pt", "--output=out"])
    path = Path("out/tokenizer.json")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    main(["--from_hf=out", "--output=back.pt"])
    assert read_checkpoint(Path("back.pt"))["tokenizer"] == dumped("bpe")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", slow_after_first([0o027, 0o022, 0o077]))
def test_every_file_that_a_command_writes_can_be_read_by_those_whom_the_umask_lets(
    umask: int, slm: Run, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
    small = [flag for flag in SMALL_FLAGS if "num_tokens" not in flag and "vocab_size" not in flag]
    Path("text.txt").write_text(README[:4000])
    Path("text.txt").chmod(0o666 & ~umask)
    before = os.umask(umask)
    try:
        text = ["--data=TextData", "--data.path=text.txt", "--data.tokenizer=bpe", "--model.vocab_size=300"]
        slm(*small, *text, "--trainer.max_epochs=1")
        main(["--ckpt_path=best", "--output=out"])
        main(["--from_hf=out", "--output=back.pt"])
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in workdir.rglob("*") if path.is_file()}
    assert {path: oct(mode) for path, mode in modes.items() if mode != 0o666 & ~umask} == {}
    names = {path.name for path in modes}
    assert {"model.safetensors", "tokenizer.json", "best.ckpt", "config.yaml", "loss.png", "back.pt"} <= names


def test_a_text_goes_on_the_same(workdir: Path, rhyming: Path) -> None:
    main([f"--ckpt_path={rhyming}", "--output=out"])
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out")
    written = theirs.generate(**tokenizer("one t", return_tensors="pt"), max_new_tokens=11, do_sample=False)
    assert tokenizer.decode(written[0]) == write("one t", rhyming, max_new_tokens=11, temperature=0)


def gpt2_folder(**changes: Any) -> transformers.GPT2LMHeadModel:
    sizes = {"vocab_size": 40, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 24}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **changes})).eval()
    model.save_pretrained("gpt2")
    return model


def change_config(make: Callable[[], Any], changes: dict[str, Any]) -> None:
    """Write the folder of a model whose config.json then says something else."""
    make()
    [config] = Path().glob("*/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


@pytest.mark.slow
def test_a_gpt2_of_others_computes_the_same_here_and_can_be_trained_further(slm: Run) -> None:
    theirs = gpt2_folder()
    main(["--from_hf=gpt2", "--output=gpt2.pt"])
    tokens = torch.randint(40, (2, 24))
    torch.testing.assert_close(load("gpt2.pt")(tokens), theirs(tokens).logits)
    assert load("gpt2.pt").hparams["hidden_dim"] == 64
    rate = "--model.learning_rate=1e-30"
    slm(
        "--init_from=gpt2.pt",
        *UNSHOWN,
        "--data.num_tokens=2000",
        "--trainer.max_epochs=1",
        rate,
        "--model.min_learning_rate=0",
    )
    kept = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert kept["hyper_parameters"]["embed_dim"] == 16
    begun = load("gpt2.pt").transformer.state_dict()
    for name, value in begun.items():
        torch.testing.assert_close(kept["state_dict"][f"transformer.{name}"], value, atol=1e-6, rtol=0)
    assert f"init_from: {Path('gpt2.pt').absolute()}" in Path("runs/version_0/config.yaml").read_text()
    Path("again.yaml").write_text("init_from: gpt2.pt\ndata: {init_args: {num_tokens: 2000}}")
    slm("--config=again.yaml", *UNSHOWN, "--trainer.max_epochs=1", rate, "--model.min_learning_rate=0")
    again = torch.load("runs/version_1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, again[name]) for name, value in kept["state_dict"].items())
    slm("--config=runs/version_1/config.yaml")
    assert Path("runs/version_2/checkpoints/last.ckpt").is_file()
    slm("--ckpt_path=runs/version_0", "--trainer.max_epochs=2")


@pytest.mark.slow
def test_a_run_begins_with_the_tokenizer_of_the_file(slm: Run) -> None:
    save("model.pt", dumped("bpe"), vocab_size=300)
    Path("text.txt").write_text(README[:4000])
    output = slm("--init_from=model.pt", *UNSHOWN, "--data.path=text.txt", "--trainer.max_epochs=1")
    assert "text.txt: 1 document" in output
    assert torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)["tokenizer"] == dumped("bpe")


@pytest.mark.slow
def test_a_run_that_was_killed_before_it_saved_begins_with_the_file_again(slm: Run) -> None:
    save("model.pt", "bytes", vocab_size=256)
    Path("text.txt").write_text(README[:4000])
    flags = ["--init_from=model.pt", *UNSHOWN, "--data.path=text.txt", "--trainer.max_epochs=1"]
    slm(*flags)
    shutil.copytree("runs/version_0", "runs/version_1")
    shutil.rmtree("runs/version_1/checkpoints")
    slm("--ckpt_path=last")
    states = [
        torch.load(f"runs/version_{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (0, 1)
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.embed_dim=32"], "embed_dim=32 cannot apply to the weights in model.pt, which have embed_dim=16"),
        (["--ckpt_path=last"], "--init_from=model.pt begins a new run: leave it out, --ckpt_path goes on with one"),
        (["--data=DummyData"], "the checkpoint was trained with tokenizer=bytes, the data has tokenizer=None"),
    ],
)
def test_what_does_not_fit_the_file_is_refused(
    flags: list[str], message: str, workdir: Path, refused: Callable[..., str]
) -> None:
    save("model.pt", "bytes", vocab_size=256)
    assert message in refused("--init_from=model.pt", *flags)


def test_shapes_in_a_configuration_give_way_and_that_is_said(slm: Run) -> None:
    save("model.pt", None)
    Path("model.yaml").write_text("model: {embed_dim: 64, learning_rate: 0.01}")
    output = slm(
        "--init_from=model.pt", *UNSHOWN, "--config=model.yaml", "--data.num_tokens=2000", "--trainer.max_steps=1"
    )
    assert "model.embed_dim is 16, which the weights in model.pt have, and not 64" in output
    assert torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]["embed_dim"] == 16


@pytest.mark.slow
def test_the_newest_run_to_begin_with_is_one_that_has_a_checkpoint(slm: Run) -> None:
    slm(*SMALL_FLAGS, *UNSHOWN, "--trainer.max_epochs=1")
    Path("runs/version_1").mkdir()
    output = slm("--init_from=best", *UNSHOWN, "--data.num_tokens=2000", "--trainer.max_epochs=1")
    assert "begins with the weights of runs/version_0/checkpoints/best.ckpt" in output
    assert "runs/version_0/checkpoints/best.ckpt" in Path("runs/version_2/config.yaml").read_text()


def test_a_file_to_begin_with_that_is_not_there_is_refused(refused: Callable[..., str]) -> None:
    assert refused("--init_from=none.pt").startswith("error: init_from=none.pt: there is no such file")


def test_an_evaluation_begins_nothing(workdir: Path, refused: Callable[..., str]) -> None:
    save("model.pt", "bytes", vocab_size=256)
    message = "--init_from=model.pt begins a new run: leave it out, validate needs --ckpt_path"
    assert message in refused("validate", "--init_from=model.pt")


def test_the_card_has_the_figures_of_the_run_and_no_folder_of_its_machine(slm: Run) -> None:
    Path("text.txt").write_text(README[:4000])
    small = [flag for flag in SMALL_FLAGS if "num_tokens" not in flag and "vocab_size" not in flag]
    flags = ["--data=TextData", "--data.path=text.txt", "--model.vocab_size=256", "--trainer.max_epochs=2"]
    output = slm(*small, *UNSHOWN, *flags)
    loss = next(line.split()[1] for line in output.splitlines() if line.startswith("val/loss"))
    main(["--ckpt_path=best", "--output=out"])
    card = Path("out/README.md").read_text()
    assert f"| val/loss | {loss} |" in card
    assert "| val/bits_per_byte |" in card
    assert 'data.path: "text.txt"' in card
    assert str(Path.cwd()) not in card
    main(["--ckpt_path=last", "--output=last"])
    assert "| optimizer steps |" in Path("last/README.md").read_text()


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        main(list(argv))
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sorted(Path().rglob("*")) == before
    return line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "error: output is missing: say where to with --output"),
        (["--output=full"], "error: output=full is there and no empty folder"),
        (["--output=new", "--ckpt_path=none.pt"], "error: ckpt_path=none.pt: there is no such file"),
        (["--output=new.pt", "--from_hf=full", "--ckpt_path=best"], "error: ckpt_path=best is not read with"),
        (["--output=new.pt", "--from_hf=none"], "error: from_hf=none is no folder with a model"),
        (["--output=new.pt", "--from_hf=full"], "error: from_hf=full is no folder with a model: give one with"),
        (["--output=model.pt", "--from_hf=full"], "error: output=model.pt is there already"),
        (["--output=new", "--from_hf=full"], "error: output=new must end in .pt"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("full").mkdir()
    Path("full/file").touch()
    save("model.pt", "bytes", vocab_size=256)
    assert refuse(capsys, *flags).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "gpt2 has activation_function=relu: the network here has gelu_new or"),
        ({"quantization_config": {"bits": 4}}, "gpt2 has quantization_config={'bits': 4}: the network here has None"),
        ({"scale_attn_by_inverse_layer_idx": True}, "gpt2 has scale_attn_by_inverse_layer_idx=True: the network"),
    ],
)
def test_a_gpt2_that_is_another_network_is_refused(
    changes: dict[str, Any], message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(gpt2_folder, changes)
    assert message in refuse(capsys, "--from_hf=gpt2", "--output=new.pt")


def stored(kind: str) -> dict[str, torch.Tensor]:
    """Writes `gpt2` as one file of a kind, under the names of GPT2LMHeadModel, and returns its tensors."""
    gpt2_folder()
    tensors = safetensors.load_file("gpt2/model.safetensors")
    Path("gpt2/model.safetensors").unlink()
    store(kind, tensors)
    return tensors


def store(kind: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors into the folder `gpt2` in one of the ways in which `transformers` has written them."""
    suffix, name = (".safetensors", "model") if kind.endswith("safetensors") else (".bin", "pytorch_model")
    parts = {f"{name}{suffix}": list(tensors)}
    if kind.startswith("shards"):
        parts = {f"first{suffix}": list(tensors)[::2], f"second{suffix}": list(tensors)[1::2]}
        index = {"metadata": {}, "weight_map": {tensor: file for file, names in parts.items() for tensor in names}}
        Path(f"gpt2/{name}{suffix}.index.json").write_text(json.dumps(index))
    for file, names in parts.items():
        part = {tensor: tensors[tensor] for tensor in names}
        if suffix == ".safetensors":
            safetensors.save_file(part, f"gpt2/{file}", metadata={"format": "pt"})
        else:
            torch.save(part, f"gpt2/{file}", _use_new_zipfile_serialization=kind != "pickle of old")


KINDS = ["safetensors", "shards of safetensors", "pickle", "pickle of old", "shards of pickles"]


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("kind", slow_after_first(KINDS))
def test_a_head_of_its_own_is_refused_where_the_config_says_that_it_is_tied_and_an_equal_one_is_not(
    kind: str, prefix: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name.replace("transformer.", prefix): value for name, value in stored(kind).items()}
    head = tensors[f"{prefix}wte.weight"].clone()
    store(kind, {**tensors, "lm_head.weight": head + 0.1})
    expected = "gpt2 has other values in lm_head.weight than in transformer.wte.weight, though its config.json has tie"
    assert expected in refuse(capsys, "--from_hf=gpt2", "--output=new.pt")
    config = Path("gpt2/config.json")
    told = json.loads(config.read_text())
    told.pop("tie_word_embeddings", None)
    config.write_text(json.dumps(told))
    assert expected in refuse(capsys, "--from_hf=gpt2", "--output=new.pt")
    store(kind, {**tensors, "lm_head.weight": head})
    main(["--from_hf=gpt2", "--output=new.pt"])
    assert torch.equal(load("new.pt").transformer.token_embedding.weight, head)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("kind", slow_after_first(KINDS))
def test_the_masks_that_older_versions_kept_are_no_weights(kind: str, prefix: str, workdir: Path) -> None:
    tensors = {name.replace("transformer.", prefix): value for name, value in stored(kind).items()}
    for layer in (0, 1):
        tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    store(kind, tensors)
    main(["--from_hf=gpt2", "--output=new.pt"])
    theirs, tokens = gpt2_folder(), torch.randint(40, (2, 24))
    torch.testing.assert_close(load("new.pt")(tokens), theirs(tokens).logits)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_embd", 32, "of shape (48,), but by its config.json that is (96,)"),
        ("n_layer", 3, "gpt2 has no weights for transformer.h.2."),
        ("n_layer", 1, "gpt2 has weights that its config.json does not mention: transformer.h.1."),
        ("n_inner", 32, "of shape (64,), but by its config.json that is (32,)"),
        ("model_type", "mistral", "gpt2 has model_type=mistral: the networks here are gpt2 and llama"),
        ("model_type", "llama", "config.json does not say hidden_size, num_attention_heads, num_hidden_layers"),
        ("n_head", 3, "gpt2 has sizes that no network has: embed_dim=16 is not divisible by num_heads=3"),
    ],
)
def test_a_gpt2_with_sizes_that_do_not_fit_is_refused(
    name: str, value: Any, message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(gpt2_folder, {name: value})
    assert message in refuse(capsys, "--from_hf=gpt2", "--output=new.pt")


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "10KB"}], ids=["one file", "several"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_llama_of_others_computes_the_same_here(dtype: torch.dtype, shards: Any, workdir: Path) -> None:
    llama_folder("llama", dtype=dtype, **shards)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("llama").float()
    assert len([*Path("llama").glob("*.safetensors")]) > bool(shards)
    main(["--from_hf=llama", "--output=llama.pt"])
    ours, tokens = load("llama.pt"), torch.randint(40, (2, 24))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    expected = {"rope_theta": 100_000.0, "num_kv_heads": 3, "max_seq_len": 24, "architecture": "llama"}
    assert {name: ours.hparams[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "llama has rope_scaling={'type': 'linear'}"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "llama has rope_parameters={'rope_type':"),
        ({"rope_parameters": {"rope_theta": 1.0, "factor": 4.0}}, "llama has rope_parameters={'rope_theta': 1.0, 'f"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "llama has rope_parameters={'partial_rotary_f"),
        ({"partial_rotary_factor": 0.5}, "llama has partial_rotary_factor=0.5: the network here has 1.0"),
        ({"pretraining_tp": 2}, "llama has pretraining_tp=2: the network here has 1"),
        ({"quantization_config": {"bits": 4}}, "llama has quantization_config={'bits': 4}: the network here has None"),
        ({"rms_norm_eps": "1e-5"}, "llama has rms_norm_eps='1e-5' in its config.json, which is no float"),
        ({"vocab_size": 300.0}, "llama has vocab_size=300.0 in its config.json, which is no int"),
        ({"hidden_size": None}, "llama has hidden_size=None in its config.json, which is no int"),
        ({"num_attention_heads": 0}, "llama has head_dim=4: the network here has 36 / 0"),
        ({"attention_bias": True}, "llama has attention_bias=True: the network here has False"),
        ({"mlp_bias": True}, "llama has mlp_bias=True: the network here has False"),
        ({"hidden_act": "gelu"}, "llama has hidden_act=gelu: the network here has silu or swish"),
        ({"head_dim": 8}, "llama has head_dim=8: the network here has 36 / 9, its width for each head"),
        ({"rope_interleaved": True}, "llama has rope_interleaved=True: the network here has False"),
        ({"num_key_value_heads": 9}, "llama has model.layers.0.self_attn.k_proj.weight of shape (12, 36), but by its"),
        ({"tie_word_embeddings": False}, "llama has no weights for lm_head.weight"),
    ],
)  # fmt: skip
def test_a_llama_that_is_another_network_is_refused(
    changes: dict[str, Any], message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(partial(llama_folder, "llama"), changes)
    assert message in refuse(capsys, "--from_hf=llama", "--output=new.pt")


def test_a_config_of_an_older_version_says_how_slowly_rotary_positions_turn(workdir: Path) -> None:
    theirs = llama_folder("llama")
    config = Path("llama/config.json")
    told = json.loads(config.read_text())
    told.pop("rope_parameters", None)
    config.write_text(json.dumps({**told, "rope_theta": 100_000.0, "rope_scaling": None}))
    main(["--from_hf=llama", "--output=llama.pt"])
    tokens = torch.randint(40, (2, 24))
    torch.testing.assert_close(load("llama.pt")(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_weights_under_the_names_of_older_versions_are_read(workdir: Path) -> None:
    theirs, tokens = llama_folder("llama"), torch.randint(40, (2, 24))
    stored = safetensors.load_file("llama/model.safetensors")
    renamed = {name.removeprefix("model."): weights for name, weights in stored.items()}
    renamed["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    safetensors.save_file(renamed, "llama/model.safetensors", metadata={"format": "pt"})
    main(["--from_hf=llama", "--output=llama.pt"])
    torch.testing.assert_close(load("llama.pt")(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_weights_of_whole_numbers_are_refused(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama_folder("llama")
    stored = safetensors.load_file("llama/model.safetensors")
    safetensors.save_file({name: weights.to(torch.int8) for name, weights in stored.items()}, "llama/model.safetensors")
    assert "in torch.int8: give weights of 16 or 32 bits" in refuse(capsys, "--from_hf=llama", "--output=new.pt")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "llama/config.json holds no object: give the config of a model"),
        ("config.json", "{", "from_hf=llama cannot be read: "),
        (
            "model.safetensors.index.json",
            "{}",
            "model.safetensors.index.json does not say which file has which weights",
        ),
        ("model.safetensors.index.json", '{"weight_map": {"a": "config.json"}}', "from_hf=llama cannot be read: "),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    file: str, content: str, message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama_folder("llama")
    if "index" in file:
        Path("llama/model.safetensors").unlink()
    Path("llama", file).write_text(content)
    assert message in refuse(capsys, "--from_hf=llama", "--output=new.pt")


def test_a_tokenizer_that_only_another_library_reads_is_refused(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama_folder("llama")
    Path("llama/tokenizer.json").rename("llama/tokenizer.model")
    assert "llama has a tokenizer.model, but no tokenizer.json: write it with" in refuse(
        capsys, "--from_hf=llama", "--output=new.pt"
    )


def test_special_tokens_that_a_tokenizer_would_add_are_told_of(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = pytest.importorskip("tokenizers")
    llama_folder("llama")
    tokenizer = library.Tokenizer.from_file("llama/tokenizer.json")
    tokenizer.post_processor = library.processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    tokenizer.save("llama/tokenizer.json")
    main(["--from_hf=llama", "--output=llama.pt"])
    assert "the tokenizer of llama adds special tokens to each text, which is not done here" in capsys.readouterr().err


def test_the_card_names_the_family(workdir: Path) -> None:
    save("model.pt", "bytes", vocab_size=256, architecture="llama")
    main(["--ckpt_path=model.pt", "--output=out"])
    assert "of the family of Llama" in Path("out/README.md").read_text()


@pytest.mark.parametrize("name", ["new.gguf", "new.pt", "new"])
def test_a_name_that_is_too_long_is_one_line(name: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("model.pt", "bytes", vocab_size=256)
    llama_folder("llama")
    long = name.replace("new", "n" * 300)
    source = {".gguf": ["--format=gguf", "--ckpt_path=model.pt"], ".pt": ["--from_hf=llama"]}
    with pytest.raises(SystemExit) as exit_info:
        main([*source.get(Path(name).suffix, ["--ckpt_path=model.pt"]), f"--output={long}"])
    assert exit_info.value.code != 0
    assert "cannot be written: " in capsys.readouterr().err


def test_a_shard_that_is_missing_is_named(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama_folder("llama", max_shard_size="10KB")
    shard = sorted(Path("llama").glob("*.safetensors"))[0]
    shard.unlink()
    message = refuse(capsys, "--from_hf=llama", "--output=new.pt")
    assert "from_hf=llama cannot be read" in message
    assert shard.name in message


@pytest.mark.slow
def test_a_llama_of_others_is_trained_further_on_shorter_windows_of_ones_own_text(slm: Run) -> None:
    llama_folder("llama")
    main(["--from_hf=llama", "--output=llama.pt"])
    Path("text.txt").write_text(README)
    flags = [*UNSHOWN, "--data.path=text.txt", "--model.max_seq_len=12", "--trainer.max_steps=2"]
    output = slm("--init_from=llama.pt", *flags)
    assert "use --model.vocab_size" not in output
    hparams = load("runs/version_0").hparams
    assert (hparams["max_seq_len"], hparams["num_kv_heads"], hparams["architecture"]) == (12, 3, "llama")
    slm("--ckpt_path=last", "--trainer.max_steps=4")


@pytest.mark.parametrize("length", [128, 12])
def test_a_length_in_a_configuration_is_that_of_the_windows_of_a_llama(length: int, workdir: Path) -> None:
    save("model.pt", "bytes", vocab_size=256, architecture="llama")
    Path("length.yaml").write_text(f"model: {{max_seq_len: {length}}}")
    assert read_command(["--init_from=model.pt", "--config=length.yaml"]).settings.model.max_seq_len == length
    assert read_command(["--init_from=model.pt"]).settings.model.max_seq_len == 16


def test_windows_of_another_length_are_refused_for_learned_positions(refused: Callable[..., str]) -> None:
    save("model.pt", "bytes", vocab_size=256)
    assert "max_seq_len=12 cannot apply to the weights" in refused("--init_from=model.pt", "--model.max_seq_len=12")


@pytest.mark.slow
def test_a_folder_of_smollm2s_width_and_vocabulary_computes_the_same_here(workdir: Path) -> None:
    sizes = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192}
    llama_folder("llama", torch.bfloat16, sizes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("llama").float()
    tokens = torch.randint(49_152, (2, 200))
    main(["--from_hf=llama", "--output=llama.pt"])
    with torch.no_grad():
        torch.testing.assert_close(load("llama.pt")(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    assert write("one 12 ", "llama.pt", max_new_tokens=5).startswith("one 12 ")
