"""How errors are counted, and what diagnoses their signs of masked gradients."""
