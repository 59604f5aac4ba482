"""A network and its tokenizer in the format of GPT-2, as the Hugging Face ecosystem has it, and back."""

import json
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm.data.tokenizer import END_OF_TEXT, ByteTokenizer, SubwordTokenizer, byte_characters
from slm.errors import InputError, check
from slm.model.transformer import Transformer
from slm.training.language_model import LanguageModel

NAMES = {
    "token_embedding": "wte",
    "position_embedding": "wpe",
    "final_norm": "ln_f",
    "attn_norm": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "ff_norm": "ln_2",
    "ff.up": "mlp.c_fc",
    "ff.down": "mlp.c_proj",
}
"""Layers here, and what GPT-2 calls them."""
SIZES = {
    "vocab_size": "vocab_size",
    "embed_dim": "n_embd",
    "num_heads": "n_head",
    "num_layers": "n_layer",
    "hidden_dim": "n_inner",
    "max_seq_len": "n_positions",
    "dropout": "resid_pdrop",
}
"""Hyper-parameters of the network, and what GPT-2's config calls them."""
MATHEMATICS = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""What GPT-2's config may say of a network that is the one here."""
MASKS = re.compile(r"(?:transformer\.)?h\.\d+\.attn\.(?:masked_)?bias")
"""Names of what older versions of `transformers` kept beside the weights: the causal mask, which is no weight."""


def to_gpt2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a Transformer under GPT-2's names, its linear layers turned, as GPT-2 keeps them."""
    return {_gpt2_name(name): _turned(name, weights) for name, weights in state.items()}


def from_gpt2(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The weights of these names of a Transformer, out of those of GPT-2."""
    return {name: _turned(name, state[_gpt2_name(name)]) for name in names}


def _gpt2_name(name: str) -> str:
    parts = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert parts is not None
    block = "" if parts[1] is None else f"h.{parts[1]}."
    return f"transformer.{block}{NAMES[parts[2]]}.{parts[3]}"


def _turned(name: str, weights: Tensor) -> Tensor:
    is_linear = weights.ndim == 2 and "embedding" not in name
    return (weights.T if is_linear else weights).contiguous()


def import_transformers() -> Any:
    """The library, told to be quiet; raises InputError where it is not there."""
    try:
        import transformers
    except ImportError as error:
        raise InputError('the format of GPT-2 needs the package transformers: pip install -e ".[export]"') from error
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def as_gpt2(model: LanguageModel, end_of_text: int | None) -> Any:
    """A `GPT2LMHeadModel` with the weights of a model.

    Args:
        model: that it is made of, and computes the same as.
        end_of_text: the id that closes a document, if there is one.

    Raises:
        InputError: its network is another one, or `transformers` is not there.
    """
    name = type(model.transformer).__name__
    check(
        model.network is Transformer,
        f"GPT-2's format cannot hold a {name}: export a model whose network is Transformer",
    )
    transformers = import_transformers()
    sizes = {theirs: model.hparams[ours] for ours, theirs in SIZES.items()}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop"), model.hparams["dropout"])
    config = transformers.GPT2Config(**sizes, **dropout, bos_token_id=end_of_text, eos_token_id=end_of_text)
    exported = transformers.GPT2LMHeadModel(config)
    missing, untold = exported.load_state_dict(to_gpt2(model.transformer.state_dict()), strict=False)
    assert (missing, untold) == (["lm_head.weight"], [])  # which is tied
    exported.tie_weights()
    return exported


def read_gpt2(folder: Path) -> dict[str, Any]:
    """The content of a folder with a GPT-2 as that of a file like `simple_language_model.pt`.

    Raises:
        InputError: it holds no GPT-2 that is the network of this project, or `transformers` is not there.
    """
    transformers = import_transformers()
    try:
        config = transformers.GPT2Config.from_pretrained(folder, local_files_only=True)
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name, meant in MATHEMATICS.items():
            value = told.get(name, getattr(config, name))
            check(value in meant, f"{folder} has {name}={value}: the network here has {' or '.join(map(str, meant))}")
        _check_tied(folder)
        theirs, loading = transformers.GPT2LMHeadModel.from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True
        )
    except InputError:
        raise
    except Exception as error:  # the library's own are of many kinds
        raise InputError(f"from_gpt2={folder} cannot be read as a GPT-2: {error}") from error
    untold = sorted(name for name in loading["unexpected_keys"] if not MASKS.fullmatch(name))
    check(not untold, f"{folder} has weights that its config.json does not tell of: {', '.join(untold[:3])}")
    missing = sorted({*loading["missing_keys"]} - {"lm_head.weight"})
    check(not missing, f"{folder} has no weights for {', '.join(missing[:3])}{' and more' if missing[3:] else ''}")
    sizes = {ours: getattr(config, name) for ours, name in SIZES.items()}
    sizes["hidden_dim"] = sizes["hidden_dim"] or 4 * sizes["embed_dim"]
    model = LanguageModel(**sizes)
    state = from_gpt2(theirs.float().state_dict(), list(model.transformer.state_dict()))
    model.transformer.load_state_dict(state)
    return {
        "hyper_parameters": dict(model.hparams),
        "state_dict": state,
        "tokenizer": _dumped_tokenizer(folder, sizes["vocab_size"]),
    }


def _check_tied(folder: Path) -> None:
    """Refuse an `lm_head` of its own, which `transformers` drops where the config does not tell of it."""
    found = _stored(folder, "wte.weight", "lm_head.weight")
    if len(found) == 2:
        (embedding, first), (head, second) = sorted(found.items(), key=lambda item: "lm_head" in item[0])
        check(
            first.shape == second.shape and torch.equal(first.float(), second.float()),
            f"{folder} has other values in {head} than in {embedding}: the network here has one matrix for both",
        )


def _stored(folder: Path, *names: str) -> dict[str, Tensor]:
    """The tensors of these names, with or without `transformer.` before them, in the files that a folder is read from.

    Args:
        folder: in the format of `transformers`, which looks for these files in this order.
        names: of tensors.
    """
    found: dict[str, Tensor] = {}
    for kind in ("model.safetensors", "pytorch_model.bin"):
        whole, index = folder / kind, folder / f"{kind}.index.json"
        if whole.is_file():
            files = [whole]
        elif index.is_file():
            files = [folder / file for file in sorted({*json.loads(index.read_bytes())["weight_map"].values()})]
        else:
            continue
        for file in files:
            found |= _tensors(file, names)
        break
    return found


def _tensors(file: Path, names: Sequence[str]) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as tensors:
            chosen = [name for name in tensors.keys() if name.removeprefix("transformer.") in names]  # noqa: SIM118
            return {name: tensors.get_tensor(name) for name in chosen}
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    return {name: content[name] for name in content if name.removeprefix("transformer.") in names}


def as_gpt2_tokenizer(dumped: str | None, vocab_size: int, max_seq_len: int) -> Any:
    """The tokenizer of a checkpoint as one of `transformers`; one of numbers where it has none."""
    library, end_of_text = _library_tokenizer(dumped, vocab_size)
    post_processor = library.post_processor
    tokenizer = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token=end_of_text,
        eos_token=end_of_text,
        model_max_length=max_seq_len,
        model_input_names=["input_ids", "attention_mask"],  # others would be added to the embedding
        clean_up_tokenization_spaces=False,
    )
    tokenizer.backend_tokenizer.post_processor = post_processor  # which is given one of its own
    return tokenizer


def _library_tokenizer(dumped: str | None, vocab_size: int) -> tuple[Any, str | None]:
    """The tokenizer of a checkpoint as one of the `tokenizers` library, and what it calls the end of a text."""
    import tokenizers
    from tokenizers.models import BPE, WordLevel

    if dumped is None:  # the numbers of the tokens
        library = tokenizers.Tokenizer(WordLevel({str(number): number for number in range(vocab_size)}))
        library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        return library, None
    if dumped == "bytes":
        names = byte_characters()
        names[ByteTokenizer.end_of_text] = END_OF_TEXT
        library = tokenizers.Tokenizer(BPE({name: byte for byte, name in enumerate(names)}, []))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        return library, END_OF_TEXT
    library = tokenizers.Tokenizer.from_str(dumped)
    return library, library.id_to_token(SubwordTokenizer(dumped).end_of_text)


def _dumped_tokenizer(folder: Path, vocab_size: int) -> str | None:
    """The tokenizer in a folder, as a checkpoint holds it; None where there is none, or numbers alone."""
    import tokenizers

    try:
        if (folder / "tokenizer.json").is_file():
            library = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8-sig"))
        elif (folder / "vocab.json").is_file():  # of the days before that
            library = (
                import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
            )
        else:
            return None
    except Exception as error:  # the libraries' own are of many kinds
        raise InputError(f"{folder} has a tokenizer that cannot be read: {error}") from error
    for dumped in (None, "bytes"):
        if library.get_vocab() == _library_tokenizer(dumped, vocab_size)[0].get_vocab():
            return dumped
    tokenizer = SubwordTokenizer(library.to_str(), str(folder))
    fits = tokenizer.vocab_size <= vocab_size
    check(fits, f"{folder} has a tokenizer of {tokenizer.vocab_size} ids, but vocab_size={vocab_size} in its config")
    return tokenizer.dump()
