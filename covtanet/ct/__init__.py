"""Chest CT as volumes in HU from NIfTI and DICOM, windowing, lungs. No torch, no labels."""
