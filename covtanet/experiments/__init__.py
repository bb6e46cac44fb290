"""An experiment from data to registry: preparation, variants, folds, outcomes, publishing."""
