"""The sparse autoencoder's encoder: residual stream in, feature activations out.

    h = (normalise(x) - b_in) @ W_enc + b_enc
    native: relu | Top-K, then relu | JumpReLU, as the SAE was trained          dense: relu(h)

Files are read by sae_formats. Architectures whose encoder is not this equation are run by SAELens itself.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fac_ray.config import ConfigError, SaeConfig
from fac_ray.features.sae_formats import Encoder, Normalisation, read_sae, read_width
from fac_ray.features.sae_origin import Origin
from fac_ray.features.topk import TopKProduct, top_k

Activation = Literal["native", "dense"]


class SparseAutoencoder(nn.Module):
    """An encoder in float32. `k` set: Top-K; `threshold` set: JumpReLU; neither: ReLU."""

    W_enc: Tensor
    b_enc: Tensor
    b_in: Tensor
    threshold: Tensor | None

    def __init__(
        self,
        W_enc: Float[Tensor, "d_model d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        b_in: Float[Tensor, " d_model"],
        k: int | None = None,
        threshold: Float[Tensor, " d_sae"] | None = None,
        normalisation: Normalisation = "none",
        origin: Origin | None = None,
    ) -> None:
        """`b_in` is subtracted from the input before `W_enc`: b_dec, or zeros if the SAE was trained without."""
        super().__init__()
        self.d_model, self.d_sae = W_enc.shape
        self.k, self.normalisation, self.origin = k, normalisation, origin or Origin()
        self._product: TopKProduct | None = None
        for name, value in {"W_enc": W_enc, "b_enc": b_enc, "b_in": b_in, "threshold": threshold}.items():
            self.register_buffer(name, None if value is None else value.detach().float().contiguous())

    @torch.inference_mode()
    def encode(self, x: Float[Tensor, "N d_model"], activation: Activation) -> Float[Tensor, "N d_sae"]:
        """Feature activations, all >= 0: what the SAE outputs (`native`) or ReLU of all pre-activations (`dense`)."""
        h = self._pre_activations(x)
        if activation == "native" and self.k is not None:
            values, feature_ids = top_k(h, self.k)
            return torch.zeros_like(h).scatter_(-1, feature_ids, values.relu_())
        if activation == "native" and self.threshold is not None:
            h.masked_fill_(h <= self.threshold, 0)
        return h.relu_()

    @torch.inference_mode()
    def top_k(self, x: Float[Tensor, "N d_model"]) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
        """(activations, feature ids) of the k largest pre-activations, ReLU applied: `encode` native without its zeros.

        Only where `k` is set.
        """
        assert self.k is not None
        if self._product is None and TopKProduct.pays(self.W_enc, self.k):
            self._product = TopKProduct(self.W_enc, self.b_enc, self.k)
            self.W_enc = self._product.by_feature.t()  # the same numbers, so that they lie in memory once
        found = self._product(self._input(x)) if self._product else top_k(self._pre_activations(x), self.k)
        return found[0].relu_(), found[1]

    def _pre_activations(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b_enc, self._input(x), self.W_enc)

    def _input(self, x: Tensor) -> Tensor:
        x = _centred(x.float()) if self.origin.centred else x.float()
        if self.normalisation == "layer_norm":
            x = _centred(x)
            x = x / (x.std(dim=-1, keepdim=True) + 1e-5)
        elif self.normalisation == "constant_norm_rescale":
            x = x * (self.d_model**0.5 / x.norm(dim=-1, keepdim=True))
        return x - self.b_in


class SaeLensAutoencoder(nn.Module):
    """An SAE of another architecture, encoded by SAELens; it has no dense activations."""

    k = None

    def __init__(self, sae: Any, origin: Origin) -> None:
        super().__init__()
        self.sae, self.origin = sae, origin
        self.d_model, self.d_sae = int(sae.cfg.d_in), int(sae.cfg.d_sae)

    @torch.inference_mode()
    def encode(self, x: Float[Tensor, "N d_model"], activation: Activation) -> Float[Tensor, "N d_sae"]:
        """What the SAE outputs, negative activations set to 0.

        Raises:
            ConfigError: `activation` is `dense`.
        """
        if activation == "dense":
            raise ConfigError(
                f"measure.activation 'dense' is not defined for a {self.sae.cfg.architecture()} SAE; use 'native'"
            )
        x = _centred(x.float()) if self.origin.centred else x.float()
        return self.sae.encode(x).relu()


def load_sae(sae: SaeConfig, device: str | torch.device | None = None) -> SparseAutoencoder | SaeLensAutoencoder:
    """The SAE of the config on `device` (None: a GPU if there is one).

    Raises:
        ConfigError: nothing readable is at `sae.path`, or the SAE there does not read a plain residual stream.
    """
    encoder, origin = read_sae(sae.path)
    loaded: SparseAutoencoder | SaeLensAutoencoder
    if isinstance(encoder, Encoder):
        loaded = SparseAutoencoder(*encoder, origin=origin)
    else:
        loaded = SaeLensAutoencoder(encoder, origin)
    return loaded.requires_grad_(False).eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def sae_width(sae: SaeConfig) -> int:
    """Number of features d_sae, without loading the weights where they lie on disk.

    Raises:
        ConfigError: as `load_sae`.
    """
    return read_width(sae.path)


def _centred(x: Float[Tensor, "N d_model"]) -> Float[Tensor, "N d_model"]:
    return x - x.mean(dim=-1, keepdim=True)
