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
    alpha_divergence,
    entropy,
    jensen_shannon_divergence,
    kl_divergence,
    logit_cosine,
    logit_mse,
    reverse_kl_divergence,
    total_variation,
)
from .dropout import dropout_rate
from .early_learning import early_learning_regularization, early_learning_target
from .features import FEATURE_DISTANCES, feature_cosine, feature_mse
from .generations import optimal_target_weight
from .gradient_directions import direction_error, direction_variance
from .soft_cross_entropy import soft_cross_entropy
from .votes import majority_vote, mean_vote

__all__ = [
    "DIVERGENCES",
    "FEATURE_DISTANCES",
    "alpha_divergence",
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
    "logit_cosine",
    "logit_mse",
    "majority_vote",
    "mean_vote",
    "optimal_target_weight",
    "output_anchor",
    "power_decay",
    "power_exponent",
    "reverse_kl_divergence",
    "soft_cross_entropy",
    "squared_distance",
    "synthesis_weights",
    "total_variation",
    "wasserstein_distance",
]
