"""What the data sets say: manifests, labels, samples, and phantoms with known truth."""
