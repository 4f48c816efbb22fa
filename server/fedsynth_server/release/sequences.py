"""The MR sequences of a release, which both who writes and who reads one must call the same (`fedsynth.sequences`)."""

from __future__ import annotations

from fedsynth.sequences import MrSequence, mr_sequences

__all__ = ["MrSequence", "mr_sequences"]
