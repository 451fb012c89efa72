"""Integer kernels of the masked engine: convolution and polynomial passes.

Every kernel is exact modulo 2**32 (int32 arrays) or 2**64 (int64 arrays), runs on one
thread, and releases the GIL. Before compiled code touches memory, its caller here
compares the shapes of everything it gets: what a plan fixes once, the rest once per
call.
"""

from .activation import Polynomial, words_of
from .convolution import convolve, pad, pool_sum, windows
from .filters import Filters
from .opening import hide, shifted_openings, truncate
from .product import deal_product, product_share
from .ring import centred, reduce_ring, ring_dtype, ring_mask
from .winograd import pays

__all__ = [
    "Filters",
    "Polynomial",
    "centred",
    "convolve",
    "deal_product",
    "hide",
    "pad",
    "pays",
    "pool_sum",
    "product_share",
    "reduce_ring",
    "ring_dtype",
    "ring_mask",
    "shifted_openings",
    "truncate",
    "windows",
    "words_of",
]
