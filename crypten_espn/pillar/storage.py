"""Networks as files: tensors with the architecture and the polynomials, no pickle.

A network's file is a safetensors file: its tensors, and as metadata (JSON) its
architecture, its polynomials, the normalisation and the guard of its inputs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError, EspnError
from .data import Normalization
from .description import FORMAT, Description
from .guard import attach_guard, guard_of
from .networks import Architecture, Network
from .surgery import activations, replace_activations

_DATA = Path(__file__).parents[1] / "data"
# Each bundled network's name and its file in _DATA.
BUNDLED = {
    "fashion-resnet": "fashion_resnet_poly.safetensors",
    "fashion-resnet-relu": "fashion_resnet_relu.safetensors",
    "fashion-resnet-finetuned": "fashion_resnet_finetuned.safetensors",
    "fashion-minionn": "fashion_minionn_poly.safetensors",
    "fashion-resnet32": "fashion_resnet32_poly.safetensors",
}


def bundled(name: str) -> Network:
    """Return the bundled network of that name, in evaluation mode.

    All are trained on Fashion-MNIST, inputs (n, 1, 28, 28) normalised by the network's
    `normalization`; `crypten_espn.pillar.data.fashion_sample` has images.

    Args:
        name: "fashion-resnet", "fashion-resnet-finetuned", "fashion-minionn" and
            "fashion-resnet32" have polynomials, "fashion-resnet-relu" ReLU.

    Raises:
        CheckpointError: no network of that name is bundled.
    """
    if name not in BUNDLED:
        raise CheckpointError(
            f"no network {name!r} is bundled; choose one of {', '.join(BUNDLED)}, or "
            "read a file with load_network"
        )
    return load_network(_DATA / BUNDLED[name])


def network_file(name_or_path: str | Path) -> Path:
    """Return a bundled network's file for its name, any other path as it is.

    A file that is there comes before a bundled network of the same name.
    """
    path = Path(name_or_path)
    known = BUNDLED.get(str(path))
    return path if known is None or path.is_file() else _DATA / known


def save_network(
    model: nn.Module,
    path: str | Path,
    *,
    normalization: Normalization | None = None,
    notes: dict[str, object] | None = None,
) -> None:
    """Write a network of `networks.NETWORKS` with its polynomials to one file.

    Args:
        model: the network; ReLU or polynomial activations, and the guard it carries.
        path: where to write; an existing file is replaced in one step.
        normalization: of the images it was trained on.
        notes: plain values stored with it: recipe, accuracy, selection rule.

    Raises:
        CheckpointError: the model was not built by networks.py, holds a value that is
            not finite, or carries a guard of other channels.
    """
    architecture = getattr(model, "architecture", None)
    if not isinstance(architecture, Architecture):
        raise CheckpointError(
            f"a {type(model).__name__} cannot be saved: only networks built by "
            "crypten_espn.pillar.networks know how to be built again; keep the "
            "state_dict of your own network, and Polynomial.to_json"
        )
    guard = guard_of(model)
    if guard is not None and guard.channels != architecture.in_channels:
        raise CheckpointError(
            f"the network carries a guard of {guard.channels} channels and takes "
            f"{architecture.in_channels}; attach the one of its own inputs"
        )
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} holds values that are not finite; train again with a larger "
                "beta or a lower learning rate"
            )
        tensors[name] = tensor.detach().cpu().contiguous()
    description = Description(
        architecture,
        {name: module.polynomial for name, module in activations(model).items()},
        normalization,
        notes or {},
        guard,
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".part")
    save_file(tensors, temporary, metadata=description.to_metadata())
    os.replace(temporary, target)


def load_network(path: str | Path) -> Network:
    """Return the network of a file, polynomials in place, in evaluation mode.

    The network has attributes `architecture`, `normalization` (a Normalization or
    None) and `notes` (what was stored with it), and carries its guard (`guard_of`).

    Raises:
        CheckpointError: no such file, not one of ours, damaged, of another network, or
            with values that are not finite.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            network, description = _empty(metadata, path)
            # Sizes are known from here on; only now is anything of them allocated.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} cannot be read as a network (no such file); save_network writes "
            f"one, and bundled by name are {', '.join(BUNDLED)}"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a network ({error}); save_network writes one"
        ) from error
    expected = network.state_dict()
    differing = _differing(tensors, expected)
    if differing:
        raise CheckpointError(
            f"{path} does not hold the tensors of {network.architecture}: {differing}"
        )
    _check_values(tensors, expected, path)
    network.to_empty(device="cpu")
    network.load_state_dict(tensors)
    network.normalization = description.normalization
    network.notes = description.notes
    attach_guard(network, description.guard)
    return network.eval()


def _empty(
    metadata: Mapping[str, str], path: str | Path
) -> tuple[Network, Description]:
    """The network of a description, with shapes and no memory for its tensors."""
    form = metadata.get("format", "")
    if form != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file without a network's description"
            f"{f' (its format is {form[:80]!r})' if form else ''}; save_network "
            "writes one"
        )
    try:
        description = Description.from_metadata(metadata)
        with torch.device("meta"):
            network = description.architecture.build()
        description.check_names(network)
        if description.polynomials:
            replace_activations(
                network, {name: p for name, p in description.polynomials.items()}
            )
            # A polynomial a channel says of how many: without memory, this asks all.
            network.eval()(torch.empty(1, *network.input_shape, device="meta"))
    except EspnError as error:
        raise CheckpointError(f"{path}: {error}; save the network again") from error
    return network, description


def _differing(
    given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> str:
    """Which tensors of a file are not a network's, in words; empty if none."""

    def shown(tensors: Mapping[str, torch.Tensor], name: str, otherwise: str) -> str:
        tensor = tensors.get(name)
        if tensor is None:
            return otherwise
        kind = "" if tensor.is_floating_point() else f" of {tensor.dtype}"
        return f"{tuple(tensor.shape)}{kind}"

    found = [
        f"{name[:80]} is {here}, not {there}"
        for name in sorted(given.keys() | expected.keys())
        for here in [shown(given, name, "missing")]
        for there in [shown(expected, name, "expected")]
        if here != there
    ]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def _check_values(
    given: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    path: str | Path,
) -> None:
    """Refuse tensors that are not finite as a network holds them.

    Raises:
        CheckpointError: it names the tensor.
    """
    for name, tensor in given.items():
        values = tensor.to(expected[name].dtype)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"{path}: {name} holds values that are not finite; train again"
            )
        if name.endswith("running_var") and bool((values < 0).any()):
            raise CheckpointError(
                f"{path}: {name} holds a negative variance; train again"
            )


def load_weights(network: Network, path: str | Path) -> None:
    """Load a state_dict of tensors, such as torchvision's, into a network.

    Args:
        network: what to load into, in place.
        path: a .safetensors file, or a .pt or .pth file of nothing but tensors.

    Raises:
        CheckpointError: no such file, not a state_dict, or of another network or
            number of classes; the message names the tensors that differ.
    """
    try:
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        given = {str(name): tensor.detach() for name, tensor in state.items()}
    except Exception as error:  # torch.load raises many kinds
        raise CheckpointError(
            f"{path} cannot be read as a state_dict of tensors ({error})"
        ) from error
    expected = {
        name: tensor
        for name, tensor in network.state_dict().items()
        # Inference does not use the counters of batches, and older files lack them.
        if name in given or not name.endswith("num_batches_tracked")
    }
    differing = _differing(given, expected)
    if differing:
        raise CheckpointError(
            f"{path} does not fit {network.architecture}: {differing}. Take the "
            "weights of the same network with the same number of classes"
        )
    _check_values(given, expected, path)
    network.load_state_dict(given, strict=False)


def describes_itself(path: str | Path) -> bool:
    """Return whether a file is one of `save_network`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return "architecture" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
