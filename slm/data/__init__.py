"""Where tokens come from: dummy data and text, cut into windows, in an order that can be resumed."""

from slm.data.dummy import DummyData
from slm.data.text_data import TextData
from slm.data.token_data import TokenData

__all__ = ["DummyData", "TextData", "TokenData"]
