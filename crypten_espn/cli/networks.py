"""`crypten-espn check`, `estimate`, `explain` and `plan`: what a network would do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch

from ..array_file import load_array, one_input
from ..convert import check as check_network
from ..convert import convert
from ..engines import MASKED
from ..errors import EspnError
from ..estimate.engines import engine_costs
from ..estimate.engines import engines as engine_names
from ..estimate.workload import ALIASES, workload
from ..explain import compare_precisions
from ..explain import explain as explain_network
from ..inputs import check_batch
from ..masked.messages import SERVER, Party
from ..masked.model import MaskedModel
from ..masked.planning import PRECISIONS, masked_model
from ..masked.planning.tails import IMAGES
from ..pillar.guard import InputGuard
from ..pillar.networks import NETWORKS, Network
from ..pillar.storage import BUNDLED, load_network
from ..protocols import PROTOCOLS, TRUNCATIONS
from .options import (
    INPUTS,
    SEVERAL_BITS,
    Calibration,
    GuardFile,
    NetworkFile,
    Precision,
    argument,
    choice,
    input_shape,
    not_negative,
    option,
    positive,
    whole,
)

_NAMED = (
    f"one of {', '.join([*ALIASES, *NETWORKS])}; bundled: {', '.join(BUNDLED)}; or a "
    ".safetensors or .onnx file"
)
_MACS = (
    "10^9 32-bit multiply-accumulates a second of one core, 40 for Zen 4; other rates "
    "in proportion (default: all measured here)"
)
_TRUNCATION = "of espn, opened_mask and beaver"
_RECEIVER = "who receives the masked engine's corrections from the dealer"
_PROTOCOL = "what computes it (default: masked, with --precision-bits espn)"
_LOCAL = "of CrypTen's protocols (default: local)"
_STRESSED = (
    f"{INPUTS}; they bound every layer, and the first {IMAGES} are corrupted to see "
    "what leaves its interval or wraps"
)
_BOUNDING = ".npy of inputs that bound the masked engine's layers (default: the input)"


def check(
    network: NetworkFile,
    shape: Annotated[torch.Size | None, input_shape(".onnx only")] = None,
    images: Annotated[Path | None, option(_STRESSED, "FILE")] = None,
    guard: GuardFile = None,
) -> int:
    """Name every layer of a network that cannot be private, with its cure.

    examples:
      crypten-espn check model.onnx --shape 3,224,224
      crypten-espn check network.safetensors --images images.npy
      crypten-espn check fashion-resnet
    """
    if images is None:
        model = _fitting(network)
        size = model.input_shape if isinstance(model, Network) else shape
        if size is None:
            raise EspnError(
                "an .onnx file needs --shape, one input without the batch, such as "
                "--shape 3,224,224, or --images"
            )
        example = torch.zeros(1, *size)
    else:
        example = load_array(images)
        model = _fitting(network, (images, example))
    report = check_network(model, example, guard=_guard(guard))
    print(report)
    return 0 if report.ok else 1


def estimate(
    network: Annotated[str, argument(_NAMED, "NETWORK")],
    shape: Annotated[torch.Size | None, input_shape("default: the network's")] = None,
    classes: Annotated[int | None, whole("of a network given by name")] = None,
    degree: Annotated[int, whole("of the polynomials in place of ReLU")] = 4,
    batch: Annotated[int, whole("images in one inference")] = 1,
    rtt: Annotated[float, not_negative("round trip of a client's path, ms")] = 100,
    bandwidth: Annotated[float, positive("its rate each way, Mbit/s")] = 100,
    macs: Annotated[float | None, positive(_MACS)] = None,
    clients: Annotated[int, whole("clients of one server")] = 100,
    server_cores: Annotated[int, whole("its cores")] = 16,
    server_bandwidth: Annotated[float, positive("its line, Mbit/s each way")] = 10_000,
    dealer_cores: Annotated[int, whole("the dealer's cores")] = 16,
    dealer_bandwidth: Annotated[float, positive("its line, Mbit/s each way")] = 10_000,
    core_hour: Annotated[float, not_negative("price of a core for an hour")] = 0.05,
    gigabyte_egress: Annotated[float, not_negative("price of a gigabyte sent")] = 0.05,
    gigabyte_month: Annotated[float, not_negative("price of a gigabyte stored")] = 0.02,
    storage_days: Annotated[float, not_negative("days that material lies ready")] = 1,
    engines: Annotated[
        list[str] | None, choice("default: all", *engine_names(), several=True)
    ] = None,
    precision: Precision = "fast",
    truncation: Annotated[str, choice(_TRUNCATION, *TRUNCATIONS)] = "local",
    corrections: Annotated[Party, choice(_RECEIVER, "server", "client")] = SERVER,
    json: Annotated[Path | None, option("write the rows", "FILE")] = None,
) -> int:
    """Project what private inference costs: rounds, bytes, seconds, capacity, money.

    examples:
      crypten-espn estimate resnet18 --rtt 20 --bandwidth 1000
      crypten-espn estimate resnet50 --shape 3,224,224 --classes 1000 --macs 40
      crypten-espn estimate model.onnx --shape 3,224,224 --clients 1000
    """
    from ..estimate.deployment import Deployment
    from ..estimate.processor import REFERENCE, calibrate
    from ..estimate.report import Projection

    work = workload(
        network, input_shape=shape, classes=classes, degree=degree, precision=precision
    )
    deployment = Deployment(
        rtt_s=rtt / 1e3,
        bits_per_second=1e6 * bandwidth,
        clients=clients,
        server_cores=server_cores,
        dealer_cores=dealer_cores,
        server_bits=1e6 * server_bandwidth,
        dealer_bits=1e6 * dealer_bandwidth,
        core_hour=core_hour,
        gigabyte_egress=gigabyte_egress,
        gigabyte_month=gigabyte_month,
        storage_days=storage_days,
    )
    costs = [
        cost
        for cost in engine_costs(
            work, batch=batch, truncation=truncation, corrections=corrections
        )
        if engines is None or cost.engine in engines
    ]
    processor = calibrate() if macs is None else REFERENCE.scaled(1e9 * macs)
    found = Projection(work, costs, processor, deployment, measured=macs is None)
    print(found)
    if json is not None:
        try:
            json.write_text(found.to_json())
        except OSError as error:
            raise EspnError(
                f"--json {json} cannot be written ({error.strerror}); name a "
                "file in a folder that exists"
            ) from None
    return 0


# Annotations are evaluated whenever the commands are built: a protocol that is added to
# the table is a choice, here and above.
def explain(
    network: NetworkFile,
    input: Annotated[Path, option(INPUTS, "FILE")],
    protocol: Annotated[str | None, choice(_PROTOCOL, MASKED, *PROTOCOLS)] = None,
    truncation: Annotated[str | None, choice(_LOCAL, *TRUNCATIONS)] = None,
    precision_bits: Annotated[list[int] | None, SEVERAL_BITS] = None,
    precision: Annotated[
        list[str] | None,
        choice("of the masked engine; several compare", *PRECISIONS, several=True),
    ] = None,
    calibration: Annotated[Path | None, option(_BOUNDING, "FILE")] = None,
) -> int:
    """Say why a private result differs: every layer's error, headroom and overflow.

    examples:
      crypten-espn explain network.safetensors --input images.npy
      crypten-espn explain network.safetensors --input images.npy \\
        --protocol espn --precision-bits 12
      crypten-espn explain network.safetensors --input images.npy \\
        --protocol espn --precision-bits 8 12 16 20 24
    """
    inputs = load_array(input)
    chosen = protocol or ("espn" if precision_bits else MASKED)
    wrong = precision_bits if chosen == MASKED else precision or calibration
    if wrong is not None:
        raise EspnError(
            "--precision-bits and --truncation belong to CrypTen's protocols, "
            f"--precision and --calibration to the masked engine; {chosen} was chosen"
        )
    example = inputs if calibration is None else calibration_inputs(calibration)
    model = _fitting(network, (input, inputs), (calibration or input, example))
    private = convert(model, example, protocol=chosen, truncation=truncation)
    ways, bits = precision or [], precision_bits or []
    if len(ways) > 1 or len(bits) > 1:
        print(compare_precisions(private, inputs, precision=ways, precision_bits=bits))
        return 0
    found = explain_network(
        private,
        inputs,
        precision=ways[0] if ways else "fast",
        precision_bits=bits[0] if bits else None,
    )
    print(found)
    return 0 if found.overflow is None else 1


def plan(
    network: NetworkFile,
    calibration: Calibration,
    precision: Precision = "fast",
    guard: GuardFile = None,
) -> int:
    """Print the masked engine's plan of a network: rings, scales, bytes, error.

    examples:
      crypten-espn plan network.safetensors --calibration images.npy
      crypten-espn plan network.onnx --calibration images.npy --precision high
    """
    model = planned(network, calibration, precision, guard)
    print(model)
    print(f"digest {model.plan.digest.hex()}")
    return 0


def planned(
    network: Path, calibration: Path, precision: str, guard: Path | None = None
) -> MaskedModel:
    """Read a network and plan it on the inputs in a file, with a guard in another.

    Raises:
        EspnError: a file cannot be read, does not fit the other, or has no plan.
    """
    return planned_on(
        network, (calibration, calibration_inputs(calibration)), precision, guard
    )


def planned_on(
    network: Path,
    calibration: tuple[Path, torch.Tensor],
    precision: str,
    guard: Path | None = None,
) -> MaskedModel:
    """Read a network and plan it on inputs that were read from a file or a folder.

    With the guard in a file, or the network's own.

    Raises:
        EspnError: the network cannot be read, does not take the inputs, or has no plan.
    """
    inputs = calibration[1]
    model = _fitting(network, calibration)
    private = convert(model, inputs[:1], guard=_guard(guard))
    return masked_model(private, inputs, precision=precision)


def _guard(path: Path | None) -> InputGuard | None:
    """The guard in a file.

    Raises:
        EspnError: it cannot be read, or holds none.
    """
    if path is None:
        return None
    try:
        return InputGuard.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EspnError(
            f"{path} cannot be read as a guard ({error}); InputGuard.to_json writes one"
        ) from None


def _fitting(network: Path, *inputs: tuple[Path, torch.Tensor]) -> Path | Network:
    """An .onnx file itself, or the network in another; each file's inputs fit it."""
    if network.suffix == ".onnx":
        return network
    model = load_network(network)
    for path, given in inputs:
        check_batch(given, model.input_shape, str(path), str(network))
    return model


def calibration_inputs(path: Path) -> torch.Tensor:
    """The inputs of a file; a note where they are too few to bound anything.

    Raises:
        EspnError: as `load_array`.
    """
    inputs = load_array(path)
    note = one_input(inputs)
    if note is not None:
        print(f"crypten-espn: note: {path}: {note}", file=sys.stderr)
    return inputs
