"""A pretend accelerator: the torch device `pretend`, whose tensors keep their values on the CPU.

It shows on any machine what otherwise only a GPU shows:

* an operation on tensors of two devices fails;
* a *read*, for which the host has to wait until the device has computed a value or a size, is
  counted: `.item()`, `.tolist()`, `.cpu()`, `nonzero`, boolean indices, `unique` and the like;
* so is every operation on the device, because each costs a launch.

    with pretend_device() as counts:
        counts.watch(model)
        ...
        print(counts.ours.operations.most_common())

It rests on torch's experimental interface for devices written in Python. Nothing is asynchronous.
"""

import collections
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

PACKAGE = str(Path(__file__).parents[1] / "igd_ds")
NAME = "pretend"

WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount",
    "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip
"""Operations whose result, or its size, the host waits for."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclasses.dataclass
class Tally:
    """What was counted, by operation and the line of igd_ds that asked for it."""

    reads: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    operations: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class Counts:
    """Reads and operations, apart for what happens inside and outside of watched models.

    Attributes:
        ours: the tally outside of models.
        models: the tally inside.
        passes: calls of watched models.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.clear()

    def clear(self) -> None:
        """Begin again at zero."""
        self.ours, self.models, self.passes = Tally(), Tally(), 0

    def watch(self, model: torch.nn.Module) -> None:
        """Count what happens in the model's forward passes apart."""
        model.register_forward_pre_hook(lambda *_: self._enter())
        model.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self) -> None:
        self.passes += self.depth == 0
        self.depth += 1

    def _leave(self) -> None:
        self.depth -= 1

    def note(self, operation: str, is_read: bool = False) -> None:
        """Count one operation or one read."""
        tally = self.models if self.depth else self.ours
        (tally.reads if is_read else tally.operations)[f"{_line()} {operation}"] += 1


def _line() -> str:
    """Return the innermost line of igd_ds that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device; `values` is the CPU tensor behind it."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "PretendTensor":
        values = values.detach()
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=torch.device(NAME, 0),
        )
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def __repr__(self) -> str:
        return f"pretend({self.values!r})"

    def tolist(self):
        _counts.note("tolist", is_read=True)
        return self.values.tolist()

    def numpy(self, **_):
        raise TypeError("a tensor of the device 'pretend' has no NumPy array: copy it to the CPU")


_counts = Counts()


class _Mode(TorchDispatchMode):
    """Sees operations that have no PretendTensor among their arguments, such as `torch.zeros`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function: Callable, args: tuple, kwargs: dict):
    """Run an operation on the values behind its arguments; its results lie where they belong."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    wanted = kwargs.get("device")
    to_us = bool(ours) if wanted is None else torch.device(wanted).type == NAME
    if not ours and not to_us:
        return function(*args, **kwargs)

    name = function._schema.name.removeprefix("aten::")
    _counts.note(name)
    _note_reads(name, args, ours, to_us)
    if name not in ("copy_", *INDEXING):
        others = [tuple(t.shape) for t in tensors if not isinstance(t, PretendTensor) and t.dim()]
        if ours and others:
            raise RuntimeError(f"{name} got tensors on the pretend device and the CPU: {others}")

    plain_args, plain_kwargs = tree_map_only(PretendTensor, lambda t: t.values, (args, kwargs))
    if wanted is not None:
        plain_kwargs["device"] = torch.device("cpu")
    if name == "_to_copy":
        plain_kwargs.pop("non_blocking", None)
    result = function(*plain_args, **plain_kwargs)

    # An operation in place returns its own argument.
    written = {id(values.values): values for values in ours}
    written |= {id(tensor): tensor for tensor in tensors}
    if name == "copy_":
        return args[0]
    if not to_us:
        return result
    return tree_map_only(
        torch.Tensor, lambda t: written[id(t)] if id(t) in written else PretendTensor(t), result
    )


def _note_reads(name: str, args: tuple, ours: list[PretendTensor], to_us: bool) -> None:
    """Count what the host has to wait for."""
    waits = bool(ours) and name in WAITING
    if name in INDEXING:
        used = [index for index in args[1] if isinstance(index, torch.Tensor)]
        waits = any(index.dtype == torch.bool for index in used) or len(ours) < 1 + len(used)
    if name == "_to_copy":
        waits = not to_us
    if name == "copy_":
        waits = isinstance(args[1], PretendTensor) and not isinstance(args[0], PretendTensor)
    if waits:
        _counts.note(name, is_read=True)


@functools.cache
def _library() -> torch.library.Library:
    """Register the device with torch, which can be done once per process.

    `torch.tensor` and `Tensor.to` make their results in C++, where `_Mode` does not see them.
    """
    backend_registration._setup_privateuseone_for_python_backend(NAME)

    # From here on, this is the process's accelerator, and tests that never use it are asked about
    # it too: gradient checkpointing wants to know which dtypes it would autocast to.
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    library = torch.library.Library("aten", "IMPL")

    def empty(size, *, dtype=None, **_):
        return PretendTensor(torch.empty(size, dtype=dtype))

    def empty_strided(size, stride, *, dtype=None, **_):
        return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        return _run(torch.ops.aten.copy_.default, (target, source), {})

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


@contextlib.contextmanager
def pretend_device() -> Iterator[Counts]:
    """Let tensors be made on, and moved to, the device `pretend`; counts begin at zero."""
    _library()
    _counts.clear()
    swaps = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # in Module.to
    try:
        with _Mode():
            yield _counts
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(swaps)
