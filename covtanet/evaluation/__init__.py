"""Evaluation of a model: predictions beside their truth, metrics, promotion of a challenger."""
