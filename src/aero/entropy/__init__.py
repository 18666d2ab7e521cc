"""What attention heads do: their entropy, computed with the attention itself, watched and regularised."""

from aero.entropy.attention import attention_with_entropy
from aero.entropy.dynamics import Verdict, bucket_shares, head_entropy, verdict
from aero.entropy.reachable import reachable_entropy, reachable_row_entropy
from aero.entropy.regularizer import EntropyRegularizer, EntropyRegularizerConfig

__all__ = [
    "EntropyRegularizer",
    "EntropyRegularizerConfig",
    "Verdict",
    "attention_with_entropy",
    "bucket_shares",
    "head_entropy",
    "reachable_entropy",
    "reachable_row_entropy",
    "verdict",
]
