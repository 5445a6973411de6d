"""Models that diffusers runs, with minicos's interface: the same loop, hooks and studies.

    import diffusers, minicos
    model = minicos.from_diffusers(diffusers.DiffusionPipeline.from_pretrained(...))

A Wan pipeline becomes a `minicos.Wan` on the weights in memory (wan.py). LTX-2, CogVideoX and
HunyuanVideo remain networks of diffusers, hooked from outside: `Peer` (peer.py) is their common
base, a family defines what differs, and presets.py how each is sampled and whose code that follows.
To add a family, see .github/CONTRIBUTING.md.

Needs the extra `minicos[peers]`. diffusers is imported when a pipeline is opened, not before.
"""
