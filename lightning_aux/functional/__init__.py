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
from .confidence import confidence_penalty, confidences, confident_labels, coverage_loss
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
from .instability import learning_rate_sensitivity, max_attention_logit
from .logit_size import spectral_decoupling, z_loss
from .selective_classification import (
    area_under_risk_coverage,
    coverage_at_risk,
    max_softmax_score,
    normalized_max_logit,
    risk_at_coverage,
    risk_coverage_curve,
)
from .smoothing import label_smoothing, max_suppression
from .targets import cross_entropy, target_change
from .votes import majority_vote, mean_vote

__all__ = [
    "DIVERGENCES",
    "FEATURE_DISTANCES",
    "area_under_risk_coverage",
    "confidence_penalty",
    "confidences",
    "confident_labels",
    "coverage_at_risk",
    "coverage_loss",
    "cross_entropy",
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
    "label_smoothing",
    "learning_rate_sensitivity",
    "majority_vote",
    "max_attention_logit",
    "max_softmax_score",
    "max_suppression",
    "mean_vote",
    "normalized_max_logit",
    "optimal_target_weight",
    "output_anchor",
    "power_decay",
    "power_exponent",
    "reverse_kl_divergence",
    "risk_at_coverage",
    "risk_coverage_curve",
    "spectral_decoupling",
    "squared_distance",
    "synthesis_weights",
    "target_change",
    "wasserstein_distance",
    "z_loss",
]
