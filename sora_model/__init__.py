"""A thin diffusion transformer for video in the manner of Sora, on the kernels of `sora_kernels`.

    config        DiTConfig: sizes of a model, presets S, B, L, XL
    dit           DiT: latents of any sizes -> predictions, in one packed pass
    conditioning  PackedText, the TextEncoder interface, caption dropout
    text          WordEncoder: a small text encoder that needs no download
    diffusion     noising, loss, guidance and sampling with diffusers' schedulers; every task is a mask of given frames
    vae           the interface between pixels and latents; PixelCodec, which leaves pixels as they are
    pipeline      SoraPipeline: prompts and sizes -> videos; saving and loading
    convert       weights of diffusers' DiT
    data          a procedural world with ground truth, folders of files, batches of mixed sizes

Letters are those of `sora_kernels`; M counts text tokens, and a *token frame* is the tokens of one t: pt latent frames.
"""
