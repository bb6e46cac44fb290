"""Labelled data sets: layouts, labels, folds, prepared volumes."""
