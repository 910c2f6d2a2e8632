"""Objectives: one extra term of the training loss each, one file each."""
