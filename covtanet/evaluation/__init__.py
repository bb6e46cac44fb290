"""Evaluation of a model: predictions and truth, metrics, promotion of a challenger."""
