"""Evaluation of a release against patients it never saw: fidelity, utility, radiogenomics, genes."""
