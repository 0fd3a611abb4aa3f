"""The arithmetics of deployed networks, apart from the bounds: naming one needs no torch."""

ARITHMETICS = {"real": 0.0, "float32": 2.0**-24}
"""Unit roundoff of the deployed arithmetic by name; real: its rounding is not charged, only that of the bounds."""
