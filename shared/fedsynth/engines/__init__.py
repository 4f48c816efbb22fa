"""One-shot private statistics: what one patient adds to a sum that a site releases once."""
