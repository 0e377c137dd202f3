"""sora_kernels inside other libraries. Each module imports its library; importing sora_kernels imports none of them."""
