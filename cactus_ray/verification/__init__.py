"""Verdicts on samples: attacks, bounds, and the checks that keep them honest."""
