"""How a network is run: device, precision, training flags, compiled code and CUDA graphs."""
