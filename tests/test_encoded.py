"""A VAE that encodes and decodes every clip once gives what the VAE gives."""

import pytest
import torch

from minicos import load
from minicos.analysis.tools import encoded
from minicos.analysis.tools.encoded import CodesOnce
from minicos.errors import MinicosError
from minicos.vae import VAE


def test_every_clip_is_encoded_once_with_the_same_bits(monkeypatch):
    plain, seen = load("tiny", device="cpu", decode_dtype=torch.bfloat16).vae, []
    vae = CodesOnce.of(plain)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_latent_is_decoded_once_with_the_same_bits(dtype, monkeypatch):
    plain, seen = load("tiny", device="cpu", decode_dtype=dtype).vae, []
    vae = CodesOnce.of(plain)
    forward = type(vae.decoder).forward
    draw = torch.Generator().manual_seed(3)
    a, b, c = torch.randn(3, 1, 16, 4, 2, 2, generator=draw)
    batch, expected = torch.cat([a, b, a]), plain.decode(torch.cat([a, b, a]))
    monkeypatch.setattr(
        type(vae.decoder), "forward", lambda *given: seen.append(1) or forward(*given)
    )
    assert torch.equal(vae.decode(batch), expected)
    passes = len(seen)
    assert torch.equal(vae.decode(torch.cat([b, a])), expected[1:])
    pieces = vae.stream(a)
    next(pieces).zero_()  # what is returned may be changed
    assert torch.equal(vae.decode(a), expected[:1])
    assert len(seen) == passes > 0
    assert not torch.equal(vae.decode(c), expected[:1])
    assert len(seen) == 1.5 * passes  # a third latent after two
    assert torch.equal(vae.decode(a, chunk=1), plain.decode(a, chunk=1))  # not what was kept
    monkeypatch.setattr(encoded, "MOST_VIDEOS", 1)
    assert torch.equal(vae.decode(b + 1), plain.decode(b + 1))
    with pytest.raises(MinicosError, match="chunk must be 1 or more"):
        vae.stream(a, chunk=0)
