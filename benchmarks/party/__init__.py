"""What runs inside each party: a common start, CrypTen over two channels, samples.

The parent process starts this code once per rank and network. The parties agree over
a control connection of their own, so what is measured is not warmed up by it; rank 0
prints one line of JSON per sample.
"""

from .collect import Collector, run_on_networks
from .control import Control
from .measuring import Result, System, emit_line, measure
from .on_crypten import CryptenSystem, crypten_channels, deal, leave

__all__ = [
    "Collector",
    "Control",
    "CryptenSystem",
    "Result",
    "System",
    "crypten_channels",
    "deal",
    "emit_line",
    "leave",
    "measure",
    "run_on_networks",
]
