"""Logits of base and grown model on a text, run by transformers (extra `verify`), in float32 and in their own dtype.

A grown model adds in another order, so in bfloat16 its logits differ from the base's about as much as the base's own
bfloat16 logits differ from its float32 ones (METHOD.md 8). Both figures are given side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptgrow.equivalence import Answer, Finding
from ckptgrow.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 512
ROWS = 32  # tokens compared at a time: a row may have a quarter of a million logits
TOLERANCE = 1e-4  # the largest float32 difference against the largest logit


def compared(base: Path, grown: Path, text: Path) -> Answer:
    """The answer `logits`. Raises RequestError without transformers, or for a text that cannot be read."""
    try:
        import transformers
    except ImportError:
        raise RequestError("--logits needs transformers", hint="pip install 'ckptgrow[verify]'") from None
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RequestError(f"the text cannot be read ({error})", file=str(text)) from None
    try:
        tokens = transformers.AutoTokenizer.from_pretrained(base)(words, return_tensors="pt").input_ids[:, :TOKENS]
        return _answer(transformers, base, grown, tokens)
    except Exception as error:  # transformers raises all kinds for a model or tokenizer that it cannot run
        reason = str(error).partition("\n")[0]
        raise RequestError(f"transformers cannot run it ({type(error).__name__}: {reason})", file=str(base)) from None


def _answer(transformers: Any, base: Path, grown: Path, tokens: Tensor) -> Answer:
    import torch

    exact = _logits(transformers, base, torch.float32, tokens)
    largest, agreement, _ = _apart(exact, _logits(transformers, grown, torch.float32, tokens))
    figure = f"float32 on {tokens.shape[1]} tokens: largest difference {largest:.1e}, top-1 agreement {agreement:.2%}"
    own = transformers.AutoConfig.from_pretrained(base).dtype
    if own not in (None, torch.float32):
        rough = _logits(transformers, base, own, tokens)
        noise, change = _apart(exact, rough), _apart(rough, _logits(transformers, grown, own, tokens))
        figure += (
            f"; {str(own).removeprefix('torch.')}: {_said(change)} (the base's own distance to float32: {_said(noise)})"
        )
    if largest <= TOLERANCE * float(exact.abs().max()):
        return Answer("logits", "yes", figure)
    finding = Finding("logits", f"in float32 they differ by more than {TOLERANCE} of the largest logit")
    return Answer("logits", "no", figure, (finding,))


def _said(apart: tuple[float, float, float]) -> str:
    return f"largest difference {apart[0]:.2g}, top-1 agreement {apart[1]:.2%}, KL {apart[2]:.2g}"


def _logits(transformers: Any, folder: Path, dtype: Any, tokens: Tensor) -> Tensor:
    """[tokens, vocabulary] in float32. The model is gone afterwards."""
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        logits: Tensor = model(tokens).logits[0].float()
    return logits


def _apart(one: Tensor, other: Tensor) -> tuple[float, float, float]:
    """Largest absolute difference, share of equal top-1 tokens, mean KL divergence in nats."""
    agreement = (one.argmax(-1) == other.argmax(-1)).float().mean()
    largest, divergence = 0.0, 0.0
    for row in range(0, len(one), ROWS):
        rows, others = one[row : row + ROWS], other[row : row + ROWS]
        mine, its = rows.log_softmax(-1), others.log_softmax(-1)
        divergence += float((mine.exp() * (mine - its)).sum())
        largest = max(largest, float((rows - others).abs().max()))
    return largest, float(agreement), divergence / len(one)
