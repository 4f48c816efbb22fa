"""What a site's node and a coordinator both need to run for weeks: supervised processes, keys and certificates, checks."""
