"""A thin diffusion transformer for video in the manner of Sora, on the kernels of `sora_kernels`.

    config           DiTConfig: sizes of a model, presets tiny to XL
    dit patches      DiT: latents of any sizes -> predictions, in one packed pass; tubelets or uniform frames
    vae              the Codec interface; diffusers' causal video VAEs behind it
    conditioning     PackedText, the TextEncoder interface, caption dropout
    text             WordEncoder: a small text encoder that needs no download; pretrained_text: T5, UMT5 and CLIP
    captioner        latents -> captions, short prompts -> long ones
    diffusion        noising, loss, guidance and sampling; every task is a mask of given frames; schedulers: diffusers' by name
    request tasks    a request per task; loops, long videos, simulated worlds
    pipeline         SoraPipeline: requests -> videos; saving and loading
    train            Trainer, and what it trains: train_dit, train_vae, train_captioner
    evaluate         what a checkpoint can do, judged by ground truth; gallery, scaling, demo
    convert          weights of diffusers' DiT
    data             a procedural world with ground truth, folders of files, batches of mixed sizes
    cli              the command `sora`

Letters are those of `sora_kernels`; M counts text tokens, and a *token frame* is the tokens of one t: pt latent frames.
"""
