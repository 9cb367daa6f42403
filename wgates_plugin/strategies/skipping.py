"""Gate steps that are left out because the gradient is not finite."""

from __future__ import annotations

import logging

from wgates_plugin.errors import TrainingError

logger = logging.getLogger("wgates_plugin")

MOST_SKIPPED = 100
"""Updates without a finite gradient in a row: a loss scaler has found its scale long before."""


def note_skipped(step: int, in_a_row: int) -> None:
    """Warn of gate step `step` if it is the first of `in_a_row` updates that were left out.

    Raises:
        TrainingError: there were too many in a row.
    """
    if in_a_row == 1:
        logger.warning("gates: gradient not finite at gate step %d; this update is skipped", step)
    if in_a_row >= MOST_SKIPPED:
        raise TrainingError(
            f"gates: gradient not finite at gate step {step}, in {MOST_SKIPPED} calls in a row; look "
            "at the loss and the weights for values that are not finite"
        )
