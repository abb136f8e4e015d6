"""Running a network: device, precision, training flags, compiled code and CUDA graphs."""
