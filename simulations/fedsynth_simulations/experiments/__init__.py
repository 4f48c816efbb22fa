"""Reproductions of published synthesis systems: declared in TOML, run on named data, shown beside the papers' numbers."""
