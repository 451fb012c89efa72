"""From a torch module or an ONNX file to a CrypTen graph: `check` and `convert`."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import crypten
import crypten.communicator as comm
import numpy as np
import torch
from crypten.mpc import MPCTensor
from crypten.nn import module as crypten_nn

from .bundle import Bundle, Description, Preprocessing
from .compare import first_difference, in_evaluation, probes
from .engines import CrypTen, Engine, Masked, chosen_engine
from .errors import (
    ConversionError,
    DataError,
    EspnError,
    ProtocolError,
    WorldSizeError,
)
from .findings import NOT_YET, Finding, Report, report
from .graph import NetworkGraph, read, simplify
from .inputs import check_batch, number_tensor, real_tensor
from .layers import kind_of
from .masked.in_crypten import ComposedEngine
from .masked.model import MaskedModel
from .masked.planning import masked_model
from .masked.planning.checking import check_plan
from .masked.planning.tails import tails
from .nn import PolynomialActivation
from .pillar.guard import InputGuard, guard_of
from .pillar.guarding import check_channels, guarded_batch
from .protocols import settings
from .protocols.noise import with_noise

Source = torch.nn.Module | str | Path | bytes


class PrivateNetwork(crypten_nn.Graph):
    """A converted network: a crypten.nn.Graph that checks before it computes.

    Attributes:
        changes: what the conversion did, in words.
        input_shape: shape of one input, without the batch.
        example: the inputs it was converted with; they calibrate the masked engine.
        layers: what each node computes, by name, in the order of computation.
        guard: what the owner of an input checks before sharing it; None if nothing.
        engine: which computes it; None follows crypten.cfg.espn between CrypTen
            tensors, and is the masked engine in sessions.
        models: what the masked engine made of it, by precision and headroom.
    """

    encrypted: bool

    def __init__(
        self,
        graph: NetworkGraph,
        *,
        example: torch.Tensor,
        engine: Engine | None,
        guard: InputGuard | None = None,
    ) -> None:
        super().__init__([graph.input], [graph.output])
        self.changes = tuple(graph.changes)
        self.input_shape = graph.shapes[graph.input][1:]
        self.guard = None
        if guard is not None:
            self.guard = check_channels(guard, self.input_shape)
        self.example = example.detach().clone()
        self.engine = engine
        self.models: dict[tuple[str | int, float], MaskedModel] = {}
        self._composed: ComposedEngine | None = None
        chosen = engine if isinstance(engine, CrypTen) else CrypTen()
        for name, array in graph.constants.items():
            tensor = torch.from_numpy(np.array(array, dtype=np.float32))
            self.add_module(name, crypten_nn.Parameter(tensor), [])
        self.layers = {node.output: kind_of(node) for node in graph.nodes}
        for node in graph.nodes:
            module = self.layers[node.output].module()
            if isinstance(module, PolynomialActivation):
                module.protocol = chosen.protocol
                module.truncation = chosen.truncation
            self.add_module(node.output, module, list(node.inputs))
        self.eval()

    def encrypt(self, mode: bool = True, src: int = 0) -> PrivateNetwork:
        """Share the weights, or with protocol "masked" hide them behind masks.

        The masked engine keeps rank 0's weights where they are and opens them under a
        mask; rank 1's copy of them is not used. For CrypTen's protocols weights are
        rounded first, see `nearest`.

        Args:
            mode: False undoes it.
            src: the owner of the weights; 0 for the masked engine.

        Raises:
            ProtocolError: another owner with protocol "masked".
            PlanError: the network has no plan; the layer is named.
            WorldSizeError: the masked engine needs two parties.
        """
        if not isinstance(self.engine, Masked):
            if mode and not self.encrypted:
                frac_bits = crypten.cfg.encoder.precision_bits
                for module in self._modules.values():
                    if isinstance(module, crypten_nn.Parameter):
                        rounded = nearest(module.data, frac_bits=frac_bits)
                        module.set_parameter("data", rounded)
            super().encrypt(mode=mode, src=src)
            return self
        if src != 0:
            raise ProtocolError(
                f"src={src}: with protocol 'masked' rank 0 owns the weights; start the "
                "owner as rank 0"
            )
        self._composed = None
        if mode:
            if not comm.is_initialized():
                raise WorldSizeError(
                    "encrypt() needs two running parties: call crypten.init() in each, "
                    "or start them with run_multiprocess"
                )
            plan = weights = None
            if comm.get().get_rank() == 0:
                model = masked_model(self)
                plan, weights = model.plan, model.weights
            self._composed = ComposedEngine(plan, weights)
        self.encrypted = mode
        return self

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        images: Preprocessing | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        """Write a bundle: one file, from which this network can be served.

        It holds the plan of the masked engine and the weights as its integers, readable
        by its owner alone. Calibrate by real inputs at the conversion.

        Args:
            path: the file; an existing one is replaced in one step.
            images: how clients turn image files into inputs, as in training; None if
                inputs are no images.
            classes: the logits' names in their order; none if empty.

        Raises:
            PlanError: the network has no plan; the layer is named.
            DataError, ShapeError: what is said of images or classes does not belong to
                the network.
            CheckpointError: the file cannot be written.
        """
        if isinstance(classes, str):
            raise DataError(
                f"classes={classes[:80]!r} is one text; give a list of names"
            )
        description = Description(images, tuple(classes))
        Bundle(masked_model(self), description).save(path)

    def prepare(self, count: int, *, batch: int) -> None:
        """The masked engine's offline phase for `count` calls with `batch` inputs.

        Raises:
            ProtocolError: not converted with protocol "masked", or not encrypted.
        """
        if self._composed is None:
            raise ProtocolError(
                "prepare() belongs to a network converted with protocol='masked' and "
                "encrypted; for others trace CrypTen's provider and fill its cache"
            )
        self._composed.prepare(count, batch=batch)

    def checked(self, x: object, *, force: bool = False) -> torch.Tensor:
        """A batch that its owner may share: `cryptensor(private.checked(x), src=1)`.

        Nobody can look at an input once it is shared. This asks the network's guard
        before, in the clear; sessions and `simulate` do so themselves.

        Args:
            x: (batch, *input_shape), of any kind that `inputs` takes.
            force: take what the guard refuses. The private result may then be any
                number, and nothing tells.

        Returns: float tensor (batch, *input_shape).

        Raises:
            DataError, ShapeError: it is no batch of inputs.
            RangeError: NaN or infinity, with `force` too; or the guard refuses an
                input.
        """
        return guarded_batch(x, self.input_shape, self.guard, force=force)

    def forward(
        self, x: crypten.CrypTensor | torch.Tensor
    ) -> crypten.CrypTensor | torch.Tensor:
        """Logits for a batch, encrypted once `.encrypt(src=0)` was called.

        Raises:
            ShapeError: the input is not (batch, *input_shape).
            WorldSizeError: the protocol does not run with this many parties.
            ProtocolError: plain tensors with protocol "masked".
            All before anything is sent.
        """
        check_batch(x, self.input_shape, "the input", "the network")
        if isinstance(self.engine, Masked):
            if self._composed is None:
                raise ProtocolError(
                    "a network converted with protocol='masked' takes CrypTen tensors "
                    "after .encrypt(src=0); for plain tensors use simulate()"
                )
            return self._composed(x)
        engine = self.engine or CrypTen()
        with settings(
            protocol=engine.protocol,
            truncation=engine.truncation,
            failure_bits=engine.failure_bits,
        ) as chosen:
            world_size = comm.get().get_world_size() if comm.is_initialized() else 0
            if world_size and not chosen.protocol.accepts(world_size):
                raise WorldSizeError(
                    f"{world_size} parties run a network converted for protocol "
                    f"{chosen.protocol.name!r}, which takes "
                    f"{chosen.protocol.world_sizes}; start two parties or convert with "
                    "protocol='opened_mask'"
                )
            logits = super().forward(x)
        if engine.noise_bits and isinstance(logits, MPCTensor):
            return with_noise(logits, noise_bits=engine.noise_bits)
        return logits


def nearest(values: torch.Tensor, *, frac_bits: int) -> torch.Tensor:
    """The nearest multiples of 2**-frac_bits; halves go to the even one.

    CrypTen's encoder rounds toward zero, which makes every weight a little too small.
    It keeps what this returns as it is, so that weights err to both sides and half as
    far: at 12 bits most of a network's error is that.

    Args:
        values: float tensor, any shape.
        frac_bits: fractional bits of the encoder.

    Returns:
        Tensor of the same shape and type, detached from any graph.
    """
    rounded = torch.round(values.detach() * 2.0**frac_bits) * 2.0**-frac_bits
    return rounded.requires_grad_(values.requires_grad)


def check(model: Source, example: object, *, guard: InputGuard | None = None) -> Report:
    """Name every problem of a network at once, with its cure. Nothing is changed.

    1. Trace or read the network, and simplify it.
    2. Name every layer that is refused, or slow.
    3. Run the result in the clear on the example, on another input and another batch
       size, and compare it with the network itself.
    4. Plan it for the masked engine.
    5. Corrupt the first 16 inputs of the example, fewer of large networks, in every way
       that `stress` does: what leaves an interval, what would wrap around in a ring,
       and what the guard refuses of it.

    Args:
        model: torch module, path of an .onnx file, or its bytes.
        example: one input batch, of any kind that `inputs` takes; two real inputs or
            more for the last step.
        guard: of inputs; the module's own if None.

    Raises:
        ConversionError: it cannot be traced or read at all.
        ShapeError: the example does not fit the network.
        DataError, RangeError: the example is no batch of real numbers, or not finite;
            the guard is of other channels.
    """
    example = _example(model, example)
    graph, found = _read(model, example)
    if not found.ok:
        return found
    reference = None
    if isinstance(model, torch.nn.Module):
        reference = functools.partial(in_evaluation, model)
    private = PrivateNetwork(
        graph,
        example=example,
        engine=None,
        guard=_own_guard(model) if guard is None else guard,
    )
    try:
        planned = masked_model(private)
        masked = check_plan(private, example, planned, reference=reference)
        found = replace(found, masked=masked, widened=planned.report.widened)
        if masked is not None or len(example) < 2:
            return found
        return replace(found, tails=tails(private, planned, example))
    except EspnError as error:
        return replace(found, masked=str(error))
    except Exception as error:
        why = f"no plan could be made ({type(error).__name__}: {error})"
        return replace(found, masked=why)


def convert(
    model: Source,
    example: object,
    *,
    protocol: str | None = None,
    truncation: str | None = None,
    engine: Engine | None = None,
    guard: InputGuard | None = None,
) -> PrivateNetwork:
    """Make a network private: fold, rewrite, and build its CrypTen graph.

    1. Trace the module in evaluation mode, or read the ONNX file.
    2. Fold constants and batch-norm; make pads and pool borders explicit.
    3. Refuse, naming every unsupported layer at once, or what the result computes
       differently from the network itself.
    4. Build the graph.

    Args:
        model: torch module (its own weights are not touched), .onnx path, or bytes.
        example: one input batch of any kind that `inputs` takes; fixes the input shape,
            not the batch size. With protocol "masked" it also bounds every layer: give
            real inputs.
        protocol: "espn", "opened_mask", "beaver" or "masked". When None,
            crypten.cfg.espn decides for CrypTen tensors, and sessions use the masked
            engine.
        truncation: "local" or "exact"; likewise. The masked engine is always exact.
        engine: Masked(...) or CrypTen(...), which say more than these two names.
        guard: of inputs, public, as `InputGuard.fit` makes it; the module's own if
            None, which `calibrate` fits. Sessions, `simulate` and `.checked` refuse
            what it does not let through.

    Returns:
        A PrivateNetwork in evaluation mode, ready for `.encrypt(src=0)`; `.changes`
        says what was done.

    Raises:
        ConversionError: unsupported layers, all of them listed; or a result that is
            not the network's.
        ShapeError: the example does not fit the network.
        DataError, RangeError: the example is no batch of real numbers, or not finite;
            the guard is of other channels.
        ProtocolError: an unknown protocol or truncation.
        PlanError: protocol "masked", and no plan exists; the layer is named.
    """
    chosen = chosen_engine(engine, protocol, truncation)
    example = _example(model, example)
    graph, found = _read(model, example)
    if not found.ok:
        problems = [str(finding) for finding in found.findings if finding.blocking]
        raise ConversionError(
            f"{len(problems)} layers cannot be converted:\n  " + "\n  ".join(problems)
        )
    private = PrivateNetwork(
        graph,
        example=example,
        engine=chosen,
        guard=_own_guard(model) if guard is None else guard,
    )
    if isinstance(chosen, Masked):
        masked_model(private)
    return private


def _own_guard(model: Source) -> InputGuard | None:
    return guard_of(model) if isinstance(model, torch.nn.Module) else None


def _example(source: Source, given: object) -> torch.Tensor:
    """The example as the network takes it: of the type of its parameters.

    Integers stay what they are where the network itself computes with them.
    """
    numbers = real_tensor(given, "the example", finite=True)
    exact = given.detach() if torch.is_tensor(given) else number_tensor(given)
    whole = not exact.is_floating_point()
    if not isinstance(source, torch.nn.Module):
        return exact if whole else numbers.float()
    if whole and _takes(source, exact):
        return exact
    held = (*source.parameters(), *source.buffers())
    types = [tensor.dtype for tensor in held if tensor.is_floating_point()]
    return numbers.to(types[0] if types else torch.float32)


def _takes(model: torch.nn.Module, x: torch.Tensor) -> bool:
    try:
        in_evaluation(model, x)
    except Exception:
        return False
    return True


def _compared(
    source: Source,
    raw: NetworkGraph,
    graph: NetworkGraph,
    given: Report,
    example: torch.Tensor,
) -> Report:
    """A report that also says where the rewritten graph leaves the network itself."""
    model = source if isinstance(source, torch.nn.Module) else None
    difference = first_difference(graph, raw, probes(model, raw, example))
    if difference is None:
        return given
    layer, operation, words = difference
    finding = Finding(
        layer,
        operation,
        NOT_YET,
        True,
        f"converted, it is not the network: {words}. A value that depends on the "
        "input, or on the batch size, was frozen; compute it by torch operations",
    )
    return replace(given, findings=(*given.findings, finding))


def _read(source: Source, example: torch.Tensor) -> tuple[NetworkGraph, Report]:
    """The graph in inference form and everything known against it.

    Raises:
        ConversionError: it cannot be read, or a step met what it did not foresee.
        ShapeError: the example does not fit the network.
    """
    raw = read(source, example)
    try:
        graph = raw.copy()
        simplify(graph)
        found = report(graph)
        if found.ok:
            found = _compared(source, raw, graph, found, example)
    except EspnError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ConversionError(
            "the network is damaged, or holds what conversion does not know "
            f"({cause}); an ONNX file can be checked with onnx.checker"
        ) from error
    return graph, found
