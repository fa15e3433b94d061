"""The library's verbs: each wires the rooms together for one command. Quiet; progress goes to a callable.

    import ckptgrow
    ckptgrow.inspect("google/gemma-2b")
    ckptgrow.expand("google/gemma-2b", "out", policy="g-freeze")
    ckptgrow.verify("google/gemma-2b", "out").same

One module a group of verbs; what a verb refuses is a CkptgrowError, and then nothing is left on disk.
"""

from ckptgrow.operations.auditing import audit
from ckptgrow.operations.declaring import propose
from ckptgrow.operations.folding import fold, plan_fold
from ckptgrow.operations.growing import expand, inspect, plan_expand, verify
from ckptgrow.operations.masking import mask
from ckptgrow.operations.merging import merge
from ckptgrow.operations.ranking import rank
from ckptgrow.operations.reverting import revert
from ckptgrow.operations.skills import apply, extract

__all__ = [
    "apply",
    "audit",
    "expand",
    "extract",
    "fold",
    "inspect",
    "mask",
    "merge",
    "plan_expand",
    "plan_fold",
    "propose",
    "rank",
    "revert",
    "verify",
]
