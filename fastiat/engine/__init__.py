"""How a network is run: devices and precisions, compiled functions and CUDA graphs."""
