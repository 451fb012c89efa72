"""Correlated randomness for the protocols, from CrypTen's providers TFP and TTP.

Three correlations, each of fresh uniform ring elements and used once:

    one_sided_products   party 0: A, C_0; party 1: B, C_1; C_0 + C_1 = sum_j A_j B_j
    powers               [r], [r^2], ..., [r^n]
    rescaling            [r], [-(r >> s) logical], [-(r >> s) arithmetic]

They are methods of CrypTen's providers, found through
`crypten.mpc.get_default_provider()`, and traceable: `provider.trace()` and
`provider.fill_cache()` move them into an offline phase. Under TTP the dealer sends one
correction to rank 0 for each element that seeds cannot give; under TFP rank 0 plays the
dealer and so knows every mask: for tests and benchmarks only.
"""

from __future__ import annotations

import logging

import crypten
import crypten.communicator as comm
import torch
from crypten.common import rng
from crypten.mpc import provider as crypten_provider
from crypten.mpc.primitives import ArithmeticSharedTensor
from crypten.mpc.provider.provider import TupleProvider
from crypten.mpc.provider.tfp_provider import TrustedFirstParty
from crypten.mpc.provider.ttp_provider import TrustedThirdParty, TTPClient, TTPServer

from .errors import RandomnessError

_log = logging.getLogger(__name__)

# What CrypTen's triples multiply with; the dealer calls torch's function of that name.
_PRODUCTS = frozenset(
    (
        "mul",
        "matmul",
        "conv1d",
        "conv2d",
        "conv_transpose1d",
        "conv_transpose2d",
    )
)


def one_sided_products(
    size: torch.Size, terms: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks for sum_j u_j v_j, u known to party 0 and v to party 1.

    Args:
        size: shape of each element-wise product.
        terms: number of products that are summed.

    Returns:
        (mask, product): at party 0 A and C_0, at party 1 B and C_1; int64 of shapes
        (terms, *size) and size.

    Cost: 1 correction of 8 bytes for each element of size; no online communication.
    """
    pair: tuple[torch.Tensor, torch.Tensor]
    pair = _provider().one_sided_products(torch.Size(size), terms)
    return pair


def powers(size: torch.Size, degree: int) -> torch.Tensor:
    """This party's shares of r, r^2, ..., r^degree, for degree >= 2.

    Returns:
        int64 of shape (degree, *size).

    Cost: degree - 1 corrections for each element of size.

    Raises:
        RandomnessError: a degree below 2, for which nothing is correlated; a dealer
            that is not asked would fall out of step with the parties.
    """
    if degree < 2:
        raise RandomnessError(
            f"powers up to degree {degree}: at least 2 is needed; a linear polynomial "
            "takes no randomness"
        )
    stack: torch.Tensor = _provider().powers(torch.Size(size), degree)
    return stack


def rescaling(size: torch.Size, shift: int, *, ring_bits: int = 64) -> torch.Tensor:
    """This party's shares of r and of minus r shifted right, both ways.

    Args:
        size: shape of each.
        shift: bits to drop.
        ring_bits: m, up to 64; the shifts are those of the low m bits of r.

    Returns:
        int64 of shape (3, *size): [r], [-(r >> shift) logical], [... arithmetic].

    Cost: 2 corrections for each element of size.
    """
    stack: torch.Tensor = _provider().rescaling(torch.Size(size), shift, ring_bits)
    return stack


def logical_shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right and fill with zeros, 0 <= bits < 64 (torch's >> keeps the sign)."""
    return (value >> bits) & (2 ** (64 - bits) - 1) if bits else value.clone()


def _provider() -> TupleProvider:
    provider = crypten.mpc.get_default_provider()
    if not hasattr(provider, "one_sided_products"):
        raise RandomnessError(
            f"provider {crypten.cfg.mpc.provider!r} prepares no randomness for these "
            "protocols; set crypten.cfg.mpc.provider to 'TTP' (a dealer) or 'TFP' (for "
            "tests)"
        )
    return provider


def _power_stack(r: torch.Tensor, degree: int) -> torch.Tensor:
    stack = [r]
    for _ in range(degree - 1):
        stack.append(stack[-1] * r)
    return torch.stack(stack)


def _rescaling_stack(r: torch.Tensor, shift: int, ring_bits: int) -> torch.Tensor:
    unused = 64 - ring_bits
    logical = logical_shift(r << unused, unused + shift)
    arithmetic = (r << unused) >> (unused + shift)
    return torch.stack([r, -logical, -arithmetic])


def _shared(value: torch.Tensor) -> torch.Tensor:
    """This party's share of what rank 0 gives."""
    share: torch.Tensor = ArithmeticSharedTensor(value, precision=0, src=0).share
    return share


# Rank 0 plays the dealer: it can undo the sharing of zero, so it knows party 1's part.


def _tfp_products(
    self: TrustedFirstParty, size: torch.Size, terms: int
) -> tuple[torch.Tensor, torch.Tensor]:
    zero = ArithmeticSharedTensor.PRZS((terms, *size)).share
    if comm.get().get_rank() == 0:
        mask = rng.generate_random_ring_element((terms, *size))
        product = (mask * -zero).sum(0)
    else:
        mask, product = zero, torch.zeros(size, dtype=torch.long)
    return mask, _shared(product)


def _tfp_powers(self: TrustedFirstParty, size: torch.Size, degree: int) -> torch.Tensor:
    r = rng.generate_random_ring_element(size)
    return _shared(_power_stack(r, degree))


def _tfp_rescaling(
    self: TrustedFirstParty, size: torch.Size, shift: int, ring_bits: int
) -> torch.Tensor:
    r = rng.generate_random_ring_element(size)
    stack = _rescaling_stack(r, shift, ring_bits)
    return _shared(stack)


# Parties expand their own seeds; rank 0 asks the dealer for the corrections.


def _ttp_products(
    self: TrustedThirdParty, size: torch.Size, terms: int
) -> tuple[torch.Tensor, torch.Tensor]:
    client = TTPClient.get()
    generator = client.get_generator()
    mask = rng.generate_random_ring_element((terms, *size), generator=generator)
    if comm.get().get_rank() == 0:
        product = client.ttp_request("one_sided_products", None, tuple(size), terms)
    else:
        product = rng.generate_random_ring_element(size, generator=generator)
    return mask, product


def _ttp_corrected(
    function: str, size: torch.Size, parameters: tuple[int, ...], corrections: int
) -> torch.Tensor:
    client = TTPClient.get()
    generator = client.get_generator()
    first = rng.generate_random_ring_element((1, *size), generator=generator)
    if comm.get().get_rank() == 0:
        rest = client.ttp_request(function, None, tuple(size), *parameters)
    else:
        rest = rng.generate_random_ring_element(
            (corrections, *size), generator=generator
        )
    return torch.cat([first, rest])


def _ttp_powers(self: TrustedThirdParty, size: torch.Size, degree: int) -> torch.Tensor:
    return _ttp_corrected("powers", size, (degree,), degree - 1)


def _ttp_rescaling(
    self: TrustedThirdParty, size: torch.Size, shift: int, ring_bits: int
) -> torch.Tensor:
    return _ttp_corrected("rescaling", size, (shift, ring_bits), 2)


class Dealer(TTPServer):
    """CrypTen's trusted third party, extended by the three correlations.

    Rank 0 names what it wants. Only `requests` are served; anything else is answered by
    a refusal, which rank 0 raises as RandomnessError, and the dealer serves on. After
    an error inside a request its streams are out of step with the parties', so from
    then on it refuses everything: wrong randomness would give wrong results.
    """

    #: Names of the methods that rank 0 may ask for; subclasses add theirs.
    requests: frozenset[str] = frozenset(
        (
            "additive",
            "square",
            "binary",
            "wraps",
            "B2A",
            "one_sided_products",
            "powers",
            "rescaling",
        )
    )

    def __init__(self) -> None:
        crypten.init()
        self.ttp_group = comm.get().ttp_group
        self.comm_group = comm.get().ttp_comm_group
        self.device = "cpu"
        self._failure = ""
        self._setup_generators()
        self._serve()

    def _serve(self) -> None:
        """Answer rank 0 until it leaves."""
        party = comm.get()
        try:
            while (message := self._received()) != "terminate":
                try:
                    answer = self.answer(message)
                except RandomnessError as error:
                    _log.warning("refused a request: %s", error)
                    party.send_obj(str(error), 0, self.ttp_group)
                    continue
                party.send_obj(answer.size(), 0, self.ttp_group)
                party.broadcast(answer, party.get_ttp_rank(), self.comm_group)
        except RuntimeError as error:  # what gloo raises for a lost connection
            _log.info("the parties are gone: %s", error)

    def _received(self) -> object:
        try:
            return comm.get().recv_obj(0, self.ttp_group)
        except RuntimeError:
            raise
        except Exception as error:
            return error  # no message; `answer` refuses it

    def answer(self, message: object) -> torch.Tensor:
        """What rank 0 gets for one message.

        Args:
            message: as `TTPClient.ttp_request` makes it.

        Raises:
            RandomnessError: it is no request, names something that is not dealt, or
                failed; or one before it did.
        """
        if self._failure:
            raise RandomnessError(
                f"the dealer is out of step with the parties since an earlier request "
                f"failed ({self._failure}): start all parties again"
            )
        keys: dict[str, type | tuple[type, ...]] = {
            "function": str, "device": (str, type(None)), "args": tuple, "kwargs": dict,
        }  # fmt: skip
        if not (
            isinstance(message, dict)
            and message.keys() == keys.keys()
            and all(isinstance(message[key], kind) for key, kind in keys.items())
        ):
            raise RandomnessError(
                "what came is no request: a dictionary of function, device, args and "
                "kwargs is needed"
            )
        name = message["function"]
        if name not in self.requests:
            raise RandomnessError(
                f"{name!r} was asked of the dealer, which deals "
                f"{', '.join(sorted(self.requests))}"
            )
        self.device = message["device"]
        try:
            dealt: torch.Tensor
            dealt = getattr(self, name)(*message["args"], **message["kwargs"])
            return dealt
        except Exception as error:
            self._failure = f"{name}: {type(error).__name__}: {error}"
            _log.exception("a request failed")
            raise RandomnessError(f"the dealer failed at {self._failure}") from error

    def additive(
        self,
        size0: tuple[int, ...],
        size1: tuple[int, ...],
        op: str,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        """CrypTen's triples, for its products only: op names a function of torch."""
        if op not in _PRODUCTS:
            raise RandomnessError(
                f"triples of {op!r} were asked for; there are those of "
                f"{', '.join(sorted(_PRODUCTS))}"
            )
        triple: torch.Tensor = super().additive(size0, size1, op, *args, **kwargs)
        return triple

    def one_sided_products(self, size: tuple[int, ...], terms: int) -> torch.Tensor:
        a, b = (
            rng.generate_random_ring_element((terms, *size), generator=g)
            for g in self._get_generators(device="cpu")
        )
        products: torch.Tensor = (a * b).sum(0)
        return products - self._others(size)

    def powers(self, size: tuple[int, ...], degree: int) -> torch.Tensor:
        stack = _power_stack(self._get_additive_PRSS((1, *size))[0], degree)[1:]
        return stack - self._others(stack.size())

    def rescaling(
        self, size: tuple[int, ...], shift: int, ring_bits: int
    ) -> torch.Tensor:
        r = self._get_additive_PRSS((1, *size))[0]
        stack = _rescaling_stack(r, shift, ring_bits)[1:]
        return stack - self._others(stack.size())

    def _others(self, size: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """The sum of the shares that every party but rank 0 expands from its seed."""
        generators = self._get_generators(device="cpu")[1:]
        total = torch.zeros(size, dtype=torch.long)
        for generator in generators:
            total += rng.generate_random_ring_element(size, generator=generator)
        return total


def _ttp_request(
    self: TTPClient,
    func_name: str,
    device: torch.device | str | None,
    *args: object,
    **kwargs: object,
) -> torch.Tensor:
    """CrypTen's `TTPClient.ttp_request`, which also hears a refusal.

    Raises:
        RandomnessError: the dealer refused; its words are the message.
    """
    party = comm.get()
    if party.get_rank() != 0:
        raise RandomnessError(
            f"rank {party.get_rank()} asked the dealer; only rank 0 may"
        )
    dealer = party.get_ttp_rank()
    message = {
        "function": func_name,
        "device": None if device is None else str(device),
        "args": args,
        "kwargs": kwargs,
    }
    party.send_obj(message, dealer, self.ttp_group)
    size = party.recv_obj(dealer, self.ttp_group)
    if isinstance(size, str):
        raise RandomnessError(size)
    result = torch.empty(size, dtype=torch.long, device=device)
    party.broadcast(result, dealer, self.comm_group)
    return result


def _register() -> None:
    for kind, functions in {
        TrustedFirstParty: (_tfp_products, _tfp_powers, _tfp_rescaling),
        TrustedThirdParty: (_ttp_products, _ttp_powers, _ttp_rescaling),
    }.items():
        names = ("one_sided_products", "powers", "rescaling")
        for name, function in zip(names, functions, strict=True):
            setattr(kind, name, function)
            if name not in TupleProvider.TRACEABLE_FUNCTIONS:
                TupleProvider.TRACEABLE_FUNCTIONS.append(name)
    crypten_provider.TTPServer = Dealer
    TTPClient._TTPClient__TTPClient.ttp_request = _ttp_request


_register()
