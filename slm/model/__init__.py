"""Tokens in, hidden states and logits out, the loss of them, the next token chosen."""
