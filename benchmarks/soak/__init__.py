"""Nights of screening on a changing archive under random faults: ``make soak HOURS=1``."""
