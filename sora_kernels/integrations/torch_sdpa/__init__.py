"""torch's own attention on these kernels; importing this changes nothing of torch.

>>> with replace():
...     out = F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 256, 64))

`replace()` holds within a context, on any device. `register()` offers the kernels to torch as a FlashAttention implementation.
`torch.nn.attention.activate_flash_attention_impl("SORA")` then turns it on for all CUDA tensors of the process.
"""

from .flash_implementation import NAME as NAME
from .flash_implementation import register as register
from .replacement import replace as replace
