"""A network in the formats of GPT-2 and Llama, as the Hugging Face ecosystem has them, and back."""

import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm.errors import InputError, check
from slm.formats.names import Names
from slm.model.transformer import Transformer
from slm.training.language_model import LanguageModel


class Family(NamedTuple):
    """How `transformers` keeps the models of a family.

    Args:
        config: the name of its class of configs.
        model: the name of its class of models.
        names: of the weights.
        options: of the network, and what the config calls them.
        defaults: what an option is where the config does not say.
        mathematics: what the config may say of a network that is the one here; the first where it does not say.
    """

    config: str
    model: str
    names: Names
    options: Mapping[str, str]
    defaults: Mapping[str, Any]
    mathematics: Mapping[str, tuple[Any, ...]]


FAMILIES = {
    "gpt2": Family(
        config="GPT2Config",
        model="GPT2LMHeadModel",
        names=Names(
            "transformer.h.{}.",
            {
                "token_embedding": "transformer.wte",
                "position_embedding": "transformer.wpe",
                "attn_norm": "ln_1",
                "attn.qkv": "attn.c_attn",
                "attn.out": "attn.c_proj",
                "ff_norm": "ln_2",
                "ff.up": "mlp.c_fc",
                "ff.down": "mlp.c_proj",
                "final_norm": "transformer.ln_f",
                "output": "lm_head",
            },
            is_transposed=True,
        ),
        options={
            "vocab_size": "vocab_size",
            "embed_dim": "n_embd",
            "num_heads": "n_head",
            "num_layers": "n_layer",
            "hidden_dim": "n_inner",
            "max_seq_len": "n_positions",
            "dropout": "resid_pdrop",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        defaults={"n_inner": None, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        mathematics={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "quantization_config": (None,),
        },
    ),
    "llama": Family(
        config="LlamaConfig",
        model="LlamaForCausalLM",
        names=Names(
            "model.layers.{}.",
            {
                "token_embedding": "model.embed_tokens",
                "attn_norm": "input_layernorm",
                "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "attn.out": "self_attn.o_proj",
                "ff_norm": "post_attention_layernorm",
                "ff.gate": "mlp.gate_proj",
                "ff.up": "mlp.up_proj",
                "ff.down": "mlp.down_proj",
                "final_norm": "model.norm",
                "output": "lm_head",
            },
        ),
        options={
            "vocab_size": "vocab_size",
            "embed_dim": "hidden_size",
            "num_heads": "num_attention_heads",
            "num_layers": "num_hidden_layers",
            "hidden_dim": "intermediate_size",
            "max_seq_len": "max_position_embeddings",
            "dropout": "attention_dropout",
            "num_kv_heads": "num_key_value_heads",
            "rope_theta": "rope_theta",
            "norm_eps": "rms_norm_eps",
            "tie_embeddings": "tie_word_embeddings",
        },
        defaults={
            "attention_dropout": 0.0,
            "num_key_value_heads": None,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
        },
        mathematics={
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "pretraining_tp": (1,),
            "rope_interleaved": (False,),
            "partial_rotary_factor": (1.0, None),
            "quantization_config": (None,),
        },
    ),
}
NOT_WEIGHTS = re.compile(r".*\.attn\.(?:masked_)?bias|.*\.rotary_emb\.inv_freq")
"""What older versions of `transformers` kept beside the weights: the causal mask and the speeds of rotary positions."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def import_transformers() -> Any:
    """The library, told to be quiet; raises InputError where it is not there."""
    try:
        import transformers
    except ImportError as error:
        raise InputError('the format hf needs the package transformers: pip install -e ".[export]"') from error
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def check_is_ours(model: LanguageModel, format_name: str) -> None:
    """Raise InputError where the network of a model is one that others do not know."""
    name, hparams = type(model.transformer).__name__, model.hparams
    is_known = model.network is Transformer
    check(is_known, f"the format {format_name} cannot hold a {name}: export a model whose network is Transformer")
    grouped = hparams["architecture"] == "gpt2" and hparams["num_kv_heads"] not in (None, hparams["num_heads"])
    check(
        not grouped,
        f"the format {format_name} has no GPT-2 with num_kv_heads={hparams['num_kv_heads']}: export one whose "
        "architecture is llama",
    )


def num_kv_heads_of(hparams: Mapping[str, Any]) -> int:
    return hparams["num_kv_heads"] or hparams["num_heads"]


def as_transformers(model: LanguageModel, end_of_text: int | None) -> Any:
    """A `GPT2LMHeadModel` or `LlamaForCausalLM` with the weights of a model.

    Args:
        model: that it is made of, and computes the same as.
        end_of_text: the id that closes a document, if there is one.

    Raises:
        InputError: its network is another one, or `transformers` is not there.
    """
    check_is_ours(model, "hf")
    transformers, hparams = import_transformers(), model.hparams
    family, num_kv_heads = FAMILIES[hparams["architecture"]], num_kv_heads_of(hparams)
    options = {theirs: hparams[ours] for ours, theirs in family.options.items()}
    if hparams["architecture"] == "gpt2":
        options |= dict.fromkeys(("embd_pdrop", "attn_pdrop"), hparams["dropout"])
    else:
        options["num_key_value_heads"] = num_kv_heads
    config = getattr(transformers, family.config)(**options, bos_token_id=end_of_text, eos_token_id=end_of_text)
    exported = getattr(transformers, family.model)(config)
    state = family.names.theirs(model.transformer.state_dict(), hparams["num_heads"], num_kv_heads)
    missing, untold = exported.load_state_dict(state, strict=False)
    assert (missing, untold) == (["lm_head.weight"] if hparams["tie_embeddings"] else [], [])
    exported.tie_weights()
    return exported


def read_transformers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The hyper-parameters and the weights of a Transformer, out of a folder that `transformers` wrote.

    Raises:
        InputError: it holds no model that is the network of this project, or cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        check(isinstance(config, dict), f"{folder}/config.json holds no object: give the config of a model")
        options = _options(folder, config)
        try:
            with torch.device("meta"):  # its shapes alone
                model = LanguageModel(**options)
        except InputError as error:
            raise InputError(f"{folder} has sizes that no network has: {error}") from error
        return dict(model.hparams), _read_weights(folder, model)
    except InputError:
        raise
    except Exception as error:  # the libraries' own are of many kinds
        raise InputError(f"from_hf={folder} cannot be read: {error}") from error


def _options(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the network that a config tells of; raises InputError where there is none here."""
    kind = str(config.get("model_type"))
    check(kind in FAMILIES, f"{folder} has model_type={kind}: the networks here are {' and '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for name, meant in family.mathematics.items():
        value = config.get(name, meant[0])
        check(value in meant, f"{folder} has {name}={value}: the network here has {' or '.join(map(str, meant))}")
    told = {**family.defaults, **config}
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
        others = {key: value for key, value in rope.items() if key != "rope_theta" and value != plain.get(key)}
        check(not others, f"{folder} has {name}={rope}: the network here has plain rotary positions")
        told["rope_theta"] = rope.get("rope_theta", told.get("rope_theta"))
    missing = [name for name in family.options.values() if name not in told]
    check(not missing, f"{folder}/config.json does not say {', '.join(missing)}: give the config of a whole model")
    options = {ours: _value(folder, theirs, told[theirs], ours) for ours, theirs in family.options.items()}
    embed_dim, num_heads = options["embed_dim"], options["num_heads"]
    options["hidden_dim"] = options["hidden_dim"] or 4 * embed_dim
    if options.get("num_kv_heads") == num_heads:
        options["num_kv_heads"] = None
    head_dim = config.get("head_dim")
    check(
        head_dim is None or head_dim * num_heads == embed_dim,
        f"{folder} has head_dim={head_dim}: the network here has {embed_dim} / {num_heads}, its width for each head",
    )
    return {**options, "architecture": kind}


def _value(folder: Path, name: str, value: Any, ours: str) -> Any:
    """What a config says of an option, as the network here takes it; raises InputError where it is of another type."""
    if value is None and ours in ("hidden_dim", "num_kv_heads"):
        return None
    kind = type(LanguageModel.network_options()[ours])
    if kind is float and type(value) is int:
        return float(value)
    meant = int if kind is type(None) else kind
    check(type(value) is meant, f"{folder} has {name}={value!r} in its config.json, which is no {meant.__name__}")
    return value


def _read_weights(folder: Path, model: LanguageModel) -> dict[str, Tensor]:
    """The weights of a Transformer, in 32 bits, out of the files of a folder.

    Raises:
        InputError: one is missing, superfluous or of another shape.
    """
    hparams, like = model.hparams, model.transformer.state_dict()
    family = FAMILIES[hparams["architecture"]]
    prefix = family.names.layers["final_norm"].partition(".")[0]  # type: ignore[union-attr]
    state = {}
    for name, weights in _tensors(folder):
        if not NOT_WEIGHTS.fullmatch(name):
            has_prefix = name.startswith((f"{prefix}.", "lm_head."))
            state[name if has_prefix else f"{prefix}.{name}"] = weights
    if hparams["tie_embeddings"] and (head := state.pop("lm_head.weight", None)) is not None:
        embedding = str(family.names.layers["token_embedding"])
        is_tied = torch.equal(head.float(), state.get(f"{embedding}.weight", head[:0]).float())
        check(
            is_tied,
            f"{folder} has other values in lm_head.weight than in {embedding}.weight, though its config.json has "
            "tie_word_embeddings=True: correct that",
        )
    shapes = family.names.theirs(like, hparams["num_heads"], num_kv_heads_of(hparams))
    untold, missing = sorted(state.keys() - shapes), sorted(shapes.keys() - state)
    check(not untold, f"{folder} has weights that its config.json does not mention: {', '.join(untold[:3])}")
    check(not missing, f"{folder} has no weights for {', '.join(missing[:3])}{' and more' if missing[3:] else ''}")
    for name, weights in state.items():
        shape, meant = tuple(weights.shape), tuple(shapes[name].shape)
        check(shape == meant, f"{folder} has {name} of shape {shape}, but by its config.json that is {meant}")
        check(weights.dtype in FLOATS, f"{folder} has {name} in {weights.dtype}: give weights of 16 or 32 bits")
    return {name: weights.float() for name, weights in family.names.ours(state, like)}


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors in the files that a folder of `transformers` is read from, which looks for these in this order."""
    for kind, tensors_in in (("model.safetensors", _from_safetensors), ("pytorch_model.bin", _from_pickle)):
        whole, index = folder / kind, folder / f"{kind}.index.json"
        if whole.is_file():
            files = [whole]
        elif index.is_file():
            content = json.loads(index.read_bytes())
            is_index = isinstance(content, dict) and isinstance(content.get("weight_map"), dict)
            check(is_index, f"{index} does not say which file has which weights: it needs a weight_map")
            files = [folder / file for file in sorted({*content["weight_map"].values()})]
        else:
            continue
        for file in files:
            yield from tensors_in(file)
        return
    raise InputError(f"from_hf={folder} has no weights: there is neither model.safetensors nor pytorch_model.bin")


def _from_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise InputError(f'{file} needs the package safetensors: pip install -e ".[export]"') from error
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            yield name, tensors.get_tensor(name)


def _from_pickle(file: Path) -> Iterator[tuple[str, Tensor]]:
    yield from torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)).items()
