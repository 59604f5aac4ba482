"""A network and its tokenizer as one file of llama.cpp, in GGUF."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from slm.data.tokenizer import END_OF_TEXT
from slm.durable import replacing
from slm.errors import InputError, check
from slm.formats.hugging_face import check_is_ours, num_kv_heads_of
from slm.formats.names import Names
from slm.formats.tokenizers import library_tokenizer
from slm.training.language_model import LanguageModel

LAYERS = {
    "token_embedding": "token_embd",
    "position_embedding": "position_embd",
    "attn_norm": "attn_norm",
    "attn.out": "attn_output",
    "ff_norm": "ffn_norm",
    "ff.gate": "ffn_gate",
    "ff.up": "ffn_up",
    "ff.down": "ffn_down",
    "final_norm": "output_norm",
    "output": "output",
}
NAMES = {
    "gpt2": Names("blk.{}.", {**LAYERS, "attn.qkv": "attn_qkv"}),
    "llama": Names("blk.{}.", {**LAYERS, "attn.qkv": ("attn_q", "attn_k", "attn_v")}),
}
GPT2_PATTERN = "the pattern of GPT-2"
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WAYS_OF_CUTTING = {
    (GPT2_PATTERN,): "gpt-2",
    ("single digits", GPT2_PATTERN): "smollm",
    (LLAMA_3_PATTERN,): "llama-bpe",
}
"""How a tokenizer cuts a text into the words that it then merges in, and what llama.cpp calls that."""
REMEDY = "llama.cpp is known here to read byte-level BPE that cuts as GPT-2, SmolLM2 or Llama 3 does"
NO_MERGES = [f"{END_OF_TEXT} {END_OF_TEXT}"]
"""One that no text ever needs: llama.cpp takes no tokenizer without any."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens, as GGUF numbers them."""


def import_gguf() -> Any:
    """The package; raises InputError where it is not there."""
    try:
        import gguf
    except ImportError as error:
        raise InputError('the format gguf needs the package gguf: pip install -e ".[gguf]"') from error
    return gguf


def write_gguf(model: LanguageModel, dumped: str | None, output: Path) -> None:
    """Write a file that llama.cpp loads, in 32 bits.

    Args:
        model: whose weights and sizes it has.
        dumped: the tokenizer of its checkpoint.
        output: the new file.

    Raises:
        InputError: llama.cpp has no such network or tokenizer, the file cannot be written, or the package is not there.
    """
    check_is_ours(model, "gguf")
    gguf, hparams = import_gguf(), model.hparams
    architecture, num_heads, num_kv_heads = hparams["architecture"], hparams["num_heads"], num_kv_heads_of(hparams)
    vocabulary = _vocabulary(dumped, hparams["vocab_size"])
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_context_length(hparams["max_seq_len"])
    writer.add_embedding_length(hparams["embed_dim"])
    writer.add_block_count(hparams["num_layers"])
    writer.add_feed_forward_length(hparams["hidden_dim"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_vocab_size(hparams["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if architecture == "llama":
        writer.add_rope_dimension_count(hparams["embed_dim"] // num_heads)
        writer.add_rope_freq_base(hparams["rope_theta"])
        writer.add_layer_norm_rms_eps(hparams["norm_eps"])
    else:
        writer.add_layer_norm_eps(hparams["norm_eps"])
    for name, value in vocabulary.items():
        getattr(writer, f"add_{name}")(value)
    state = NAMES[architecture].theirs(model.transformer.state_dict(), num_heads, num_kv_heads)
    for name, weights in state.items():
        if name.endswith("attn_q.weight"):
            weights = _interleaved(weights, num_heads)
        elif name.endswith("attn_k.weight"):
            weights = _interleaved(weights, num_kv_heads)
        writer.add_tensor(name, weights.float().numpy())
    with replacing(output) as file:
        writer.write_header_to_file(Path(file.name))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _interleaved(weights: Tensor, num_heads: int) -> Tensor:
    """The matrix of queries or keys with the two values that are turned together beside one another, as llama.cpp's."""
    pairs = weights.view(num_heads, 2, -1, weights.shape[-1])  # (H, 2, D / H / 2, D)
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


def _vocabulary(dumped: str | None, vocab_size: int) -> dict[str, Any]:
    """What the writer adds for a tokenizer, by the names of its methods; raises InputError where llama.cpp has none."""
    check(dumped is not None, "llama.cpp reads text, but this model has the numbers of tokens: train it on a text")
    assert dumped is not None
    library, closing = library_tokenizer(dumped, vocab_size)
    settings = json.loads(library.to_str())
    vocabulary = library.get_vocab()
    num_ids = max(vocabulary.values()) + 1
    check(num_ids <= vocab_size, f"the tokenizer has {num_ids} ids, but the model vocab_size={vocab_size}")
    tokens = [f"[unused {index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, NORMAL
    for token in settings["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        is_plain = token["special"] or not (token["lstrip"] or token["rstrip"] or token["single_word"])
        check(is_plain, f"the tokenizer finds {token['content']!r} by its surroundings, which llama.cpp does not")
    end_of_text = vocabulary[closing]
    types[end_of_text] = CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in settings["model"].get("merges", [])]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "gpt-2" if dumped == "bytes" else _way_of_cutting(settings),
        "token_list": tokens,
        "token_types": types,
        "token_merges": merges or NO_MERGES,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "add_bos_token": False,
    }


def _way_of_cutting(settings: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which a tokenizer cuts a text; raises InputError where it has no name for it."""
    model, decoder = settings["model"], (settings["decoder"] or {}).get("type")
    is_byte_level = model["type"] == "BPE" and decoder == "ByteLevel"
    check(is_byte_level, f"the tokenizer is {model['type']} with the decoder {decoder}: {REMEDY}")
    normalizer = (settings["normalizer"] or {}).get("type")
    check(normalizer is None, f"the tokenizer changes texts by {normalizer} before it cuts them: {REMEDY}")
    pre = settings["pre_tokenizer"] or {}
    cuts = []
    for step in pre.get("pretokenizers", [pre]):
        kind = step.get("type")
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            cuts += [GPT2_PATTERN] if step["use_regex"] else []
        elif kind == "Digits" and step["individual_digits"]:
            cuts.append("single digits")
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            cuts.append(step["pattern"].get("Regex", ""))
        else:
            cuts.append(f"{kind}")
    name = WAYS_OF_CUTTING.get(tuple(cuts))
    check(name is not None, f"the tokenizer cuts texts by {' and then '.join(cuts) or 'nothing'}: {REMEDY}")
    assert name is not None
    ignores = model.get("ignore_merges", False)
    check(ignores == (name == "llama-bpe"), f"the tokenizer has ignore_merges={ignores}: {REMEDY}")
    return name
