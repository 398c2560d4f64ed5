"""Counts what copies tensors."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

COPIES = {"_to_copy", "cat", "clone", "constant_pad_nd", "contiguous", "copy_", "slice_backward", "select_backward"}


class CountCopies(TorchDispatchMode):
    """How often each operator of ATen that copies was called; not those that are parts of other operators."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.found.update([name] if name in COPIES else [])
        return func(*args, **(kwargs or {}))
