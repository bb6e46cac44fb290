"""Synthetic chests with known lesions, archives of them, and damaged input."""
