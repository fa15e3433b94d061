"""How results read in a terminal: text from frozen values, nothing else. One module a group of verbs."""

from ckptgrow.report.auditing import audit
from ckptgrow.report.folding import folding
from ckptgrow.report.growing import declaration, declared, expansion, inspection, proposal, verification
from ckptgrow.report.lines import size
from ckptgrow.report.masking import mask
from ckptgrow.report.ranking import ranking

__all__ = [
    "application",
    "audit",
    "declaration",
    "declared",
    "expansion",
    "extraction",
    "folding",
    "inspection",
    "mask",
    "merging",
    "proposal",
    "ranking",
    "reversion",
    "size",
    "verification",
]
from ckptgrow.report.reverting import reversion
from ckptgrow.report.skills import application, extraction, merging
