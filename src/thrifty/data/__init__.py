"""Labelled photographs: where they come from, and the batches that models read."""
