"""A trained model writes text: what it is asked for, the same each time, or one line that says why not."""

from pathlib import Path

import pytest
import torch
from conftest import fit, small_model

from slm.data import TextData
from slm.generate import main, next_tokens, write
from slm.module import LanguageModel

RHYME = "one two three four five six seven. "


def follow(model: LanguageModel, tokens: list[int], count: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    stream = next_tokens(model.eval(), torch.tensor(tokens), temperature, generator)
    return [next(stream) for _ in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that know a rhyme by heart."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rhyme.txt").write_text(RHYME * 200)
    data = TextData(256, 16, path=str(folder / "rhyme.txt"), batch_size=8)
    model = small_model(vocab_size=256, learning_rate=1e-2)
    fit(model, data, max_epochs=4, limit_val_batches=1)
    content = {"hyper_parameters": dict(model.hparams), "tokenizer": "bytes"}
    torch.save({**content, "state_dict": model.transformer.state_dict()}, folder / "weights.pt")
    return folder / "weights.pt"


def test_greedy_tokens_are_the_likeliest_after_the_last_window() -> None:
    model = small_model().eval()
    tokens = list(range(14))
    for token in follow(model, tokens, 6):
        window = torch.tensor([tokens[-16:]])
        assert token == model(window)[0, -1].argmax()
        tokens.append(token)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    model = small_model()
    model.transformer.token_embedding.weight.data *= 20  # far from uniform
    drawn = torch.tensor([follow(model, [3], 1, temperature=0.7, seed=seed)[0] for seed in range(2000)])
    expected = (model(torch.tensor([[3]]))[0, -1] / 0.7).softmax(-1)
    assert torch.bincount(drawn, minlength=20) / 2000 == pytest.approx(expected.detach(), abs=0.05)


def test_the_seed_decides() -> None:
    model = small_model()
    assert follow(model, [1], 20, 1.0, seed=1) == follow(model, [1], 20, 1.0, seed=1)
    assert follow(model, [1], 20, 1.0, seed=1) != follow(model, [1], 20, 1.0, seed=2)


def test_a_model_writes_what_it_learned(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write(str(trained), prompt="one two three f", max_new_tokens=8, temperature=0) == "one two three four five"
    main([f"--ckpt_path={trained}", "--prompt=one two three f", "--max_new_tokens=8", "--temperature=0"])
    assert capsys.readouterr().out == "one two three four five\n"
    assert len(write(str(trained), max_new_tokens=5)) == 5


def test_a_document_ends_where_the_model_ends_it(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained, weights_only=True)
    weight = content["state_dict"]["token_embedding.weight"]
    weight[0xFF] = 100 * content["state_dict"]["final_norm.bias"].sign() + weight[0xFF]
    content["state_dict"]["final_norm.bias"] *= 100
    torch.save(content, tmp_path / "ending.pt")
    assert write(str(tmp_path / "ending.pt"), prompt="one", temperature=0) == "one"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--ckpt_path=none.pt", "error: ckpt_path=none.pt: there is no such file"),
        ("--max_new_tokens=0", "error: max_new_tokens=0 must be at least 1"),
        ("--temperature=-1", "error: temperature=-1.0 must be at least 0"),
        ("--seed=-1", "error: seed=-1 must be at least 0"),
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


def test_a_model_of_tokens_without_a_tokenizer_has_no_text(
    trained: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**torch.load(trained, weights_only=True), "tokenizer": None}, "tokens.pt")
    with pytest.raises(SystemExit):
        main(["--ckpt_path=tokens.pt"])
    message = "error: tokens.pt was trained on tokens without a tokenizer: it has no text to write\n"
    assert capsys.readouterr() == ("", message)
