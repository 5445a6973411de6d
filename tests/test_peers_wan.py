"""A Wan pipeline of diffusers as a `Wan` on the same weights: it makes the pipeline's own latents."""

import copy

import pytest
import torch

import minicos
from minicos.errors import MinicosError
from minicos.hooks import Hooks
from minicos.tiny import tokenizer
from tests.golden import rel_max

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

FRAMES, SIZE, STEPS = 5, (32, 48), 4
SCHEDULERS = {
    "unipc": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    "dpmpp": lambda: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}


def transformer(seed: int, **changes):
    torch.manual_seed(seed)
    network = diffusers.WanTransformer3DModel(
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            **changes,
        }
    )
    for p in network.parameters():  # zeros and ones hide mistakes
        p.data += 0.1 * torch.randn(p.shape)
    return network.eval()


def parts():
    torch.manual_seed(5)
    words = tokenizer.build()
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, 0.2, -0.3, 0.0],
        latents_std=[1.5, 0.7, 1.1, 2.0],
    )
    text = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=words.get_vocab_size(),
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    return {"vae": vae.eval(), "text_encoder": text.eval(), "tokenizer": fast}


def text_to_video(scheduler: str = "unipc", **more):
    return diffusers.WanPipeline(
        transformer=transformer(0), scheduler=SCHEDULERS[scheduler](), **parts(), **more
    )


def image_to_video(scheduler: str = "unipc", **more):
    channels = 4 if more.get("expand_timesteps") else 12  # with mask and the picture's latent
    network = transformer(0, in_channels=channels)
    return diffusers.WanImageToVideoPipeline(
        transformer=network, scheduler=SCHEDULERS[scheduler](), **parts(), **more
    )


def pair():
    low = transformer(1, in_channels=12)
    return image_to_video(transformer_2=low, boundary_ratio=0.9)


PIPELINES = {
    "text, unipc": text_to_video,
    "text, euler": lambda: text_to_video("euler"),
    "text, dpmpp": lambda: text_to_video("dpmpp"),
    "image beside": image_to_video,
    "image imposed": lambda: image_to_video("euler", expand_timesteps=True),
    "two experts": pair,
}


def picture():
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5))


def theirs(pipe, noise, guidance: float):
    pipe.set_progress_bar_config(disable=True)
    image = {"image": picture()[None]} if "Image" in type(pipe).__name__ else {}
    return pipe(
        prompt="solve the maze",
        negative_prompt="go left",
        height=SIZE[0],
        width=SIZE[1],
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=noise,
        output_type="latent",
        **image,
    ).frames


def ours(pipe, guidance: float = 4.0):
    model = minicos.from_diffusers(pipe).with_preset(steps=STEPS, guidance=guidance)
    given = {"size": SIZE} if not model.preset.takes_image else {"image": picture()}
    condition = model.condition("solve the maze", negative="go left", frames=FRAMES, **given)
    return model, condition


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_the_pipelines_own_latents(make):
    """The rest is float32 rounding, including their sinusoid's (`minicos.verify`)."""
    pipe = make()
    model, condition = ours(pipe)
    noise = model.noise(condition, 3)
    *_, last = model.sample(condition, noise=noise)
    assert rel_max(last.next, theirs(pipe, noise, 4.0)) < 4e-6  # measured 0.7e-6 to 1.2e-6


def test_decodes_as_the_pipeline_does():
    pipe = text_to_video()
    model = minicos.from_diffusers(pipe)
    x = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    mean, std = (
        torch.tensor(x).view(1, 4, 1, 1, 1) for x in (model.vae.cfg.mean, model.vae.cfg.std)
    )
    expected = pipe.vae.decode(x * std + mean).sample
    # measured 2.0e-5: norms over 4 channels magnify the last bits
    assert rel_max(model.vae.decode(x), expected) < 1e-4


def test_no_copy_and_nothing_is_left_on_the_pipeline():
    pipe = pair()
    before = {k: copy.deepcopy(vars(pipe)[k]) for k in ("scheduler", "_internal_dict")}
    flags = [p.requires_grad for p in pipe.transformer.parameters()]
    model, condition = ours(pipe)
    for network, part in (
        (pipe.transformer, model.experts["high"]),
        (pipe.vae, model.vae),
        (pipe.text_encoder, model.text),
    ):
        addresses = {p.data_ptr() for p in network.parameters()}
        assert {p.data_ptr() for p in part.parameters()} <= addresses
    next(model.sample(condition, hooks=Hooks().on("blocks.*", lambda x, site: None)))
    assert [p.requires_grad for p in pipe.transformer.parameters()] == flags
    assert vars(pipe.scheduler).keys() == vars(before["scheduler"]).keys()
    assert pipe.scheduler.num_inference_steps == before["scheduler"].num_inference_steps
    for network in (pipe.transformer, pipe.transformer_2, pipe.vae, pipe.text_encoder):
        assert "forward" not in vars(network)
        for module in network.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_change_of_a_weight_is_seen_by_both():
    pipe = text_to_video()
    model = minicos.from_diffusers(pipe)
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_q.weight.zero_()
    assert not model.experts["high"].blocks[1].self_attn.q.weight.any()


def test_another_solver_or_shift_is_ours():
    model = minicos.from_diffusers(text_to_video())
    assert model.preset.solver == "unipc" and model.preset.shift == 3
    changed = model.with_preset(solver="euler", shift=7.0, steps=4)
    assert changed.schedule() == minicos.schedule.euler(4, 7.0)


def test_fingerprints_tell_weights_apart():
    one, other = (minicos.from_diffusers(text_to_video()) for _ in range(2))
    assert one.weights == other.weights
    assert minicos.from_diffusers(image_to_video()).weights != one.weights


def test_bfloat16_shares_all_but_what_is_computed_in_float32():
    pipe = text_to_video()
    pipe.transformer.to(torch.bfloat16)
    dit = minicos.from_diffusers(pipe).experts["high"]
    assert dit.dtype == torch.bfloat16 and dit.blocks[0].norm3.weight.dtype == torch.float32
    attention = pipe.transformer.blocks[0].attn1
    assert dit.blocks[0].self_attn.q.weight.data_ptr() == attention.to_q.weight.data_ptr()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: setattr(p, "vae", None), "vae is None"),
        (lambda p: setattr(p, "text_encoder", None), "text_encoder is None"),
        (lambda p: setattr(p, "tokenizer", None), "tokenizer is None"),
        (lambda p: p.transformer.to(torch.float16), "torch_dtype"),
        (lambda p: setattr(p.transformer, "peft_config", {"a": 1}), "fuse_lora"),
        (lambda p: p.text_encoder.to("meta"), "offloaded"),
        (lambda p: setattr(p, "scheduler", diffusers.DDIMScheduler()), "no solver of minicos"),
        (
            lambda p: setattr(
                p, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
            ),
            "stochastic_sampling True",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_remedy(spoil, message):
    pipe = text_to_video()
    spoil(pipe)
    with pytest.raises(MinicosError, match=message):
        minicos.from_diffusers(pipe)


def test_other_objects_are_refused():
    with pytest.raises(MinicosError, match="DDIMScheduler is not a pipeline"):
        minicos.from_diffusers(diffusers.DDIMScheduler())
