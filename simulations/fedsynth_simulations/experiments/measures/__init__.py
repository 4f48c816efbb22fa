"""What is measured of trained generators; one theme a file, each measure a function of a `Bench`."""
