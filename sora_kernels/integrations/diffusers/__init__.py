"""diffusers' models on these kernels. Importing this registers the attention backends "sora" and "sora_varlen".

>>> from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
>>> q, k, v = torch.randn(3, 1, 256, 2, 64)
>>> with attention_backend("sora"):
...     out = dispatch_attention_fn(q, k, v)

A model takes one by `model.set_attention_backend("sora")`, which as in all of diffusers holds for all models from then on. With
DIFFUSERS_ATTN_BACKEND=sora in the environment this has to be imported before diffusers, which refuses names that it does not know.
"""

from .attention_backend import BACKENDS as BACKENDS
from .attention_backend import TESTED as TESTED
from .attention_backend import sora as sora
from .attention_backend import sora_varlen as sora_varlen
from .packed import packed_forward as packed_forward
from .patching import MODELS as MODELS
from .patching import Report as Report
from .patching import apply as apply
from .patching import revert as revert
