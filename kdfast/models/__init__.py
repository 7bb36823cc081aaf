"""Networks by name, their heads, taps into their features, and weights on disk.

    zoo         ModelSpec, build, create, names                     the papers' networks, torchvision's, the user's own
    heads       find_head, feature_size, replace_head, ...          the last layer, and its replacements
    auxiliary   flatten_head, conv_head, separable_head             classifiers in the middle of a network
    taps        Taps, tap_shapes                                    the tensors that pass modules named by path
    weights     read_weights, load_weights, save_weights, recognize strict, by name, never executing a pickle's code

torchvision is imported when one of its networks is asked for, not before.
"""

from kdfast.models.auxiliary import conv_head, flatten_head, separable_head
from kdfast.models.heads import classifier_head, feature_size, find_head, projection_head, replace_head
from kdfast.models.taps import Taps, tap_shapes
from kdfast.models.weights import load_weights, read_weights, recognize, save_weights
from kdfast.models.zoo import ModelSpec, build, create, names, parameter_count

__all__ = [
    "ModelSpec",
    "Taps",
    "build",
    "classifier_head",
    "conv_head",
    "create",
    "feature_size",
    "find_head",
    "flatten_head",
    "load_weights",
    "names",
    "parameter_count",
    "projection_head",
    "read_weights",
    "recognize",
    "replace_head",
    "save_weights",
    "separable_head",
    "tap_shapes",
]
