"""Models that diffusers runs, behind minicos' contract: the same loop, hooks and studies.

import diffusers, minicos
model = minicos.from_diffusers(diffusers.DiffusionPipeline.from_pretrained(...))

A Wan pipeline becomes a `minicos.Wan` on the very weights that are in memory (wan.py). LTX-2,
CogVideoX and HunyuanVideo stay diffusers' networks, watched from outside: `Peer` (peer.py) is what
they share, a family says what differs, and presets.py how each is sampled and whose way that is.
How to add a family: .github/CONTRIBUTING.md.

Needs the extra `minicos[peers]`. diffusers is imported when a pipeline is opened, not before.
"""
