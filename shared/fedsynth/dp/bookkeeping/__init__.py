"""Clipping by patient from one forward and one backward pass, without a gradient for every patient in memory.

Book-keeping (Bu, Wang, Zha, Karypis 2023, "Differentially Private Optimization on Large Model at Small Cost"): the pass
keeps each layer's input and the gradient at its output (`capture`). From them follow the exact norm of each patient's
gradient, by the cheaper of two ways a layer (`gradients`, `layers`), and, once the norms are known, the clipped sum as
one weighted contraction. What cannot be covered is refused, never skipped; `mixing` tests that no sample sees another.
"""

from fedsynth.dp.bookkeeping.clipping import Bookkeeper, weights_of_one_step
from fedsynth.dp.bookkeeping.mixing import MixedSamplesError
from fedsynth.dp.bookkeeping.passes import UnsupportedLayerError

__all__ = ["Bookkeeper", "MixedSamplesError", "UnsupportedLayerError", "weights_of_one_step"]
