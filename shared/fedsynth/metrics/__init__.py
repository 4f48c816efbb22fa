"""Metrics of a synthetic cohort: pure functions over arrays, one metric a file, each naming its paper.

A metric that has no value on its input raises `NotMeasurable` and says why; none returns NaN or a stand-in number.
"""
