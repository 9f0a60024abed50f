"""Codecs: bytes to arrays and back, no model in sight. Pure functions on NumPy arrays; the loops are Numba's."""
