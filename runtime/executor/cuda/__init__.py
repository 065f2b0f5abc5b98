"""The torch executor on a CUDA device: Triton kernels, static buffers, CUDA graphs, sampling on the device."""
