"""The most memory that a part of a program held at once, where the system tells."""

from __future__ import annotations

from pathlib import Path

from iddc.device import pick_device

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
"""Linux forgets the peak so far when 5 is written to the first; the second has it."""


class PeakMemory:
    """Counts from when it is made: a GPU's memory, else that of the whole process.

    Args:
        device: See `pick_device`.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._device = pick_device(device)
        self._known = True
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            _RESET.write_text("5")
        except OSError:
            self._known = False

    def bytes(self) -> float | None:
        """The peak until now; none where the system does not tell."""
        import torch

        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        if not self._known:
            return None
        lines = (line.split() for line in _STATUS.read_text("utf-8").splitlines())
        peaks = [float(words[1]) * 1024 for words in lines if words[:1] == ["VmHWM:"]]
        return peaks[0] if peaks else None
