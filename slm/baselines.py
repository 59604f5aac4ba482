"""The same model as others train it, in a plain loop of torch; and how loops take turns, so that they can be compared.

`python -m slm.baselines NAME SETTINGS` is one such loop in a process of its own, which has imported nothing else.
"""

import contextlib
import json
import os
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossOf = Callable[[Tensor, Tensor], Tensor]
STEPS = 10
"""Optimizer steps in a round."""


class Turns:
    """This process's side of a comparison: it trains a round of steps when told to, and writes how long they took.

    Each round is one line of JSON on stdout and waits for a line on stdin; at its end the process ends. What else the
    process prints is dropped.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        self._step, self._start = 0, time.perf_counter()

    def after_step(self, device: torch.device, facts: Mapping[str, Any] = {}) -> None:
        """Count an optimizer step; at the end of a round, answer and wait."""
        self._step += 1
        if self._step < STEPS:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        milliseconds = (time.perf_counter() - self._start) / STEPS * 1e3
        answer = {"ms": milliseconds, "memory": _peak_memory(device), **facts}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=self._answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self._step, self._start = 0, time.perf_counter()


def _peak_memory(device: torch.device) -> float:
    """In GB: of the GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class TeachingScript(nn.Module):
    """The script this project grew from: `nn.TransformerEncoder` under a causal mask, and an output layer."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        embed_dim = sizes["embed_dim"]
        layer = nn.TransformerEncoderLayer(
            embed_dim, sizes["num_heads"], sizes["hidden_dim"], dropout=0.0, batch_first=True
        )
        self.token_embedding = nn.Embedding(sizes["vocab_size"], embed_dim)
        self.position_embedding = nn.Embedding(sizes["max_seq_len"], embed_dim)
        self.encoder = nn.TransformerEncoder(layer, sizes["num_layers"])
        self.output = nn.Linear(embed_dim, sizes["vocab_size"])

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        logits: Tensor = self.output(self.encoder(x, mask=mask, is_causal=True))
        return logits


def teaching_script(sizes: dict[str, int], device: torch.device) -> tuple[nn.Module, LossOf]:
    model = TeachingScript(sizes).to(device)
    return model, lambda tokens, targets: F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def hugging_face(sizes: dict[str, Any], device: torch.device) -> tuple[nn.Module, LossOf]:
    """The library's model of the same family and sizes, without dropout."""
    import transformers

    common = {"vocab_size": sizes["vocab_size"], "use_cache": False, "bos_token_id": None, "eos_token_id": None}
    config: Any
    model: Any
    if sizes["architecture"] == "llama":
        config = transformers.LlamaConfig(
            **common,
            max_position_embeddings=sizes["max_seq_len"],
            hidden_size=sizes["embed_dim"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_heads"],
            num_key_value_heads=sizes["num_kv_heads"] or sizes["num_heads"],
            intermediate_size=sizes["hidden_dim"],
            tie_word_embeddings=sizes["tie_embeddings"],
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            **common,
            n_positions=sizes["max_seq_len"],
            n_embd=sizes["embed_dim"],
            n_layer=sizes["num_layers"],
            n_head=sizes["num_heads"],
            n_inner=sizes["hidden_dim"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=sizes["tie_embeddings"],
        )
        model = transformers.GPT2LMHeadModel(config)
    model.to(device)
    return model, lambda tokens, targets: model(input_ids=tokens, labels=tokens).loss


def train_in_turns(
    model: nn.Module,
    loss_of: LossOf,
    optimizer: torch.optim.Optimizer,
    batch_of: Callable[[], tuple[Tensor, Tensor]],
    autocast: torch.dtype | None,
) -> None:
    """A plain training loop with clipping, as every script has one, for as long as rounds are asked for.

    On a CPU, which does not run ahead, it also tells how long the optimizer's steps took.
    """
    turns, device = Turns(), next(model.parameters()).device
    times: deque[float] = deque(maxlen=STEPS)
    while True:
        tokens, targets = (part.to(device) for part in batch_of())
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = loss_of(tokens, targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        start = time.perf_counter()
        optimizer.step()
        times.append((time.perf_counter() - start) * 1e3)
        turns.after_step(device, {"optimizer_ms": statistics.median(times)} if device.type == "cpu" else {})


def main(name: str, settings: str) -> None:
    sizes = json.loads(settings)
    device, autocast = torch.device(sizes.pop("device")), sizes.pop("autocast")
    torch.manual_seed(0)
    build = {"teaching script": teaching_script, "Hugging Face": hugging_face}[name]
    model, loss_of = build(sizes, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shape = (sizes["batch_size"], sizes["max_seq_len"] + 1)

    def random_batch() -> tuple[Tensor, Tensor]:
        windows = torch.randint(sizes["vocab_size"], shape)
        return windows[:, :-1], windows[:, 1:]

    in_fp32 = name == "teaching script" or autocast is None
    train_in_turns(model, loss_of, optimizer, random_batch, None if in_fp32 else getattr(torch, autocast))


if __name__ == "__main__":
    main(*sys.argv[1:])
