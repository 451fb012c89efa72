"""Private inference with polynomial activations, as an extension of CrypTen.

Importing it repairs CrypTen 0.4.1 where that is broken (see `crypten_espn.patches`).
The security claim throughout: semi-honest, two parties, a dealer that does not collude.
"""

import crypten_espn.patches as patches

patches.apply()

from .bundle import Bundle, Preprocessing, load  # noqa: E402
from .bundle.images import load_images  # noqa: E402
from .convert import PrivateNetwork, check, convert  # noqa: E402
from .cost import Cost, measure  # noqa: E402
from .engines import CrypTen, Masked  # noqa: E402
from .explain import compare_precisions, explain  # noqa: E402
from .launch import run_multiprocess, run_parties  # noqa: E402
from .pillar.calibrate import calibrate  # noqa: E402
from .pillar.guard import InputGuard, attach_guard, guard_of  # noqa: E402
from .pillar.harden import harden  # noqa: E402
from .pillar.penalty import (  # noqa: E402
    boundary_penalty,
    range_penalty,
    warmup_stage,
)
from .pillar.phases import clip_in_training, replace_share  # noqa: E402
from .pillar.ranges import range_report  # noqa: E402
from .pillar.replay import TailReplay  # noqa: E402
from .pillar.settle import settle_intervals  # noqa: E402
from .pillar.storage import bundled  # noqa: E402
from .pillar.stress import stress  # noqa: E402
from .pillar.surgery import (  # noqa: E402
    PolynomialActivation,
    replace_activations,
    replace_pooling,
)
from .pillar.watch import largest_inputs  # noqa: E402
from .polynomial import ChannelPolynomials, Polynomial  # noqa: E402
from .protocols import polyval, settings  # noqa: E402
from .protocols.truncation import failure_probability  # noqa: E402
from .serving.client import connect  # noqa: E402
from .serving.dealer import deal  # noqa: E402
from .serving.link import Limits, Link  # noqa: E402
from .serving.quota import Quota  # noqa: E402
from .serving.server import serve  # noqa: E402
from .serving.supply import Supply  # noqa: E402
from .simulate import simulate  # noqa: E402
from .sweep import sweep  # noqa: E402
from .wire.crypten import use_direct_channel  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "ChannelPolynomials",
    "Cost",
    "CrypTen",
    "InputGuard",
    "Limits",
    "Link",
    "Masked",
    "Polynomial",
    "PolynomialActivation",
    "Preprocessing",
    "PrivateNetwork",
    "Quota",
    "Supply",
    "TailReplay",
    "attach_guard",
    "boundary_penalty",
    "bundled",
    "calibrate",
    "check",
    "clip_in_training",
    "compare_precisions",
    "connect",
    "convert",
    "deal",
    "explain",
    "failure_probability",
    "guard_of",
    "harden",
    "largest_inputs",
    "load",
    "load_images",
    "measure",
    "patches",
    "polyval",
    "range_penalty",
    "range_report",
    "replace_activations",
    "replace_pooling",
    "replace_share",
    "run_multiprocess",
    "run_parties",
    "serve",
    "settings",
    "settle_intervals",
    "simulate",
    "stress",
    "sweep",
    "use_direct_channel",
    "warmup_stage",
]
