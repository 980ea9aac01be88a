"""Text that a teacher writes itself: from shipped openings, in one stream a row, filtered and kept in parts."""

from linearize.sample.job import Sampled, sample
from linearize.sample.store import Counts
from linearize.sample.text import wanted, with_text

__all__ = ["Counts", "Sampled", "sample", "wanted", "with_text"]
