"""How much memory a VAE of diffusers takes to decode, found without computing anything."""

from collections.abc import Mapping
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def peak(vae: Any, latent: Tensor) -> int:
    """The most bytes that `vae` holds beside its weights while it decodes; both are on the meta
    device, so that nothing is computed. Workspaces of convolutions come on top.
    """
    time = torch.zeros(1) if vae.config.get("timestep_conditioning") else None
    with torch.no_grad(), _Held() as held:
        vae.decode(latent) if time is None else vae.decode(latent, time)
    return held.peak


class _Held(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self._hold(x.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
