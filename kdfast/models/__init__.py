"""Networks by name, their heads, taps into their features, and weights on disk.

    zoo         ModelSpec, build, create, names                     the papers' networks, torchvision's, the user's own
    heads       find_head, feature_size, replace_head, ...          the last layer, and what may stand in its place
    taps        Taps, tap_shapes                                    what the modules named by path compute
    weights     read_weights, load_weights, save_weights, recognize strict, by name, never executing a pickle's code

torchvision is imported when one of its networks is asked for, not before.
"""

from kdfast.models.heads import classifier_head, feature_size, find_head, projection_head, replace_head
from kdfast.models.taps import Taps, tap_shapes
from kdfast.models.weights import load_weights, read_weights, recognize, save_weights
from kdfast.models.zoo import ModelSpec, build, create, names, parameter_count

__all__ = [
    "ModelSpec",
    "Taps",
    "build",
    "classifier_head",
    "create",
    "feature_size",
    "find_head",
    "load_weights",
    "names",
    "parameter_count",
    "projection_head",
    "read_weights",
    "recognize",
    "replace_head",
    "save_weights",
    "tap_shapes",
]
