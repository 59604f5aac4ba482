"""What a network does with one sequence: how each token surprises it, what its layers would say, what it attends to.

T time, D embedding, H heads, L blocks, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slm.errors import InputError, check
from slm.model.functional import causal_weights
from slm.model.transformer import CausalSelfAttention, Transformer

POSITIONS_AT_ONCE = 64
"""Of so many the logits are there at the same time: those of a whole sequence may take much memory."""


@dataclass(frozen=True)
class Reading:
    """What a network computed for a sequence.

    Attributes:
        tokens: (T,).
        hidden: what it gives back, (T, D).
        stream: what goes into its first block and what each block makes of it, (T, D) each, L + 1 of them.
        inputs: its attention layers in the order in which they are called, each with what it is given, (1, T, D).
    """

    tokens: Tensor
    hidden: Tensor
    stream: Sequence[Tensor]
    inputs: Sequence[tuple[CausalSelfAttention, Tensor]]

    @torch.no_grad()
    def attention(self, layer: int, start: int = 0, end: int | None = None) -> Tensor:
        """How much each token from a start to an end, by default each, attends to each one up to the end.

        Returns:
            (H, end - start, end) in fp32; each row adds up to 1.
        """
        attention, x = self.inputs[layer]
        q, k, _ = attention.heads(x[:, :end])
        return causal_weights(q[:, :, start:], k)[0].float()


class Surprise(NamedTuple):
    """How a model takes each token of a sequence but the first.

    Attributes:
        nats: minus the logarithm of the probability that it gave the token, (T - 1,).
        ranks: the token's place among all by that probability, from 1 on, (T - 1,).
    """

    nats: Tensor
    ranks: Tensor


@torch.no_grad()
def read(network: nn.Module, tokens: Tensor) -> Reading:
    """Let a network read tokens (T,), in eval mode, and note what happens on the way; raises what its forward raises.

    Attention layers are found wherever they are in the network, blocks in its `blocks`.
    """
    stream: list[Tensor] = []
    inputs: list[tuple[CausalSelfAttention, Tensor]] = []

    def note_input(block: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        if not stream:
            stream.append((given[0] if given else named["x"])[0])

    def note_output(block: nn.Module, given: tuple[Tensor, ...], x: Tensor) -> None:
        stream.append(x[0])

    def note_attention(layer: CausalSelfAttention, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        inputs.append((layer, given[0] if given else named["x"]))

    modes = {module: module.training for module in network.modules()}
    hooks = [layer.register_forward_pre_hook(note_attention, with_kwargs=True) for layer in attention_layers(network)]
    if isinstance(network, Transformer):
        hooks += [block.register_forward_pre_hook(note_input, with_kwargs=True) for block in network.blocks]
        hooks += [block.register_forward_hook(note_output) for block in network.blocks]
    try:
        network.eval()
        hidden = network.forward(tokens[None])[0]  # not __call__, which may be compiled
    finally:
        for hook in hooks:
            hook.remove()
        for module, is_training in modes.items():
            module.training = is_training
    return Reading(tokens, hidden, stream, inputs)


def attention(network: nn.Module, tokens: Tensor) -> list[Tensor]:
    """How much each token of a sequence (T,) attends to each one up to it: (H, T, T) of every layer, in fp32.

    A layer is one of `attention_layers`. Of a network without any the list is empty.
    """
    reading = read(network, tokens)
    return [reading.attention(layer) for layer in range(len(reading.inputs))]


def attention_layers(network: nn.Module) -> list[CausalSelfAttention]:
    """Each `CausalSelfAttention`, wherever it is; of one whose `forward` is another, nothing is known."""
    return [
        module
        for module in network.modules()
        if isinstance(module, CausalSelfAttention) and type(module).forward is CausalSelfAttention.forward
    ]


@torch.no_grad()
def surprise(transformer: Transformer, reading: Reading) -> Surprise:
    """How each token but the first surprised the network; raises InputError as `next_logits` does."""
    nats = [reading.hidden.new_empty(0, dtype=torch.float)]
    ranks = [reading.tokens.new_empty(0, dtype=torch.int32)]
    for start in range(0, len(reading.tokens) - 1, POSITIONS_AT_ONCE):
        following = reading.tokens[1:][start : start + POSITIONS_AT_ONCE]
        logits = transformer.logits(reading.hidden[:-1][start : start + POSITIONS_AT_ONCE]).float()
        log_probabilities = _log_probabilities(logits)
        own = log_probabilities.gather(-1, following[:, None])  # (T, 1)
        nats.append(-own[:, 0])
        ranks.append((log_probabilities > own).sum(-1, dtype=torch.int32) + 1)  # int64 takes seven times as long
    return Surprise(torch.cat(nats), torch.cat(ranks))


@torch.no_grad()
def next_logits(transformer: Transformer, hidden: Tensor) -> Tensor:
    """Logits (..., V), in fp32, of hidden states (..., D); raises InputError where they give no probabilities."""
    logits = transformer.logits(hidden).float()
    _log_probabilities(logits)
    return logits


def _log_probabilities(logits: Tensor) -> Tensor:
    """Of logits (..., V); those that are -inf are fine."""
    log_probabilities = logits.log_softmax(-1)
    is_finite = not bool(log_probabilities[..., 0].isnan().any())  # where one is not a number, its whole row is not
    check(is_finite, "the model's logits are not finite: take a checkpoint from before it diverged")
    return log_probabilities


@torch.no_grad()
def layer_logits(transformer: Transformer, reading: Reading, position: int) -> Tensor:
    """What the network would say comes next, were it to end after its embedding, or after each block: (L + 1, V).

    Final normalization and output layer are applied to the residual stream at each depth ("logit lens", nostalgebraist,
    2020, "interpreting GPT: the logit lens"). The last row is what the network does say.

    Raises:
        InputError: a network that does something else after its last block, or logits that are not finite.
    """
    cannot = "this network does more after its blocks than a final normalization: what a layer would say is not known"
    check(len(reading.stream) > 1, cannot)
    states = transformer.final_norm(torch.stack([x[position] for x in reading.stream]))
    if not torch.allclose(states[-1], reading.hidden[position], rtol=1e-3, atol=1e-4) and states.isfinite().all():
        raise InputError(cannot)
    return next_logits(transformer, states)
