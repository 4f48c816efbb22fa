"""From the files that a hospital has to a prepared cohort."""
