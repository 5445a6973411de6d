"""A VAE that encodes every clip once gives what the VAE gives."""

import torch

from minicos import load
from minicos.analysis.tools import encoded
from minicos.analysis.tools.encoded import EncodesOnce
from minicos.vae import VAE


def test_every_clip_is_encoded_once_with_the_same_bits(monkeypatch):
    plain, seen = load("tiny", device="cpu", decode_dtype=torch.bfloat16).vae, []
    vae = EncodesOnce.of(plain)
    posterior = VAE.posterior
    monkeypatch.setattr(VAE, "posterior", lambda *given: seen.append(1) or posterior(*given))
    a, b, c = (torch.rand(3, 3, 5, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1)[
        :, None
    ]
    first = vae.encode(torch.cat([a, b, a]))
    passes = len(seen)
    again = vae.encode(torch.cat([b, c]))
    assert (passes, len(seen)) == (4, 6)  # two chunks of each clip
    assert torch.equal(first, plain.encode(torch.cat([a, b, a])))
    assert torch.equal(again, plain.encode(torch.cat([b, c])))
    assert not torch.equal(vae.encode(a[:, :, :1]), vae.encode(b[:, :, :1]))
    vae.encode(b).zero_()  # what is returned may be changed
    assert torch.equal(vae.encode(b), plain.encode(b))
    monkeypatch.setattr(encoded, "MOST", 1)
    assert torch.equal(vae.encode(-a), plain.encode(-a))  # drops the oldest, keeps the newest
    z = plain.encode(a)
    assert torch.equal(vae.decode(z), plain.decode(z))
    assert {p.dtype for p in vae.decoder.parameters()} == {torch.bfloat16}
