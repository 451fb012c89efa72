"""Both parties and the dealer of the masked engine in one process; small networks."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import torch

import crypten_espn as espn
from crypten_espn.masked import kernels
from crypten_espn.masked.dealing import Dealing, coins
from crypten_espn.masked.drivers import together
from crypten_espn.masked.evaluation import chunks
from crypten_espn.masked.inference import client, server
from crypten_espn.masked.material import Draws, Pairing, inference_seeds
from crypten_espn.masked.messages import SERVER, Party
from crypten_espn.masked.model import MaskedModel
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.preparing import ClientPreparation, ServerPreparation
from crypten_espn.masked.reference import Rounding
from crypten_espn.masked.steps import Product
from crypten_espn.polynomial import ChannelPolynomials
from crypten_espn.randomness import Keystream

GATE = espn.Polynomial((512, 256), 10, (-5.0, 5.0))
QUARTIC = espn.Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))
SESSION = bytes(16)


def planned(network, example, **options) -> MaskedModel:
    """A torch network planned for the masked engine."""
    return masked_model(espn.convert(network, example[:1]), example, **options)


def without_noise(model: MaskedModel) -> MaskedModel:
    """The same model, whose logits leave as exact integers."""
    output = msgspec.structs.replace(model.plan.output, noise_bits=0)
    plan = msgspec.structs.replace(model.plan, output=output)
    return MaskedModel(plan, model.weights, model.report)


class Pair:
    """A server, a client and their dealer, from a known seed."""

    def __init__(
        self,
        model: MaskedModel,
        *,
        seed: bytes = bytes(16),
        corrections: Party = SERVER,
    ) -> None:
        self.model = model
        self.plan = model.plan
        self.seed = seed
        self.corrections: Party = corrections
        self.dealing = Dealing(self.plan, seed=seed, corrections=corrections)
        self.server = ServerPreparation(self.plan, model.weights, self.dealing.seeds[0])
        self.client = ClientPreparation(self.plan, self.dealing.seeds[1])
        _, self.opening = together(
            {"server": self.server.open_weights(), "client": self.client.open_weights()}
        )

    def prepare(self, index: int, batch: int, *, keep: bool = False):
        """The material of both parties, and what was sent for it."""
        pairing = Pairing(SESSION, index, batch, self.corrections)
        ready, transcript = together(
            {
                "dealer": self.dealing.deal(index, batch),
                "server": self.server.prepare(pairing),
                "client": self.client.prepare(pairing),
            },
            keep=keep,
        )
        return ready["server"], ready["client"], transcript

    def infer(self, x, *, index: int = 0, keep: bool = False):
        """The output's integers as the client gets them, and what was sent."""
        ours, theirs, _ = self.prepare(index, len(x))
        values, transcript = together(
            {
                "server": server(self.plan, self.model.weights, ours),
                "client": client(self.plan, theirs, self.plan.encode(x, force=True)),
            },
            keep=keep,
        )
        return kernels.centred(values["client"], self.plan.output.ring), transcript

    def roundings(self, index: int, batch: int):
        """What decides every rounding of inference `index`, from all parties' seeds.

        Computed by Python integers from the definitions, not by the engine's kernels.
        """
        root = Keystream(self.seed)
        own = inference_seeds(root.fork(b"dealer").bytes(16)).take(index)
        seeds = [inference_seeds(seed).take(index) for seed in self.dealing.seeds]
        server_draws, client_draws = (Draws(self.plan, seed, batch) for seed in seeds)
        drawn = client_draws if self.corrections == SERVER else server_draws
        coin = list(coins(self.plan, own, seeds[0], batch))

        def rounding(number: int, z: np.ndarray) -> Rounding:
            step, mine = self.plan.steps[number], coin[number]
            assert mine is not None
            masks = [r.astype(np.int64).reshape(z.shape) for r in mine.masks]
            words = [drawn.words(number, chunk) for chunk in chunks(batch)]
            between = self.plan.evaluations[number]
            hidden = client_draws.hidden(number)
            act = step.activation
            assert act.masks == len(masks)
            if isinstance(act, Product):
                rows = np.concatenate(words)
                rounding = mine.rounding.reshape(len(z), -1)
                dropped = client_low_bits_of_product(
                    between, z, masks[0], rounding, rows, hidden, self.client_word
                )
                return Rounding(masks, rounding.reshape(dropped.shape) - dropped)
            parts = [
                between.lines(part, chunk.stop - chunk.start)
                for part, chunk in zip(words, chunks(batch), strict=True)
            ]
            lines = [np.concatenate(line) for line in zip(*parts, strict=True)]
            second = second_rounding(
                step, z, masks, mine.rounding, lines, hidden, self.client_word
            )
            return Rounding(masks, second)

        return rounding

    def client_word(self, word: int, drawn: int) -> int:
        """The client's half of a word, where one party has drawn its own."""
        return drawn if self.corrections == SERVER else word - drawn


def dealt_words(step, masks, rho, channel):
    """The dealer's words of one element before anything of them is left out.

    In the order in which they travel, each with the number of its group and its power.
    """
    act, m = step.activation, step.ring

    def own(columns):
        return columns[channel if len(columns) > 1 else 0]

    constant, found = own(act.constant) + rho, []
    for g, mask in enumerate(masks):
        shift = act.shifts(m)[g]
        row = own(act.groups[g].coeffs) if act.groups else (0, 0)
        degree, cases = len(row) - 1, []
        for signed in (mask - (mask >> (m - 1) << m), mask):
            t = -(signed >> shift)
            powers = [
                sum(
                    row[k] * math.comb(k, j) * t ** (k - j)
                    for k in range(j, degree + 1)
                )
                for j in range(degree)
            ]
            if g == 0 and act.linear is not None:
                powers[0] -= own(act.linear.coefficient) * (signed >> act.linear.shift)
            cases.append(powers)
        first, other = cases
        constant += first[0]
        found += [(g, j, first[j] - row[j]) for j in range(1, degree)]
        found += [(g, j, other[j] - first[j]) for j in range(degree)]
    return [(None, 0, constant), *found]


def second_rounding(step, z, masks, rounding, words, hidden, client_word):
    """What is added to y, or its sums, before s bits are dropped, by Python integers.

    The dealer's coin, less what is left out of its words, less what the client drops of
    its own share.

    Args:
        words: those that a party draws, a line for each kind of word.
        client_word: the client's, of a word and what is drawn.
    """
    act, m = step.activation, step.ring
    low, *zeros = act.zeros(m)
    result = len(z), *act.pooled(z.shape[1:])
    numbers = np.arange(rounding.size).reshape(result)
    for axis, size in enumerate(act.pool or (), 1):
        numbers = numbers.repeat(size, axis)
    places = numbers.reshape(-1).tolist()
    theirs = [int(mask) << act.drop for mask in hidden.reshape(-1)]
    constants, left_out = list(map(int, rounding)), [0] * len(theirs)
    for i, value in enumerate(z.reshape(-1).tolist()):
        own = [int(mask.reshape(-1)[i]) % (1 << m) for mask in masks]
        opened, tops, seen, place = [], [], set(), places[i]
        for mask, shift in zip(own, act.shifts(m), strict=True):
            c = (value + (1 << (m - 2)) + mask) % (1 << m)
            tops.append(c >> (m - 1))
            offset = 1 << (m - 2 - shift) if act.groups else 0
            opened.append((c >> shift) - offset)
        (_, _, constant), *others = dealt_words(step, own, 0, i % z.shape[-1])
        constants[place] += constant
        for (g, power, word), bits, line in zip(others, zeros, words[1:], strict=True):
            # A group's second word of a power is what the other case adds.
            change = power == 0 or (g, power) in seen
            seen.add((g, power))
            if change and not tops[g]:
                continue
            own_word = client_word(word >> bits, int(line[i]))
            theirs[place] += (own_word << bits) * opened[g] ** power
            left_out[place] += (word % (1 << bits)) * opened[g] ** power
    second = np.empty(len(theirs), dtype=np.int64)
    summed = z.size // len(theirs)
    for place, constant in enumerate(constants):
        cut = left_out[place] + constant % (1 << low)
        theirs[place] += client_word(constant >> low, int(words[0][place])) << low
        # It weighs less than what the client drops, a word at a time.
        assert abs(cut) < len(words) * summed << act.unsent
        dropped = theirs[place] % (1 << act.unsent)
        second[place] = int(rounding[place]) - cut - dropped
    return second.reshape(result)


def client_low_bits_of_product(between, z, r, rounding, rows, hidden, client_word):
    """What the client drops of its share of a product, by Python integers."""
    act, m = between.step.activation, between.step.ring
    sizes, (n, short) = between.factors, between.sizes
    places = np.broadcast_to(np.arange(short).reshape(sizes[1]), sizes[0]).reshape(-1)
    dropped = np.empty((len(z), n), dtype=np.int64)
    for row, (value, mask) in enumerate(zip(z.tolist(), r.tolist(), strict=True)):
        words = rows[row].tolist()
        for i, place in enumerate(places.tolist()):
            cases, opened, known = [], [], []
            for k, shift in zip((i, n + place), act.dropped, strict=True):
                own = mask[k] % (1 << m)
                c = (value[k] + (1 << (m - 2)) + own) % (1 << m)
                top = c >> (m - 1)
                cases.append(1 - top)
                opened.append((c >> shift) - (1 << (m - 2 - shift)))
                signed = own if top else own - (own >> (m - 1) << m)
                known.append(-(signed >> shift))
            a, b = cases
            lift, coin = between.lift, int(rounding[row, i])
            both = (known[0] * known[1] << lift) + coin
            first, second = known[0] << lift, known[1] << lift
            total = int(hidden[row, i]) << act.drop
            total += client_word(both, words[(2 + 2 * a + b) * n + i])
            total += opened[0] * client_word(second, words[6 * n + b * short + place])
            total += opened[1] * client_word(first, words[a * n + i])
            dropped[row, i] = total % (1 << act.unsent)
    return dropped.reshape(len(z), *between.result)


def channel_polynomials(radii, *, degree: int = 4) -> ChannelPolynomials:
    """ReLU fitted on each channel's own radius; the last channel is constant."""
    x = np.linspace(-1, 1, 101)
    powers = np.arange(degree + 1)
    fitted = np.linalg.lstsq(x[:, None] ** powers, np.maximum(x, 0), rcond=None)[0]
    rows = []
    for radius in map(float, radii[:-1]):
        exponent = round(math.log2(radius))
        numerators = fitted * (radius / 2.0**exponent) ** (1.0 - powers) * 2.0**16
        whole = tuple(map(round, numerators.tolist()))
        rows.append(espn.Polynomial(whole, 16, (-radius, radius), exponent=exponent))
    rows.append(espn.Polynomial((5,), 10, (-1.0, 1.0)))
    return ChannelPolynomials(tuple(rows))


class Residual(torch.nn.Module):
    """Stem, a strided block with a projection, average pool and a linear head."""

    def __init__(self, *polynomials):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.act0, self.act1, self.act2 = map(
            espn.PolynomialActivation, polynomials or [QUARTIC] * 3
        )
        self.conv1 = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.conv2 = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.project = torch.nn.Conv2d(8, 16, 1, stride=2)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x):
        x = self.act0(self.stem(x))
        x = self.act2(self.conv2(self.act1(self.conv1(x))) + self.project(x))
        return self.head(x.mean((2, 3)))


def residual(*polynomials):
    torch.manual_seed(1)
    network = Residual(*polynomials)
    return network.eval().requires_grad_(False), torch.randn(4, 3, 8, 8)


def by_channel(degree: int = 4):
    """The same network with polynomials fitted to what each channel sees."""
    network, x = residual()
    network.stem.weight *= 2.0 ** torch.linspace(-1, 1, 8)[:, None, None, None]
    for name in ("act0", "act1", "act2"):
        seen: list[torch.Tensor] = []

        def note(_, given, seen=seen):
            seen.append(given[0].abs().amax((0, 2, 3)))

        hook = getattr(network, name).register_forward_pre_hook(note)
        network(x)
        hook.remove()
        polynomial = channel_polynomials(1.25 * seen[0], degree=degree)
        setattr(network, name, espn.PolynomialActivation(polynomial))
    return network.eval(), x


class Layers(torch.nn.Module):
    """Every linear layer the planner knows, where each can go wrong."""

    def __init__(self):
        super().__init__()
        conv = torch.nn.Conv2d
        self.pad = torch.nn.ZeroPad2d((1, 0, 2, 1))
        self.wide = conv(3, 12, (1, 3), padding=(0, 1), stride=(2, 1))
        self.depthwise = conv(12, 12, 3, padding=1, groups=12)
        self.grouped = conv(12, 6, 3, padding=2, dilation=2, groups=3)
        self.branch = conv(12, 2, 1, bias=False)
        self.pool = torch.nn.AvgPool2d(3, stride=2, padding=1)
        self.first, self.second = conv(8, 3, 1), conv(3, 4, 2)
        self.acts = torch.nn.ModuleList(
            espn.PolynomialActivation(QUARTIC) for _ in range(4)
        )
        self.head = torch.nn.LazyLinear(3)

    def forward(self, x):
        x = self.acts[0](self.wide(self.pad(x)))
        x = self.acts[1](self.depthwise(x)) + x
        x = torch.cat([self.acts[2](self.grouped(x)), self.branch(x)], 1)
        x = self.second(self.first(self.pool(x)))  # a rescaling between them
        return self.head(torch.flatten(self.acts[3](x), 1))


def layers(height=8, width=8):
    torch.manual_seed(2)
    model, example = Layers(), torch.randn(3, 3, height, width)
    model(example)
    return model.eval().requires_grad_(False), example


class Moving(torch.nn.Module):
    """Values moved and weighed between two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(2, 3, 3)
        self.act = espn.PolynomialActivation(QUARTIC)

    def forward(self, x):
        one, two = self.act(self.first(x)).chunk(2, 1)
        x = torch.nn.functional.pixel_shuffle(torch.cat([two, one.flip(2)], 1), 2)
        x = torch.cat([x[..., :10], x[..., 2:].transpose(2, 3)], 2)
        return self.second(torch.nn.functional.interpolate(x, (6, 7), mode="bilinear"))


def moving():
    torch.manual_seed(4)
    return Moving().eval().requires_grad_(False), torch.randn(3, 3, 5, 6)


class Gated(torch.nn.Module):
    """Gates of a channel, of a pixel and of every element; a product of outputs."""

    def __init__(self):
        super().__init__()
        conv = torch.nn.Conv2d
        self.stem, self.squeeze, self.excite = (
            conv(3, 6, 3),
            conv(6, 3, 1),
            conv(3, 6, 1),
        )
        self.pixel, self.other = conv(6, 1, 3, padding=1), conv(6, 6, 1, groups=2)
        self.acts = torch.nn.ModuleList(
            espn.PolynomialActivation(p) for p in (QUARTIC, QUARTIC, GATE, GATE)
        )
        self.head, self.beside = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)

    def forward(self, x):
        x = self.acts[0](self.stem(x))
        gate = self.acts[1](self.squeeze(x.mean((2, 3), keepdim=True)))
        x = x * self.acts[2](self.excite(gate))
        x = self.acts[3](self.pixel(x)) * x
        x = (x * self.other(x)).mean((2, 3))
        return self.head(x) * self.beside(x) + self.head(x)


def gated(height=5, width=6):
    torch.manual_seed(5)
    return Gated().eval().requires_grad_(False), torch.randn(3, 3, height, width)


class Pooled(torch.nn.Module):
    """Average pools as all that reads an activation, twice of one; and not all."""

    def __init__(self):
        super().__init__()
        conv, pool = torch.nn.Conv2d, torch.nn.AvgPool2d
        self.first, self.second = conv(3, 6, 3, padding=1), conv(6, 6, 3, padding=1)
        self.third, self.fourth = conv(6, 6, 1), conv(6, 4, 1)
        self.left, self.right, self.beside = conv(4, 3, 1), conv(4, 3, 1), conv(6, 3, 1)
        self.pools = torch.nn.ModuleList([pool(2), pool((1, 3)), pool(2), pool(2)])
        of_channels = channel_polynomials(torch.linspace(3, 6, 6))
        self.acts = torch.nn.ModuleList(
            espn.PolynomialActivation(polynomial)
            for polynomial in (QUARTIC, of_channels, QUARTIC, QUARTIC)
        )

    def forward(self, x):
        x = self.pools[0](self.acts[0](self.first(x)))
        x = self.pools[1](self.acts[1](self.second(x)))
        x = self.acts[2](self.third(x))
        y = self.acts[3](self.fourth(x))
        y = self.left(self.pools[2](y)) + self.right(self.pools[3](y))
        return (y + self.beside(self.pools[2](x))).flatten(1)


def pooled():
    torch.manual_seed(6)
    return Pooled().eval().requires_grad_(False), torch.randn(4, 3, 8, 12)


def fuzzed_plans() -> list[str]:
    """Texts of plans in which every field and every operation occurs."""
    torch.manual_seed(3)
    flat = torch.nn.Sequential(
        torch.nn.Linear(6, 7), espn.PolynomialActivation(QUARTIC), torch.nn.Linear(7, 3)
    )
    espn.attach_guard(flat, espn.InputGuard.fit(torch.randn(4, 6)))
    pairs = [layers(5, 6), residual(), by_channel(), (flat, torch.randn(4, 6))]
    pairs += [moving(), gated(), pooled()]
    return [
        planned(network, example, precision=precision).plan.to_json()
        for network, example in pairs
        for precision in ("fast", "high")
    ]


def message_count(plan, batch: int) -> int:
    """Messages of ring elements, chunks counted apart."""
    return 2 + 2 * len(plan.steps) * len(chunks(batch))


def packed(count: int, bits: int) -> int:
    return math.ceil(count * bits / 8)
