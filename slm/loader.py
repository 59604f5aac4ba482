"""Which window of a token stream comes when.

N tokens in the stream, T tokens in a window.
"""

from torch import Tensor
from torch.utils.data import Dataset


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive windows over a stream (N,): item k is tokens kT to kT+T and the same one later, each (T,), int64.

    Every token but the first is the target of at most one window; what is left at the end is shorter than a window.
    """

    def __init__(self, stream: Tensor, seq_len: int) -> None:
        self.stream = stream
        self.seq_len = seq_len

    def __len__(self) -> int:
        return max(0, len(self.stream) - 1) // self.seq_len

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.seq_len
        window = self.stream[start : start + self.seq_len + 1].long()
        return window[:-1], window[1:]
