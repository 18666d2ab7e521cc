"""What attention heads do: their entropy, computed with the attention itself, watched and regularised."""

from aero.entropy.attention import attention_with_entropy
from aero.entropy.dynamics import Verdict, bucket_shares, head_entropy, verdict
from aero.entropy.reachable import reachable_entropy, reachable_row_entropy
from aero.entropy.regularizer import EntropyRegularizer, EntropyRegularizerConfig
from aero.entropy.strength import AdaptiveStrength, ConstantStrength, StrengthSchedule, WarmUpStrength
from aero.entropy.watch import EntropyWatch, watch

__all__ = [
    "AdaptiveStrength",
    "ConstantStrength",
    "EntropyRegularizer",
    "EntropyRegularizerConfig",
    "EntropyWatch",
    "StrengthSchedule",
    "Verdict",
    "WarmUpStrength",
    "attention_with_entropy",
    "bucket_shares",
    "head_entropy",
    "reachable_entropy",
    "reachable_row_entropy",
    "verdict",
    "watch",
]
