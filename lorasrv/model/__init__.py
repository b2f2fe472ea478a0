"""The base model: families, weights, forward pass, sampling."""
