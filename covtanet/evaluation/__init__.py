"""How good a model is: predictions against truth, figures from them, and promotion of a challenger."""
