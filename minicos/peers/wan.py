"""A Wan pipeline of diffusers in memory, as a `Wan` on the same weights.

Networks are built without weights and receive the tensors of the pipeline's, so no weight is held
twice. Two kinds are copied, since minicos stores them in another form: parameters that minicos
keeps in float32 and the pipeline in bfloat16 (`dit.FLOAT32`; 2 % of a 14B network), and Wan2.1's
image encoder, whose q, k and v are one matrix here.

Noise levels are those of the pipeline's scheduler as long as the preset keeps its solver and shift,
so a run equals the pipeline's own. The only remaining difference is the time sinusoid, which
diffusers computes in float32, the official code and minicos in float64: up to 9e-6 of the velocity.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

import tokenizers
import torch
from torch import Tensor, nn

from minicos.clip import CLIP
from minicos.config import CLIPConfig, Preset, TextConfig, VAEConfig, get_preset
from minicos.device import operations
from minicos.dit import FLOAT32, DiT
from minicos.errors import MinicosError
from minicos.plan import Plan
from minicos.precision import undisturbed
from minicos.schedule import Schedule
from minicos.stream import Residency
from minicos.text import EOS, TextEncoder, Tokenizer
from minicos.vae import VAE
from minicos.wan import Wan, residual_dtype
from minicos.weights import variants
from minicos.weights.configs import architecture
from minicos.weights.names import renamer, weights

N = TypeVar("N", bound=nn.Module)

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
# Scheduler -> our solver with the same steps, and the configuration that this requires.
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "FlowMatchEulerDiscreteScheduler": (
        "euler",
        {"use_dynamic_shifting": False, "stochastic_sampling": False, "invert_sigmas": False},
    ),
    "UniPCMultistepScheduler": (
        "unipc",
        {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "thresholding": False,
            "disable_corrector": [],
            "lower_order_final": True,
            "solver_p": None,
        },
    ),
    "DPMSolverMultistepScheduler": (
        "dpmpp",
        {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "thresholding": False,
            "final_sigmas_type": "zero",
        },
    ),
}


@dataclass(frozen=True, repr=False)
class FromPipeline(Wan):
    """A `Wan` with its pipeline's steps, until a preset names another solver or shift."""

    scheduler: Any = None  # a copy of the pipeline's

    def schedule(self) -> Schedule:
        if (self.preset.solver, self.preset.shift) != stated(self.scheduler):
            return super().schedule()
        theirs = copy.deepcopy(self.scheduler)
        theirs.set_timesteps(self.preset.steps)
        return Schedule(
            self.preset.solver, tuple(theirs.timesteps.tolist()), tuple(theirs.sigmas.tolist())
        )


@undisturbed()
def from_pipeline(pipe: Any, variant: str | None = None) -> FromPipeline:
    """See `minicos.from_diffusers`."""
    transformers = {"high": pipe.transformer}
    if pipe.config.boundary_ratio is not None:  # otherwise the pipeline never calls the second one
        transformers["low"] = pipe.transformer_2
    parts = {**transformers, "vae": pipe.vae, "text": pipe.text_encoder}
    if pipe.transformer is not None and pipe.transformer.config.image_dim is not None:
        parts["clip"] = pipe.image_encoder
    device = _check(pipe, parts)
    official = {name: _official(network) for name, network in parts.items()}
    shapes = {k: tuple(x.shape) for k, x in official["high"].items()}
    found = variants.Evidence(
        type(pipe).__name__, architecture(shapes), (*transformers,), whole=True
    )
    name, notes = variants.resolve(found, variant)
    preset = _preset(pipe, name)
    cfg = variants.configure(name, found.shapes, dict(pipe.transformer.config), found.where)
    ops = operations(device)
    stream = residual_dtype(preset, pipe.transformer.dtype)
    with torch.device("meta"):
        experts = {key: DiT(cfg, ops, stream) for key in transformers}
        vae, text = VAE(_vae_config(pipe.vae)), TextEncoder(_text_config(pipe, cfg.text_len))

    def policy(name: str) -> torch.dtype:
        wide = any(part in name for part in FLOAT32)
        return torch.float32 if wide else pipe.transformer.dtype

    return FromPipeline(
        name,
        preset,
        {key: _filled(dit, official[key], policy) for key, dit in experts.items()},
        _filled(vae, official["vae"], lambda name: torch.float32),
        _filled(text, official["text"], lambda name: pipe.text_encoder.dtype),
        _tokenizer(pipe.tokenizer, cfg.text_len),
        Residency(Plan("resident", device, ())),
        fingerprint(official),
        _clip(pipe.image_encoder, official["clip"]) if "clip" in parts else None,
        notes=notes,
        scheduler=copy.deepcopy(pipe.scheduler),
    )


def stated(scheduler: Any) -> tuple[str, float]:
    """Solver and shift of a scheduler. Raises MinicosError if no solver of minicos makes the same
    steps.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    solver, needed = SOLVERS.get(kind, ("", {}))
    other = [k for k, value in needed.items() if config.get(k, value) != value]
    if not solver or other:
        what = f"{kind} with {other[0]} {config[other[0]]!r}" if other else kind
        raise MinicosError(
            f"the pipeline steps by {what}, as no solver of minicos does: set pipe.scheduler to a "
            "UniPCMultistepScheduler as Wan's repositories have it, or a "
            "FlowMatchEulerDiscreteScheduler"
        )
    return solver, float(config.get("flow_shift" if solver != "euler" else "shift"))


def _preset(pipe: Any, variant: str) -> Preset:
    """The variant's default preset, with the sampling settings of the pipeline's parts."""
    solver, shift = stated(pipe.scheduler)
    image = "none"
    if type(pipe).__name__ == "WanImageToVideoPipeline":
        both = pipe.transformer.config.pos_embed_seq_len is not None
        image = "first and last" if both else "channels"
        image = "imposed" if pipe.config.expand_timesteps else image
    boundary = pipe.config.boundary_ratio
    changes = {"solver": solver, "shift": shift, "image": image, "boundary": boundary, "area": None}
    return get_preset(variant).changed(**changes)


def _check(pipe: Any, parts: Mapping[str, Any]) -> torch.device:
    """The device of all parts. Raises MinicosError if a part cannot be shared in place."""
    attributes = {
        "high": "transformer",
        "low": "transformer_2",
        "vae": "vae",
        "text": "text_encoder",
        "clip": "image_encoder",
    }
    devices = {}
    for name, network in parts.items():
        where = f"{type(pipe).__name__}.{attributes[name]}"
        if network is None:
            raise MinicosError(f"{where} is None, and minicos needs it: load it with the pipeline")
        if getattr(network, "peft_config", None):
            raise MinicosError(
                f"{where} has a LoRA in addition to its weights: call pipe.fuse_lora() and "
                "pipe.unload_lora_weights() first"
            )
        kinds = {x.dtype for x in network.parameters()}
        narrow = {torch.float16} if name == "clip" else set()
        if other := kinds - {torch.float32, torch.bfloat16} - narrow:
            raise MinicosError(
                f"{where} holds {other.pop()}: load the pipeline with torch_dtype=torch.bfloat16 "
                "or float32, without quantisation"
            )
        devices[where] = {x.device for x in network.parameters()}
    every = set().union(*devices.values())
    if len(every) > 1 or torch.device("meta") in every or getattr(pipe, "_all_hooks", None):
        raise MinicosError(
            "the pipeline is offloaded or lies on several devices: call pipe.remove_all_hooks() "
            "and pipe.to(device), or let minicos.load place the weights (residency)"
        )
    if pipe.tokenizer is None:
        raise MinicosError(f"{type(pipe).__name__}.tokenizer is None: load it with the pipeline")
    return every.pop()


def _official(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network under official names; no copies."""
    state = network.state_dict()
    rename = renamer(state)
    return {rename(name): state[key] for key, name in weights(state).items()}


def _filled(network: N, tensors: Mapping[str, Tensor], dtype: Callable[[str], torch.dtype]) -> N:
    """The network with exactly these tensors, except for those that it needs in another dtype."""
    given = {name: x.to(dtype(name)) for name, x in tensors.items()}  # same tensor if dtypes agree
    try:
        network.load_state_dict(given, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise MinicosError(
            f"the pipeline's {type(network).__name__} is another: {reason}"
        ) from None
    return network.requires_grad_(False).eval()


def _vae_config(vae: Any) -> VAEConfig:
    given = vae.config
    return VAEConfig(
        dim=given.base_dim,
        z_dim=given.z_dim,
        dim_mult=tuple(given.dim_mult),
        num_res_blocks=given.num_res_blocks,
        temporal_downsample=tuple(given.temperal_downsample),
        dec_dim=given.get("decoder_base_dim"),
        patch_size=given.get("patch_size") or 1,
        stage_shortcuts=bool(given.get("is_residual")),
        mean=tuple(given.latents_mean),
        std=tuple(given.latents_std),
    )


def _text_config(pipe: Any, text_len: int) -> TextConfig:
    given = pipe.text_encoder.config
    return TextConfig(
        vocab_size=given.vocab_size,
        dim=given.d_model,
        dim_attn=given.d_kv * given.num_heads,
        dim_ffn=given.d_ff,
        num_heads=given.num_heads,
        num_layers=given.num_layers,
        num_buckets=given.relative_attention_num_buckets,
        text_len=text_len,
    )


def _tokenizer(theirs: Any, text_len: int) -> Tokenizer:
    """The vocabulary of a transformers tokenizer; padding and truncation are ours."""
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise MinicosError("pipe.tokenizer is a slow one: load AutoTokenizer(..., use_fast=True)")
    vocabulary = tokenizers.Tokenizer.from_str(backend.to_str())
    vocabulary.no_truncation()
    vocabulary.no_padding()
    if vocabulary.encode("").ids != [EOS]:
        raise MinicosError(f"pipe.tokenizer does not end a prompt with token {EOS}, as umt5-xxl's")
    return Tokenizer(vocabulary, text_len)


def _clip(encoder: Any, tensors: Mapping[str, Tensor]) -> CLIP:
    """The image encoder with q, k and v as the rows of one matrix: a copy."""
    given = encoder.config
    cfg = CLIPConfig(
        image_size=given.image_size,
        patch_size=given.patch_size,
        dim=given.hidden_size,
        num_heads=given.num_attention_heads,
        num_layers=given.num_hidden_layers,
    )
    with torch.device("meta"):
        clip = CLIP(cfg)
    shapes = {name: x.shape for name, x in clip.state_dict().items()}
    joined = {
        name: torch.cat([tensors[name.replace("to_qkv", f"to_qkv.{i}")] for i in range(3)])
        if "to_qkv" in name
        else tensors[name].view(shape)
        for name, shape in shapes.items()
    }
    return _filled(clip, joined, lambda name: encoder.dtype)


def fingerprint(networks: Mapping[str, Mapping[str, Tensor]]) -> str:
    """A fingerprint of the weights: a hash of some numbers of every tensor."""
    digest = sha256()
    for part, name, x in _tensors(networks):
        some = x.detach().reshape(-1)[:: max(1, x.numel() // 64)]
        digest.update(f"{part}.{name}{tuple(x.shape)}{x.dtype}".encode())
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensors(networks: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, str, Tensor]]:
    for part, tensors in networks.items():
        for name in sorted(tensors):
            yield part, name, tensors[name]
