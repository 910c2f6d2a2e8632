"""Each formula as a pure function of tensors: no state, no Lightning.

Half-precision inputs are computed and returned in float32; only the student is differentiated.
"""

from .anchors import (
    data_emphasized_divergence,
    output_anchor,
    squared_distance,
    wasserstein_distance,
)
from .averages import ema_decay, ema_update_, power_decay, power_exponent, synthesis_weights
from .divergences import (
    DIVERGENCES,
    entropy,
    jensen_shannon_divergence,
    kl_divergence,
    reverse_kl_divergence,
)
from .dropout import dropout_rate
from .early_learning import early_learning_regularization, early_learning_target
from .features import FEATURE_DISTANCES, feature_cosine, feature_mse
from .generations import optimal_target_weight
from .gradient_directions import direction_error, direction_variance
from .votes import majority_vote, mean_vote

__all__ = [
    "DIVERGENCES",
    "FEATURE_DISTANCES",
    "data_emphasized_divergence",
    "direction_error",
    "direction_variance",
    "dropout_rate",
    "early_learning_regularization",
    "early_learning_target",
    "ema_decay",
    "ema_update_",
    "entropy",
    "feature_cosine",
    "feature_mse",
    "jensen_shannon_divergence",
    "kl_divergence",
    "majority_vote",
    "mean_vote",
    "optimal_target_weight",
    "output_anchor",
    "power_decay",
    "power_exponent",
    "reverse_kl_divergence",
    "squared_distance",
    "synthesis_weights",
    "wasserstein_distance",
]
