"""The exporter merges equal parameters and leaves Identity nodes CrypTen lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import ModelProto, TensorProto

from .patch import Patch, replace, together


def _own_initializers(model: ModelProto) -> ModelProto:
    """A copy in which each parameter behind an Identity is an initializer again."""
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    initializers: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
    nodes = []
    for node in graph.node:
        source = initializers.get(node.input[0]) if node.op_type == "Identity" else None
        if source is None:
            nodes.append(node)
            continue
        copy = graph.initializer.add()
        copy.CopyFrom(source)
        copy.name = node.output[0]
        initializers[copy.name] = copy
    if len(nodes) < len(graph.node):
        kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
    return result


def _probe() -> bool:
    from crypten.nn import module, onnx_converter

    return not (
        hasattr(module, "Identity") or "Identity" in onnx_converter.ONNX_TO_CRYPTEN
    )


def _install() -> Callable[[], None]:
    from crypten.nn import module, onnx_converter

    class Identity(module.Module):
        """Hands its input on."""

        def forward(self, input: Any) -> Any:
            return input

        @staticmethod
        def from_onnx(attributes: dict[str, Any] | None = None) -> Identity:
            return Identity()

    stock = onnx_converter._to_crypten

    def to_crypten(onnx_model: ModelProto) -> Any:
        return stock(_own_initializers(onnx_model))

    def forget() -> None:
        del onnx_converter.ONNX_TO_CRYPTEN["Identity"]

    onnx_converter.ONNX_TO_CRYPTEN["Identity"] = Identity
    return together(forget, replace(onnx_converter, "_to_crypten", to_crypten))


PATCH = Patch(
    name="identity",
    broke="crypten.nn.from_pytorch: CrypTen does not support ONNX op Identity, met in "
    "any network with two equal parameters (every fresh batch-norm)",
    seen_on="torch 2.13.0 with crypten 0.4.1",
    delete_when="CrypTen converts Identity and keeps a parameter of its own per name",
    probe=_probe,
    install=_install,
)
