"""Architectures as people have them: which run in the masked engine, and at what cost.

    python -m tests.zoo            # every line of tests/zoo.baseline anew
    python -m tests.zoo resnet18   # the lines of these

Activations are polynomials that are nearly linear, max pools average pools, weights
seeded and settled on noise; inputs are small. A line says whether a network runs, its
largest error beside its largest logit, the server's noise included, messages and bytes
of one inference; or what it is refused for. The table of docs/conversion.md is these
lines.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

import crypten_espn as espn
from crypten_espn.errors import EspnError
from crypten_espn.masked.inference import online_bytes
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.reference import evaluate

BASELINE = Path(__file__).with_name("zoo.baseline")
PAGE = Path(__file__).parent.parent / "docs" / "conversion.md"
NEARLY_LINEAR = espn.Polynomial((0, 512, 8), 10, (-5.0, 5.0))
GATE = espn.Polynomial((512, 256), 10, (-5.0, 5.0))
GATES = {"Sigmoid", "Hardsigmoid", "HardSigmoid"}
ACTIVATIONS = {
    "ELU", "GELU", "GELUTanh", "GELU_", "Hardswish", "HardSwish", "HardMish",
    "Hardtanh", "LeakyReLU", "Mish", "PReLU", "QuickGELU", "ReLU", "ReLU6", "SELU",
    "SiLU", "Swish", "Tanh",
}  # fmt: skip

# Rows and columns of an image; the least at which every stage has some.
TORCHVISION = {
    "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64, "wide_resnet50_2": 64,
    "densenet121": 64, "googlenet": 64, "inception_v3": 96, "mobilenet_v2": 64,
    "mobilenet_v3_small": 64, "mnasnet0_5": 64, "efficientnet_b0": 64,
    "efficientnet_v2_s": 64, "regnet_x_400mf": 64, "regnet_y_400mf": 64,
    "shufflenet_v2_x0_5": 64, "shufflenet_v2_x1_0": 64, "squeezenet1_1": 64,
    "alexnet": 64, "vgg11_bn": 64, "convnext_tiny": 64, "swin_t": 64, "vit_b_16": 224,
    "maxvit_t": 224,
}  # fmt: skip
TIMM = {
    "convmixer_768_32": 56, "darknet17": 64, "darknet53": 64, "dla34": 64,
    "dla46_c": 64, "fbnetc_100": 64, "gernet_s": 64, "mobilenetv4_conv_small": 64,
    "repvgg_a0": 64, "resnet10t": 64, "resnet26d": 64, "resnetv2_50": 64,
    "selecsls42": 64, "spnasnet_100": 64, "xception41": 64, "mobileone_s0": 64,
    "vovnet39a": 64, "dpn48b": 64, "ecaresnet26t": 64, "efficientvit_b0": 64,
    "ese_vovnet19b_dw": 64, "fastvit_t8": 64, "ghostnet_050": 64,
    "gmlp_ti16_224": 224, "hardcorenas_a": 64, "hrnet_w18_small": 64, "lcnet_050": 64,
    "mixer_s32_224": 224, "poolformer_s12": 64, "regnetz_005": 64,
    "repghostnet_050": 64, "resmlp_12_224": 224, "rexnet_100": 64, "semnasnet_075": 64,
    "seresnet18": 64, "starnet_s1": 64, "tinynet_e": 64, "cspresnet50": 64,
    "dm_nfnet_f0": 64, "edgenext_xx_small": 64, "levit_128s": 224, "nf_resnet26": 64,
    "pit_ti_224": 224, "res2net50_26w_4s": 64, "skresnet18": 64,
    "visformer_tiny": 224, "vit_tiny_patch16_224": 224,
}  # fmt: skip
# In the suite: small, quick, and each of another kind.
SMALL = (
    "squeezenet1_1", "swin_t", "darknet17", "dla46_c", "gernet_s", "resnet10t",
    "ecaresnet26t", "hardcorenas_a", "lcnet_050", "poolformer_s12",
)  # fmt: skip


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network as a line of the zoo has it, and three images."""
    torch.manual_seed(0)
    size = TORCHVISION.get(name) or TIMM[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = _torchvision(name) if name in TORCHVISION else _timm(name)
    types = {type(module) for module in network.modules()}
    replaced: dict[Any, espn.Polynomial] = {
        kind: GATE if kind.__name__ in GATES else NEARLY_LINEAR
        for kind in types
        if kind.__name__ in GATES | ACTIVATIONS
    }
    replaced |= {nn.ReLU: NEARLY_LINEAR, nn.GELU: NEARLY_LINEAR, nn.SiLU: NEARLY_LINEAR}
    network = espn.replace_activations(network, replaced)
    network = espn.replace_pooling(network)
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    return settled(network, x), x


def settled(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """In evaluation mode, of the size that trained ones have.

    Layer by layer, on noise: weights such that what they compute has a standard
    deviation of one, batch-norm's statistics of what it sees, its factors one. A fresh
    network's residual branches may be zero, and its values shrink from layer to layer.
    """
    hooks = []
    for module in network.modules():
        if isinstance(module, _NORMS):
            module.momentum = None
            module.train()
        if isinstance(module, (*_NORMS, nn.LayerNorm)) and module.weight is not None:
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(_of_one))
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return network.eval().requires_grad_(False)


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def _of_one(
    module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if not weight.any():
        nn.init.normal_(weight)
        output = module.forward(*inputs)
    if output.std() > 0:
        weight.div_(output.std())
    again: torch.Tensor = module.forward(*inputs)
    return again


def _torchvision(name: str) -> nn.Module:
    import torchvision

    more: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        more = {"init_weights": False, "aux_logits": False}
    if name == "vit_b_16":
        more = {"image_size": 224}
    network: nn.Module = getattr(torchvision.models, name)(num_classes=10, **more)
    return network.eval()


def _timm(name: str) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(name, num_classes=10)
    return network.eval()


def line(name: str) -> str:
    """What becomes of one network."""
    try:
        network, x = build(name)
    except Exception as error:
        return f"{name}: cannot be prepared; {_first(error)}"
    try:
        private = espn.convert(network, x)
    except EspnError as error:
        return f"{name}: refused; {_reason(str(error))}"
    try:
        model = masked_model(private)
    except EspnError as error:
        return f"{name}: not in the masked engine; {_reason(str(error))}"
    # What both parties compute (tests/masked holds them to it), and the server's noise.
    logits, _ = evaluate(model.plan, model.weights, x[:1])
    with torch.no_grad():
        expected = network(x[:1])
    output = model.plan.output
    noise = 2.0 ** (output.noise_bits - 1 - output.frac_bits)
    off = float((logits - expected).abs().max() + noise) / float(expected.abs().max())
    down, up = online_bytes(model.plan)
    percent = 2.0 ** math.ceil(math.log2(max(100 * off, 2**-10)))
    ring = f", a ring of {output.ring} bits" if model.report.widened else ""
    return (
        f"{name}: runs; error below {percent:.3g} %, {model.plan.messages} messages, "
        f"{(down + up) / 1e6:.2f} MB{ring}"
    )


def _reason(words: str) -> str:
    """The operations that are refused, how many of each, and why the first is."""
    found = re.findall(r"^  \S+ \((\S+)\): .*, stops conversion; (.*)$", words, re.M)
    if not found:
        return words.splitlines()[0][:200]
    counts = Counter(operation for operation, _ in found)
    listed = ", ".join(f"{n} {operation}" for operation, n in sorted(counts.items()))
    return f"{listed}; {found[0][0]}: {found[0][1].split(';')[0]}"


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def baseline() -> dict[str, str]:
    """The recorded lines by name."""
    lines = BASELINE.read_text().splitlines()
    return {text.split(":")[0]: text for text in lines if text}


def table() -> str:
    """The recorded lines as the page on conversion has them."""
    rows = ["| network | error below | messages | sent | ring |", "|" + 5 * "---|"]
    refused = ["| network | refused for |", "|---|---|"]
    for name, text in baseline().items():
        words = text.removeprefix(f"{name}: ")
        if words.startswith("runs; "):
            error, messages, sent, *ring = words.removeprefix("runs; ").split(", ")
            error, messages = error.removeprefix("error below "), messages.split()[0]
            bits = ring[0].split()[3] if ring else "32"
            rows.append(f"| {name} | {error} | {messages} | {sent} | {bits} bits |")
        else:
            refused.append(f"| {name} | {words.split('; ')[1]} |")
    return "\n".join([*rows, "", *refused])


def in_page(text: str) -> tuple[str, str]:
    """The table that a page has, and the page with that of the recorded lines."""
    before, rest = text.split("<!-- zoo -->\n")
    old, after = rest.split("<!-- end -->")
    return old.strip(), f"{before}<!-- zoo -->\n{table()}\n<!-- end -->{after}"


def main(names: list[str]) -> None:
    """Print the lines of these networks, record them, and write the page's table."""
    for name in names or [*TORCHVISION, *TIMM]:
        new = line(name)
        print(new, flush=True)
        recorded = (baseline() if BASELINE.exists() else {}) | {name: new}
        ordered = [n for n in (*TORCHVISION, *TIMM) if n in recorded]
        BASELINE.write_text("".join(f"{recorded[n]}\n" for n in ordered))
    PAGE.write_text(in_page(PAGE.read_text())[1])


if __name__ == "__main__":
    main(sys.argv[1:])
