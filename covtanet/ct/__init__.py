"""What a chest CT is: volumes in HU from NIfTI and DICOM, windowing, lungs. No torch, no labels."""
