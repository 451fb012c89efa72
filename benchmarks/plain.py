"""The limit: the network with its ReLUs in plaintext float32 torch, in several forms.

    eager     as torch has it, in eval mode and without gradients
    folded    batch-norm folded into the convolutions, channels last
    frozen    folded, traced, frozen and optimised for inference by torch.jit
    compiled  folded, channels last, through torch.compile with frozen weights

The last is left out where it does not work, as without a C++ compiler. All run at rank
1, which has the images; nothing crosses a network.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .party import Control, Result
from .rows import PLAIN

FORMS = ("eager", "folded", "frozen", "compiled")
_TOLERANCE = 1e-2  # of logits; float32 in another order


class FormError(RuntimeError):
    """A form that this machine cannot have, or that computes something else."""


def in_form(form: str, network: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The network as a function in one of FORMS; it has run once on these images.

    Raises: FormError, with the reason in one line.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch, about its own parts
            made = _made(form, network, x)
            far = float((made(x) - network(x)).abs().max())
    except Exception as error:  # compilers fail in any way
        text = (str(error).splitlines() or [""])[0]
        raise FormError(f"{type(error).__name__}: {text}") from error
    if far > _TOLERANCE:
        raise FormError(f"its logits differ by {far:.2g} from torch's")
    return made


def _made(form: str, network: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    if form == "eager":
        return network
    folded = fold(network)
    for values in folded.parameters():
        if values.dim() == 4:
            values.data = values.data.contiguous(memory_format=torch.channels_last)
    like = x.contiguous(memory_format=torch.channels_last)
    if form == "frozen":
        traced = torch.jit.freeze(torch.jit.trace(folded, like))
        return torch.jit.optimize_for_inference(traced)
    if form == "compiled":
        compiled: Callable[[Tensor], Tensor] = torch.compile(
            folded, options={"freezing": True}
        )
        return compiled
    return folded


def fold(network: nn.Module) -> nn.Module:
    """A copy with every batch-norm behind a convolution folded into it."""
    copied = copy.deepcopy(network)
    names = [
        name for name, one in copied.named_modules() if not next(one.children(), None)
    ]
    for first, second in itertools.pairwise(names):
        conv, norm = copied.get_submodule(first), copied.get_submodule(second)
        if isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d:
            _replace(copied, first, nn.utils.fuse_conv_bn_eval(conv, norm))
            _replace(copied, second, nn.Identity())
    return copied


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)


class PlainSystem:
    """A form of the network, beside the private ones.

    Args:
        form: its name.
        compute: the network; None at rank 0, which waits.
        x: the images.
        check: largest error and agreement of the logits.
    """

    activation = PLAIN

    def __init__(
        self,
        form: str,
        compute: Callable[[Tensor], Tensor] | None,
        x: Tensor,
        check: Callable[[Tensor], tuple[float, float | None] | None],
    ) -> None:
        self.engine = f"torch+{form}"
        self._compute, self._check = compute, check
        last = form != "eager"
        self._x = x.contiguous(memory_format=torch.channels_last) if last else x

    def prepare(self) -> float:
        """Nothing: it was made before."""
        return 0.0

    def offline(self) -> int:
        """Nothing."""
        return 0

    def online(self) -> Callable[[], Result]:
        """The network on the images, at rank 1."""
        logits: Tensor | None = None
        if self._compute is not None:
            with torch.no_grad():
                logits = self._compute(self._x)

        def finish() -> Result:
            checked = None if logits is None else self._check(logits)
            error, agreement = checked or (None, None)
            return Result(0, 0, error, agreement)

        return finish

    def close(self) -> None:
        """Nothing."""


def plain_systems(
    network: nn.Module,
    x: Tensor,
    control: Control,
    check: Callable[[Tensor], tuple[float, float | None] | None],
    skip: Callable[[str, str], None],
) -> list[PlainSystem]:
    """A system for each form that rank 1 can have; both parties agree on them.

    Args:
        skip: at rank 0, told the engine and the reason of each that is left out.
    """
    systems = []
    for form in FORMS:
        compute, reason = None, ""
        if control.rank == 1:
            try:
                compute = in_form(form, network, x)
            except FormError as error:
                reason = str(error)
        reason = control.swap(reason) or reason
        if not reason:
            systems.append(PlainSystem(form, compute, x, check))
        elif control.rank == 0:
            skip(f"torch+{form}", reason)
    return systems
