"""What the compiler made of the CUDA kernels, as scripts/check_kernels.py checks and prints it."""
