"""Max pools made average pools: what `replace_pooling` does."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..errors import ConversionError
from .operation import Operation
from .spellings import SPELLINGS

_Extent = int | tuple[int, int]


class PoolSurgeon(Operation):
    """Puts average pooling where there was max pooling."""

    def sought(self) -> set[str]:
        return {"max_pool2d", "adaptive_max_pool2d"}

    def swap_module(self, name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.AdaptiveMaxPool2d):
            _check_indices(name, module.return_indices)
            return nn.AdaptiveAvgPool2d(module.output_size)
        if isinstance(module, nn.MaxPool2d):
            _check_indices(name, module.return_indices)
            return _average_pool(
                name,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                module.ceil_mode,
            )
        return None

    def swap_call(self, name: str, node: fx.Node) -> nn.Module | None:
        if node.target in SPELLINGS[nn.AdaptiveMaxPool2d]:
            fields = _arguments(node, ("input", "output_size", "return_indices"))
            _check_indices(name, fields.get("return_indices", False))
            return nn.AdaptiveAvgPool2d(fields["output_size"])
        if node.target in SPELLINGS[nn.MaxPool2d]:
            fields = _arguments(
                node,
                (
                    "input",
                    "kernel_size",
                    "stride",
                    "padding",
                    "dilation",
                    "ceil_mode",
                    "return_indices",
                ),
            )
            _check_indices(name, fields.get("return_indices", False))
            return _average_pool(
                name,
                fields["kernel_size"],
                fields.get("stride"),
                fields.get("padding", 0),
                fields.get("dilation", 1),
                fields.get("ceil_mode", False),
            )
        return None


def _check_indices(name: str, return_indices: object) -> None:
    if return_indices:
        raise ConversionError(
            f"{name}: a max pool that returns indices has no average twin; "
            "rebuild the layer without return_indices"
        )


def _average_pool(
    name: str,
    kernel: _Extent,
    stride: _Extent | None,
    padding: _Extent,
    dilation: object,
    ceil: bool,
) -> nn.AvgPool2d:
    if dilation not in (1, (1, 1), [1, 1]):
        raise ConversionError(
            f"{name}: a max pool with dilation={dilation} has no average twin; "
            "rebuild the layer with dilation=1"
        )
    return nn.AvgPool2d(
        kernel, stride=stride or kernel, padding=padding, ceil_mode=ceil
    )


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    computed = [k for k in names[1:] if isinstance(given.get(k), fx.Node)]
    if computed:
        raise ConversionError(
            f"{node.name}: {', '.join(computed)} of the pool is computed at run time; "
            "an average pool needs constants"
        )
    return {key: value for key, value in given.items() if value is not None}
