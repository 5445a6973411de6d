"""The maker of goldens writes what the tests of the peers read."""

from types import SimpleNamespace

import pytest
import torch

from tests import golden, peer_golden, peers

pytest.importorskip("diffusers")


def test_a_golden_is_made_again(tmp_path, monkeypatch):
    name = "cogvideox15"
    found, facts = peers.tensors(name), golden.info(f"peer_{name}")
    peer_golden.write(
        tmp_path,
        name,
        peers.pipeline(name),
        {k.removeprefix("given."): v for k, v in found.items() if k.startswith("given.")},
        {"blocks.0": ("transformer_blocks.0", 0), "blocks.0.text": ("transformer_blocks.0", 1)},
        size=tuple(facts["size"]),
        frames=facts["frames"],
        guidance=facts["guidance"],
        ours=lambda x: x.transpose(1, 2),
        latents=found["loop.x.0"].transpose(1, 2),
        guidance_scale=facts["guidance"],
    )
    kept = {k: found[k] for k in found if not k.startswith("out.") or k.startswith("out.blocks.0")}
    weights = golden.read(f"peer_{name}.weights")
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    made = peers.tensors(name)
    assert set(made) <= set(kept) and "loop.x.4" in made and "out.blocks.0.text" in made
    for key in made:
        assert golden.rel_max(made[key], kept[key]) < 2e-6, key  # as in test_peers.py
    again = golden.read(f"peer_{name}.weights")
    assert all(torch.equal(again[k], weights[k]) for k in weights)
    written = golden.info(f"peer_{name}")
    assert {k: written[k] for k in ("pipeline", "size", "frames", "guidance")} == {
        k: facts[k] for k in ("pipeline", "size", "frames", "guidance")
    }
    for part, config in facts["configs"].items():
        assert config.items() <= written["configs"][part].items()


def test_random_weights_are_exact_in_16_bits():
    network = torch.nn.LayerNorm(8)
    peer_golden.randomise(SimpleNamespace(components={"transformer": network, "scheduler": None}))
    for p in network.parameters():
        assert torch.equal(p, p.half().float())
        assert len(p.unique()) == 8
