"""The run directory: configuration, metrics, results, weights and locks."""
