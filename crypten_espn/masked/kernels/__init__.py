"""Integer kernels of the masked engine: convolution and polynomial passes.

Every kernel is exact modulo 2**32 (int32 arrays) or 2**64 (int64 arrays), runs on one
thread, and releases the GIL. Before compiled code touches memory, its caller here
compares the shapes of everything it gets, once per call.
"""

from .activation import deal_polynomial, polynomial_share, words_of
from .convolution import convolve, pad, pool_sum, windows
from .filters import Filters
from .opening import add_linear, hide, shifted_openings, truncate
from .product import deal_product, product_share
from .ring import centred, reduce_ring, ring_dtype, ring_mask
from .winograd import pays

__all__ = [
    "Filters",
    "add_linear",
    "centred",
    "convolve",
    "deal_polynomial",
    "deal_product",
    "hide",
    "pad",
    "pays",
    "polynomial_share",
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
