"""apply(model): a model of diffusers computes by these kernels. revert(model): as it was.

What is replaced are attention processors, by diffusers' own `set_processor`, and the forward of blocks and of modules such as GELU,
by an attribute of that one module. Weights, names, and every linear layer with its LoRA or quantisation stay, as forwards call the
same modules. So do hooks: a block whose norm somebody watches, offloads or casts takes its own forward.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from ...checks import fail

MODELS = {
    "CogVideoXTransformer3DModel": "cogvideox",
    "CosmosControlNetModel": "cosmos",
    "CosmosTransformer3DModel": "cosmos",
    "DiTTransformer2DModel": "dit",
    "Flux2Transformer2DModel": "flux2",
    "FluxTransformer2DModel": "flux",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    "HunyuanVideoFramepackTransformer3DModel": "hunyuan_video",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "Kandinsky5Transformer3DModel": "kandinsky5",
    "LTX2VideoTransformer3DModel": "ltx2",
    "LTXVideoTransformer3DModel": "ltx",
    "LatteTransformer3DModel": "dit",
    "MochiTransformer3DModel": "mochi",
    "QwenImageTransformer2DModel": "qwenimage",
    "WanAnimateTransformer3DModel": "wan",
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan",
    "ZImageTransformer2DModel": "z_image",
}
"""The module beside this one that knows a class of models."""
_RECORD = "_sora_kernels_replaced"
_REPLICATE = "_replicate_for_data_parallel"


class Family(NamedTuple):
    """What replaces what, by exact class."""

    processors: dict[type, type]
    forwards: dict[type, Callable[..., Any]]
    """A forward takes the module first, as a method would."""
    packed: Callable[..., Any] | None = None
    """Of the model and packed.Samples."""
    prepare: Callable[[Any], None] | None = None
    """Computes what the model else computes in its first forward, in a way that torch.compile and torch.export do not take."""


class Report(NamedTuple):
    """What `apply` has replaced, and what it has left to diffusers."""

    model: str
    replaced: dict[str, int]
    """How many of each class."""
    left: dict[str, str]
    """Name and class of attention processors that it does not know; none of a known model."""

    def __str__(self) -> str:
        parts = [f"{count} {name}" for name, count in self.replaced.items()]
        return "\n".join([f"{self.model}: {', '.join(parts)}", *(f"left: {name}, {kind}" for name, kind in self.left.items())])


class _Forward(NamedTuple):
    module: nn.Module
    ours: Callable[..., Any]


class _Processor(NamedTuple):
    module: Any
    ours: Any
    original: Any


class _Backend(NamedTuple):
    processor: Any
    original: Any


def apply(model: nn.Module, *, strict: bool = True) -> Report:
    """Replaces what these kernels compute faster.

    >>> from diffusers import WanTransformer3DModel
    >>> model = WanTransformer3DModel(
    ...     num_attention_heads=2, attention_head_dim=64, num_layers=2, ffn_dim=64, text_dim=32, freq_dim=32, rope_max_seq_len=32
    ... )
    >>> print(apply(model))
    WanTransformer3DModel: 4 WanAttnProcessor, 1 WanRotaryPosEmbed, 2 WanTransformerBlock, 2 GELU
    >>> revert(model)

    Before `torch.compile`, before or after loading weights, LoRA adapters, quantisation and hooks. Attention is the backend
    "sora_varlen", until `model.set_attention_backend` says otherwise.

    Args:
        model: a transformer, such as `pipe.transformer`, of the classes in MODELS or derived from them.
        strict: False also takes other models, and known ones with processors that are not diffusers' own. Of both only attention is
            replaced, and where a processor is unknown only its backend, by "sora".

    Raises:
        ValueError, TypeError: if the model is unknown, is patched already, is compiled, is on several devices, or has nothing to
            replace. It is unchanged.
    """
    op = "apply"
    if not isinstance(model, nn.Module):
        fail(op, "model", "a torch.nn.Module, such as pipe.transformer", type(model).__name__, TypeError)
    if is_patched(model):
        fail(op, "model", "one that is not patched (call revert first)", "a patched one")
    _check_not_compiled(op, model)
    check_not_wrapped(op, model)
    devices = sorted({str(x.device) for x in model.parameters()})
    if len(devices) > 1:
        fail(op, "model", "all parameters on one device (offload or distribute it afterwards)", ", ".join(devices))
    family = family_of(model)
    if family is None:
        if strict:
            fail(op, "model", f"one of {', '.join(MODELS)}, or strict=False", type(model).__name__)
        family = Family({}, {})
    record, report = _plan(op, model, family, strict)
    if not record:
        fail(
            op, "model", "attention by diffusers' dispatch (integrations.torch_sdpa.replace() reaches others)", type(model).__name__
        )
    _register_skipping(family)
    if family.prepare is not None:
        family.prepare(model)
    for entry in record:
        _install(entry)
    model.__dict__ |= {_RECORD: record, _REPLICATE: _refuse_replicas}
    return report


def revert(model: nn.Module) -> None:
    """Puts back what `apply` has replaced, and nothing else: an attention processor that was set since then stays.

    Raises:
        ValueError: if the model is not patched, is compiled, or something has replaced a forward of ours.
    """
    op = "revert"
    if isinstance(model, nn.Module):
        check_not_wrapped(op, model)
    record = getattr(model, "__dict__", {}).get(_RECORD)
    if record is None:
        fail(op, "model", "one that apply has patched", type(model).__name__)
    _check_not_compiled(op, model)
    for entry in record:
        if isinstance(entry, _Forward) and not _places(entry.module, entry.ours):
            fail(op, "model", f"the forward that apply gave to {type(entry.module).__name__}", "another one")
    for entry in record:
        _remove(entry)
    # If projections were fused since then, these are what unfusing them puts back.
    kept = getattr(model, "original_attn_processors", None) or {}
    originals = {id(entry.ours): entry.original for entry in record if isinstance(entry, _Processor)}
    kept.update({name: originals[id(processor)] for name, processor in kept.items() if id(processor) in originals})
    del model.__dict__[_RECORD], model.__dict__[_REPLICATE]


def _refuse_replicas() -> Any:
    """In the place of the method by which torch.nn.DataParallel copies a module: copies would call forwards of the original."""
    fail("torch.nn.DataParallel", "module", "a model that is not patched (DistributedDataParallel takes it)", "a patched one")


def is_patched(model: nn.Module) -> bool:
    return _RECORD in getattr(model, "__dict__", {})


def is_whole(model: nn.Module) -> bool:
    """Whether all its attention is by the processors that `apply` gave it."""
    record = model.__dict__.get(_RECORD, ())
    return all(isinstance(x, _Forward) or (isinstance(x, _Processor) and x.module.processor is x.ours) for x in record)


def is_hooked(model: nn.Module) -> bool:
    """Whether a call of the whole model does more than its forward, or than ours."""
    ours = [entry.ours for entry in model.__dict__.get(_RECORD, ()) if isinstance(entry, _Forward) and entry.module is model]
    forward = model.__dict__.get("forward")
    return bool(model._forward_hooks or model._forward_pre_hooks or (forward is not None and forward not in ours))


def family_of(model: nn.Module) -> Family | None:
    for kind in type(model).__mro__:
        if kind.__module__.startswith("diffusers.") and kind.__name__ in MODELS:
            return importlib.import_module(f".{MODELS[kind.__name__]}", __package__).FAMILY
    return None


def _register_skipping(family: Family) -> None:
    """diffusers' LayerSkip asks, for a class of processors, what skipping one returns."""
    for original, ours in family.processors.items():
        try:
            AttentionProcessorRegistry.register(ours, AttentionProcessorRegistry.get(original))
        except ValueError:  # it cannot skip the original, either
            continue


_WRAPPED = {
    "get_base_model": "model.get_base_model()",
    "module": "model.module",
    "_orig_mod": "not compiled: compile its blocks, by compile_repeated_blocks",
}
"""Where peft, data parallelism and torch.compile hold a model, and how to get at it."""


def check_not_wrapped(op: str, model: nn.Module) -> None:
    if family_of(model) is not None:
        return
    for attribute, advice in _WRAPPED.items():
        inner: Any = getattr(model, attribute, None)
        inner = inner() if attribute == "get_base_model" and inner is not None else inner
        if isinstance(inner, nn.Module) and family_of(inner) is not None:
            fail(op, "model", f"the {type(inner).__name__} in it ({advice})", type(model).__name__)


def _check_not_compiled(op: str, model: nn.Module) -> None:
    # What torch.compile returns; to ask for the class would load its compiler.
    if any(m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule" for m in model.modules()):
        expected = "one that is not compiled yet" if op == "apply" else "one that is not compiled (patch a new one instead)"
        fail(op, "model", expected, "a compiled one")


def _plan(op: str, model: nn.Module, family: Family, strict: bool) -> tuple[list, Report]:
    record: list[_Forward | _Processor | _Backend] = []
    left = {}
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None:
            continue
        if getattr(processor, "_parallel_config", None) is not None:
            fail(op, f"{name}.processor", "no context parallelism, which these kernels do not have", "enable_parallelism's")
        if (kind := family.processors.get(type(processor))) is not None:
            record.append(_Processor(module, kind(), processor))
        elif strict:
            known = ", ".join(dict.fromkeys(kind.__name__ for kind in family.processors))
            fail(op, f"{name}.processor", f"one of {known}, or strict=False", type(processor).__name__)
        else:
            left[f"{name}.processor"] = type(processor).__name__
            if hasattr(processor, "_attention_backend"):
                record.append(_Backend(processor, processor._attention_backend))
    for name, module in model.named_modules():
        if not left and (forward := _forward_for(module, family)) is not None:
            if not _places(module, None):
                fail(op, name, f"the forward of {type(module).__name__}", "one that something else has replaced")
            record.append(_Forward(module, functools.partial(forward, module)))
    counts = Counter(_label(entry) for entry in record)
    return record, Report(type(model).__name__, dict(counts), left)


def _forward_for(module: nn.Module, family: Family) -> Callable[..., Any] | None:
    """That of its class, or of one that it derives its forward from, as the classes do that fully_shard makes."""
    own: Any = type(module)
    for kind in own.__mro__:
        if kind in family.forwards and own.forward is kind.forward:
            return family.forwards[kind]
    return None


def _label(entry: _Forward | _Processor | _Backend) -> str:
    if isinstance(entry, _Forward):
        return type(entry.module).__name__
    if isinstance(entry, _Processor):
        return type(entry.original).__name__
    return f"backends of {type(entry.processor).__name__}"


def _places(module: nn.Module, ours: Callable[..., Any] | None) -> list[tuple[Any, str]]:
    """Where `ours`, or if None the forward of the module's class, is called from: the module, or hooks of accelerate or diffusers.

    Both keep the forward that they found, and put another one into the module.
    """
    at: list[tuple[Any, str]] = [(module, name) for name in ("forward", "_old_forward") if name in module.__dict__]
    for reference in getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        at += [(reference, name) for name in ("forward", "original_forward")]
    if ours is None:
        own = type(module).forward
        return [p for p in at if getattr(getattr(*p), "__func__", None) is own] if at else [(module, "forward")]
    return [p for p in at if getattr(*p) is ours]


def _set_processor(module: Any, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:  # Mochi's attention
        module.processor = processor


def _install(entry: _Forward | _Processor | _Backend) -> None:
    if isinstance(entry, _Forward):
        for owner, name in _places(entry.module, None):
            setattr(owner, name, entry.ours)
    elif isinstance(entry, _Processor):
        _set_processor(entry.module, entry.ours)
    else:
        entry.processor._attention_backend = AttentionBackendName("sora")


def _remove(entry: _Forward | _Processor | _Backend) -> None:
    if isinstance(entry, _Forward):
        for owner, name in _places(entry.module, entry.ours):
            if owner is entry.module and name == "forward":
                del entry.module.forward
            else:
                setattr(owner, name, entry.module.__class__.forward.__get__(entry.module))
    elif isinstance(entry, _Processor):
        if entry.module.processor is entry.ours:
            _set_processor(entry.module, entry.original)
    else:
        entry.processor._attention_backend = entry.original
