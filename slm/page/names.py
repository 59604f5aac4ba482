"""Tokens as one sees them."""

from slm.data.text_stream import Numbers
from slm.data.tokenizer import Tokenizer

ENDING = "<end>"
SEEN_AS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
LONE = "surrogateescape"
"""How Python keeps bytes that are no character."""


def visible(tokenizer: Tokenizer | Numbers, token: int) -> str:
    """A token's text, in which spaces and line breaks are signs, and bytes that alone are no character like \\xc3.

    Of other characters that cannot be seen, the number is written, like U+00A0.
    """
    if token == tokenizer.end_of_text:
        return ENDING
    if token >= tokenizer.vocab_size:  # of the model it may be larger
        return f"<unused {token}>"
    if isinstance(tokenizer, Numbers):
        return str(token)
    text = tokenizer.decode([token]) if tokenizer.pieces is None else tokenizer.pieces[token].decode(errors=LONE)
    return "".join(map(_sign, text)) or f"<empty {token}>"


def _sign(character: str) -> str:
    if character in SEEN_AS or character.isprintable():
        return SEEN_AS.get(character, character)
    number = ord(character)
    is_lone = 0xDC80 <= number <= 0xDCFF
    return ascii(character)[1:-1].replace("\\udc", "\\x") if is_lone or number < 0x80 else f"U+{number:04X}"
