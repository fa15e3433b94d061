"""The command line: options -> one library call -> output. Errors and exit codes are mapped in group.py, once."""

from ckptgrow.cli import auditing, folding, growing, masking, ranking, reverting, skills
from ckptgrow.cli.group import main

__all__ = ["auditing", "folding", "growing", "main", "masking", "ranking", "reverting", "skills"]
