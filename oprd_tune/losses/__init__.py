"""Losses. Each returns a sum over tokens; the recipe divides it once, by the count of the whole optimizer step."""

from oprd_tune.losses.beside import ReferenceCrossEntropy, TaskReward
from oprd_tune.losses.bridged_mse import BridgedMSE
from oprd_tune.losses.composite import Composite
from oprd_tune.losses.control_variate import ControlVariateReverseKL
from oprd_tune.losses.divergences import ForwardKL, GeneralisedJSD, MixedKL, TailedTopKKL
from oprd_tune.losses.hidden_mse import HiddenStateLoss, HiddenStateMSE
from oprd_tune.losses.per_token import PerTokenLoss
from oprd_tune.losses.reverse_kl import FullReverseKL, SampledReverseKL
from oprd_tune.losses.topk_kl import DetachedTopKReverseKL, TopKMixedKL, TopKReverseKL

__all__ = [
    "BridgedMSE",
    "Composite",
    "ControlVariateReverseKL",
    "DetachedTopKReverseKL",
    "ForwardKL",
    "FullReverseKL",
    "GeneralisedJSD",
    "HiddenStateLoss",
    "HiddenStateMSE",
    "MixedKL",
    "PerTokenLoss",
    "ReferenceCrossEntropy",
    "SampledReverseKL",
    "TailedTopKKL",
    "TaskReward",
    "TopKMixedKL",
    "TopKReverseKL",
]
