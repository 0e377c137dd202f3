"""apply and revert themselves: what is refused, copies, and models that are not known."""

import copy
import pickle

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from diffusers_contract import Reads, given, made, operators, outputs, results, to
from test_diffusers_cogvideox import VARIANTS as COGVIDEOX
from test_diffusers_wan import OPERATORS
from test_diffusers_wan import VARIANTS as WAN
from tolerance import assert_bit_equal

from sora_kernels.integrations.diffusers import Report, apply, revert
from sora_kernels.integrations.diffusers.parts import norm_modulate
from sora_kernels.integrations.diffusers.wan import WanProcessor


@pytest.fixture
def model():
    return made(WAN["t2v"]).eval()


@pytest.fixture
def inputs():
    return given(WAN["t2v"])


def test_report(model, inputs):
    report = apply(model)
    assert report == Report(
        "WanTransformer3DModel",
        {"WanAttnProcessor": 4, "WanRotaryPosEmbed": 1, "WanTransformerBlock": 2, "GELU": 2},
        {},
    )
    assert str(report) == "WanTransformer3DModel: 4 WanAttnProcessor, 1 WanRotaryPosEmbed, 2 WanTransformerBlock, 2 GELU"
    assert operators(model, inputs) >= OPERATORS


def refused(function, model, message, error=ValueError, **options):
    with pytest.raises(error) as raised:
        function(model, **options)
    assert message in str(raised.value)


def test_twice(model, inputs):
    apply(model)
    before = outputs(model, inputs)
    refused(apply, model, "apply: model: expected one that is not patched (call revert first), got a patched one")
    assert_bit_equal(outputs(model, inputs), before)
    revert(model)
    refused(revert, model, "revert: model: expected one that apply has patched, got WanTransformer3DModel")
    apply(model)
    assert_bit_equal(outputs(model, inputs), before)


def test_what_is_no_model(model):
    pipe = diffusers.DiffusionPipeline()
    refused(apply, pipe, "apply: model: expected a torch.nn.Module, such as pipe.transformer, got DiffusionPipeline", TypeError)
    refused(revert, pipe, "revert: model: expected one that apply has patched, got DiffusionPipeline")
    refused(apply, torch.nn.Linear(2, 2), "or strict=False, got Linear")


def test_several_devices(model):
    model.blocks[1].to("meta")
    refused(
        apply, model, "apply: model: expected all parameters on one device (offload or distribute it afterwards), got cpu, meta"
    )
    assert not isinstance(model.blocks[0].attn1.processor, WanProcessor)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_refused(model, inputs, whole):
    """Their graphs would go on as they are."""
    if whole:
        refused(
            apply, torch.compile(model, backend="eager"), "apply: model: expected one that is not compiled yet, got a compiled one"
        )
    model.blocks[0].compile(backend="eager")
    refused(apply, model, "expected one that is not compiled yet")


def test_reverting_a_compiled_model_is_refused(model):
    apply(model)
    model.compile(backend="eager")
    refused(revert, model, "revert: model: expected one that is not compiled (patch a new one instead)")


def test_classes_that_inherit_a_forward(model, inputs):
    """As fully_shard makes them of blocks."""
    for block in model.blocks:
        block.__class__ = type("FSDPWanTransformerBlock", (WanTransformerBlock,), {})
    assert "2 FSDPWanTransformerBlock" in str(apply(model))
    revert(model)
    model.blocks[0].__class__ = type("Other", (WanTransformerBlock,), {"forward": lambda self, *args: args[0]})
    assert "1 FSDPWanTransformerBlock" in str(apply(model))


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_norms_of_lower_precision_than_their_input(kind):
    """As behind quantised layers that compute in float32: torch promotes."""
    norm, x = kind(64).bfloat16(), torch.randn(2, 5, 64)
    norm.weight.data += torch.randn(64).bfloat16()
    right = copy.deepcopy(norm).double()(x.double())
    torch.testing.assert_close(norm_modulate(norm, x).double(), right, rtol=1e-5, atol=1e-5)


def test_replicas_are_refused(model, inputs):
    """Those of DataParallel would call forwards that belong to the original."""
    apply(model)
    with pytest.raises(ValueError, match=r"DataParallel: module: expected a model that is not patched"):
        model._replicate_for_data_parallel()
    revert(model)
    model._replicate_for_data_parallel()


def test_models_within_others_are_named(model):
    wrapped = torch.nn.DataParallel(model)
    refused(apply, wrapped, "apply: model: expected the WanTransformer3DModel in it (model.module), got DataParallel")
    apply(model)
    refused(revert, wrapped, "revert: model: expected the WanTransformer3DModel in it (model.module), got DataParallel")


def test_context_parallelism_is_refused(model):
    """Its hooks would split the tokens, and no attention of ours would gather them."""
    for block in model.blocks:
        block.attn1.processor._parallel_config = object()
    refused(apply, model, "apply: blocks.0.attn1.processor: expected no context parallelism")
    assert not isinstance(model.blocks[0].attn1.processor, WanProcessor)


class Mine(WanAttnProcessor):
    """A processor that diffusers does not have."""


def test_unknown_processors(model, inputs):
    model.blocks[1].attn2.set_processor(Mine())
    before = outputs(model, inputs)
    refused(apply, model, "apply: blocks.1.attn2.processor: expected one of WanAttnProcessor, ")
    refused(apply, model, ", or strict=False, got Mine")
    assert_bit_equal(outputs(model, inputs), before)
    report = apply(model, strict=False)
    assert report.replaced == {"WanAttnProcessor": 3, "backends of Mine": 1}
    assert report.left == {"blocks.1.attn2.processor": "Mine"}
    assert str(report).endswith("\nleft: blocks.1.attn2.processor, Mine")
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-4, atol=1e-5)
    assert "gate_residual_layer_norm_modulate_forward" not in operators(model, inputs)
    revert(model)
    assert model.blocks[1].attn2.processor._attention_backend is None
    assert_bit_equal(outputs(model, inputs), before)


def test_unknown_models():
    """By strict=False their attention, where it goes through diffusers' dispatch."""
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64}
    model = diffusers.SkyReelsV2Transformer3DModel(**config, in_channels=4, out_channels=4, rope_max_seq_len=32).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 7, 32),
    }
    refused(apply, model, "or strict=False, got SkyReelsV2Transformer3DModel")
    before = outputs(model, inputs)
    assert apply(model, strict=False).replaced == {"backends of SkyReelsV2AttnProcessor": 2}
    assert operators(model, inputs) == {"attention_forward"}
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-4, atol=1e-5)
    revert(model)
    assert_bit_equal(outputs(model, inputs), before)


def test_models_in_which_there_is_nothing_to_replace():
    """diffusers has models that call torch's attention themselves."""
    config = {
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
    }
    for model in (diffusers.SD3Transformer2DModel(**config, pooled_projection_dim=16, sample_size=8), torch.nn.Linear(2, 2)):
        refused(apply, model, "apply: model: expected attention by diffusers' dispatch (integrations.torch_sdpa", strict=False)


def test_a_derived_class_is_known(model):
    class Tuned(diffusers.WanTransformer3DModel):
        pass

    model.__class__ = Tuned
    assert apply(model).model == "Tuned"


def test_another_backend_may_be_chosen(model, inputs):
    """After apply, by diffusers' own means."""
    apply(model)
    model.set_attention_backend("native")
    assert operators(model, inputs) == OPERATORS - {"attention_forward"}


def test_a_forward_that_somebody_has_replaced(model):
    block = model.blocks[1]
    block.forward = lambda *args: args[0]
    refused(apply, model, "apply: blocks.1: expected the forward of WanTransformerBlock, got one that something else has replaced")
    del block.forward
    apply(model)
    block.forward = lambda *args: args[0]
    refused(revert, model, "revert: model: expected the forward that apply gave to WanTransformerBlock, got another one")


def test_copies(model, inputs):
    """A copy is patched by itself, and can be reverted by itself; so is one that was saved whole."""
    before = outputs(model, inputs)
    apply(model)
    patched = outputs(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.blocks[0].forward.args[0] is other.blocks[0]
        assert_bit_equal(outputs(other, inputs), patched)
        revert(other)
        assert_bit_equal(outputs(other, inputs), before)
    assert_bit_equal(outputs(model, inputs), patched)


def test_weights_are_loaded_and_saved_as_ever(model, inputs, tmp_path):
    apply(model)
    model.save_pretrained(tmp_path)
    other = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
    apply(other)
    assert_bit_equal(outputs(other.eval(), inputs), outputs(model, inputs))
    other.load_state_dict({name: torch.zeros_like(x) for name, x in model.state_dict().items()})
    assert not outputs(other, inputs)[0].any()


def test_float32_modules_beside_bfloat16(model, inputs, tmp_path):
    """As from_pretrained leaves them: norms, tables and time in float32."""
    model.save_pretrained(tmp_path)
    mixed = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert mixed.blocks[0].norm2.weight.dtype == torch.float32
    assert mixed.blocks[0].attn1.norm_q.weight.dtype == torch.bfloat16
    given = to(inputs, torch.bfloat16)
    want = results(mixed, given)
    apply(mixed)
    got = results(mixed, given)
    assert operators(mixed, given) >= OPERATORS
    for name, x in got.items():
        assert x.dtype == want[name].dtype
        assert (x - want[name]).norm() <= 0.1 * want[name].norm(), name


def test_fused_projections(model, inputs):
    before = outputs(model, inputs)
    apply(model)
    model.fuse_qkv_projections()
    assert model.blocks[0].attn1.fused_projections
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-4, atol=1e-5)


def test_no_value_is_read(model, inputs):
    apply(model)
    with Reads() as reads:
        outputs(model, inputs)
        assert reads.count == 0
        inputs["hidden_states"].nonzero()
    assert reads.count == 1, "the counter counts"


def test_processors_that_were_set_since_stay(model, inputs):
    apply(model)
    mine = Mine()
    model.blocks[1].attn2.set_processor(mine)
    revert(model)
    assert model.blocks[1].attn2.processor is mine
    assert type(model.blocks[0].attn1.processor) is WanAttnProcessor


def test_fused_meanwhile():
    """CogVideoX sets processors of its own when it fuses projections, and back."""
    model = made(COGVIDEOX["rope"]).eval()
    model.fuse_qkv_projections()
    apply(model)
    model.unfuse_qkv_projections()
    revert(model)
    assert all("Fused" not in type(p).__name__ for p in model.attn_processors.values())
    apply(model)
    model.fuse_qkv_projections()
    revert(model)
    model.unfuse_qkv_projections()
    assert {type(p) for p in model.attn_processors.values()} == {CogVideoXAttnProcessor2_0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_default_eps_of_rms_norm(dtype):
    """Of numbers so small that it matters, as the norm itself has it."""
    norm, x = torch.nn.RMSNorm(64).to(dtype), (1e-4 * torch.randn(2, 5, 64)).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(norm_modulate(norm, x), norm(x), rtol=tolerance, atol=tolerance)


def test_a_time_that_samples_share():
    model, given_ = made(COGVIDEOX["rope"]).eval(), given(COGVIDEOX["rope"])
    given_["timestep"] = given_["timestep"][:1]
    with torch.no_grad():
        want = outputs(model, given_)
        apply(model)
        torch.testing.assert_close(outputs(model, given_), want, rtol=1e-3, atol=1e-4)
