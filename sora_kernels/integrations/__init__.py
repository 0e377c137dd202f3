"""sora_kernels inside other libraries, or in the place of one. Importing sora_kernels imports none of these modules."""
