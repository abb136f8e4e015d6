"""The networks, and the normalisation of their input."""
