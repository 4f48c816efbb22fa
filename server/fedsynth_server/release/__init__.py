"""A release: synthetic patients as BIDS, DICOM and tables, with what a recipient needs to judge and to check them."""
