"""Each formula as a pure function of tensors: no state, no Lightning.

Half-precision inputs are computed and returned in float32; only the student is differentiated.
"""

from .anchors import (
    data_emphasized_divergence,
    output_anchor,
    relative_distance,
    squared_distance,
    wasserstein_distance,
)
from .averages import ema_decay, ema_update_, power_decay, power_exponent, synthesis_weights
from .confidence import confidence_penalty, confidences, confident_labels, coverage_loss
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
from .instability import learning_rate_sensitivity, max_attention_logit
from .logit_size import spectral_decoupling, z_loss
from .multi_teacher import feature_agreement, kept_teachers
from .quantization import quantize
from .selective_classification import (
    area_under_risk_coverage,
    coverage_at_risk,
    max_softmax_score,
    normalized_max_logit,
    risk_at_coverage,
    risk_coverage_curve,
)
from .sigmoid import sigmoid_divergence
from .smoothing import label_smoothing, max_suppression
from .soft_cross_entropy import soft_cross_entropy
from .targets import target_change
from .votes import majority_vote, mean_vote

__all__ = [
    "DIVERGENCES",
    "FEATURE_DISTANCES",
    "alpha_divergence",
    "area_under_risk_coverage",
    "confidence_penalty",
    "confidences",
    "confident_labels",
    "coverage_at_risk",
    "coverage_loss",
    "data_emphasized_divergence",
    "direction_error",
    "direction_variance",
    "dropout_rate",
    "early_learning_regularization",
    "early_learning_target",
    "ema_decay",
    "ema_update_",
    "entropy",
    "feature_agreement",
    "feature_cosine",
    "feature_mse",
    "jensen_shannon_divergence",
    "kept_teachers",
    "kl_divergence",
    "label_smoothing",
    "learning_rate_sensitivity",
    "logit_cosine",
    "logit_mse",
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
    "quantize",
    "relative_distance",
    "reverse_kl_divergence",
    "risk_at_coverage",
    "risk_coverage_curve",
    "sigmoid_divergence",
    "soft_cross_entropy",
    "spectral_decoupling",
    "squared_distance",
    "synthesis_weights",
    "target_change",
    "total_variation",
    "wasserstein_distance",
    "z_loss",
]
