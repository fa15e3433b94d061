"""The launcher for LLaMA-Factory, whose configuration has no place for callbacks. Needs llamafactory.

    python -m ckptgrow.training.llamafactory train.yaml [key=value ...]

takes what `llamafactory-cli train` takes, and two keys of its own: `ckptgrow_manifest` (needed only where
model_name_or_path is not the grown folder) and `ckptgrow_how` (split or mask). `finetuning_type` is full or freeze.
When the model has been saved, output_dir is audited. Under torchrun, start it as a module: `torchrun ... -m`.
"""

from __future__ import annotations

import sys
from typing import Any

from ckptgrow.errors import CkptgrowError, FreezeError
from ckptgrow.training.finished import audit_saved
from ckptgrow.training.transformers import FreezeCallback

_OWN = ("ckptgrow_manifest", "ckptgrow_how")
_TYPES = ("full", "freeze")


def taken(arguments: dict[str, Any]) -> tuple[dict[str, Any], FreezeCallback]:
    """LLaMA-Factory's arguments without ours, which it would refuse, and the callback that ours ask for."""
    theirs = {key: value for key, value in arguments.items() if key not in _OWN}
    kind = theirs.get("finetuning_type", "lora")
    if kind not in _TYPES:
        raise FreezeError(
            f"finetuning_type is {kind}, which trains other weights than the manifest's",
            hint="Use finetuning_type: full.",
        )
    return theirs, FreezeCallback(arguments.get("ckptgrow_manifest"), arguments.get("ckptgrow_how", "split"))


def main() -> None:
    """Train as LLaMA-Factory does, with the callback, then audit what it saved."""
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    arguments = read_args()
    if not isinstance(arguments, dict):
        raise FreezeError("give a configuration file: train.yaml or train.json")
    theirs, callback = taken(arguments)
    run_exp(theirs, callbacks=[callback])
    if callback.handle is not None and callback.leads:
        audit_saved(arguments.get("ckptgrow_manifest") or theirs["model_name_or_path"], theirs["output_dir"])


if __name__ == "__main__":
    try:
        main()
    except CkptgrowError as error:
        sys.exit(f"ckptgrow: {error}")
