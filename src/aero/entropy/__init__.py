"""What attention heads do: their entropy, computed with the attention itself, watched and regularised."""

from aero.entropy.attach import Attachment, attach
from aero.entropy.attention import attention_entropy, attention_with_entropy
from aero.entropy.dynamics import Verdict, bucket_shares, head_entropy, head_verdicts, verdict
from aero.entropy.reachable import reachable_entropy, reachable_row_entropy
from aero.entropy.recorder import EntropyRecord, EntropyRecorder
from aero.entropy.regularizer import EntropyRegularizer, EntropyRegularizerConfig
from aero.entropy.strength import AdaptiveStrength, ConstantStrength, StrengthSchedule, WarmUpStrength
from aero.entropy.warning import Alarm, EarlyWarning
from aero.entropy.watch import EntropyWatch, watch

__all__ = [
    "AdaptiveStrength",
    "Alarm",
    "Attachment",
    "ConstantStrength",
    "EarlyWarning",
    "EntropyRecord",
    "EntropyRecorder",
    "EntropyRegularizer",
    "EntropyRegularizerConfig",
    "EntropyWatch",
    "StrengthSchedule",
    "Verdict",
    "WarmUpStrength",
    "attach",
    "attention_entropy",
    "attention_with_entropy",
    "bucket_shares",
    "head_entropy",
    "head_verdicts",
    "reachable_entropy",
    "reachable_row_entropy",
    "verdict",
    "watch",
]
