"""A site's node: the SuperNode that speaks with the coordinator, and the runner that works for it on the site's terms."""
