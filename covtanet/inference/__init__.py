"""From prepared slices to lesion maps and probabilities."""
