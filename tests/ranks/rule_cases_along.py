"""What works along a dim: scans, norms, transforms, moments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_case import Cases, b, constant, f, i, ties, unit

aten = torch.ops.aten
CASES = Cases()
add = CASES.add


def holed(x):
    """With a nan here and there, and no gradient into them."""
    return torch.where(x > 0.4, x, float("nan"))


# scans
add("cumsum first", lambda x: x.cumsum(0).sin(), f(7, 2))
add("cumsum of a few", lambda x: x.cumsum(0).sin(), f(4, 2))
add("cumsum ints", lambda x: x.cumsum(0), i(9, 7, 2))
add("cumsum bools", lambda x: (x.cumsum(0), (x * 1).cumsum(0, dtype=torch.int32)), b(7, 2))
add("cumsum halves", lambda x: x.bfloat16().cumsum(0).float(), f(7, 2), tol=0.02)
add("cumsum of a slice", lambda x: x[2::2].cumsum(0).sin(), f(11, 2))
add("cumsum flipped", lambda x: x.flip(0).cumsum(0).flip(0) * x, f(7, 2))
add("cumsum merged", lambda x: x.reshape(10, 2).cumsum(0).sin(), f(5, 2, 2))
add("cumsum merged outer", lambda x: x.reshape(10, 2).cumsum(0).sin(), f(2, 5, 2))
add("cumprod first", lambda x: x.cumprod(0), f(7, 2))
add("cumprod zeros", lambda x: x.cumprod(0), ties(2, 7, 2))
add("logcumsumexp first", lambda x: x.logcumsumexp(0), f(7, 2))
add("causal mean", lambda x: x.cumsum(0) / torch.arange(1, 8, dtype=x.dtype)[:, None], f(7, 2))
add("cummin", lambda x: x.cummin(1), f(4, 5))
add("kthvalue", lambda x: x.kthvalue(2, 1), f(4, 5))
add("mode", lambda x: x.mode(1), f(4, 5))
add("nanmedian.dim", lambda x: x.nanmedian(1, keepdim=True), f(4, 5))

# sums without what is no number, products, quantiles
add("nansum", lambda x: holed(x).nansum(0), unit(5, 4))
add("nansum all", lambda x: holed(x).nansum(), unit(5, 4))
add("nanmean", lambda x: holed(x).nanmean(0, keepdim=True), unit(7, 4))
add("nanmean all", lambda x: holed(x).nanmean(), unit(5, 4))
add("prod first", lambda x: x.prod(0), f(7, 2))
add("prod zeros", lambda x: (x.prod(0), x.prod(), x.prod(0, keepdim=True)), ties(3, 4, 2))
add("quantile", lambda x, q: x.quantile(q, 1), f(4, 5), unit(3))
add("quantile scalar", lambda x: x.quantile(0.3, -1, keepdim=True), f(4, 5))
add("nanquantile", lambda x, q: holed(x).nanquantile(q, 0), constant(5, 4), constant(2))
add("nanquantile scalar", lambda x: holed(x).nanquantile(0.3, 1), constant(4, 5))

# norms
add("norm first", lambda x: torch.linalg.vector_norm(x, dim=0), f(7, 2))
add("norm of zeros", lambda x: torch.linalg.vector_norm(x * 0, dim=0) + (x * 0).norm(), f(7, 2))
add("norm 1", lambda x: torch.linalg.vector_norm(x, 1, dim=0, keepdim=True), f(7, 2))
add("norm 3", lambda x: torch.linalg.vector_norm(x, 3, dim=(0, 1)), f(7, 2))
add("norm inf", lambda x: torch.linalg.vector_norm(x - 1, float("inf"), dim=0), ties(3, 7, 2))
add("norm -inf", lambda x: torch.linalg.vector_norm(x - 1, -float("inf"), dim=0), ties(4, 4, 2))
add("norm 0", lambda x: torch.linalg.vector_norm(x, 0, dim=0), f(7, 2))
add("normalized", lambda x: F.normalize(x, dim=0), f(7, 2))
add("cosine_similarity first", lambda x, y: F.cosine_similarity(x, y, dim=0), f(5, 4), f(5, 4))
add(
    "cosine_similarity small",
    lambda x, y: F.cosine_similarity(x * 1e-9, y, dim=-1),
    f(4, 3),
    f(4, 3),
)
add(
    "cosine_similarity broadcast",
    lambda x, y: F.cosine_similarity(x[:, None], y, dim=-1),
    f(4, 3),
    f(5, 3),
)
add(
    "layer_norm of all",
    lambda x, w, c: F.layer_norm(x, x.shape[1:], w, c),
    f(2, 5, 4),
    f(5, 4),
    f(5, 4),
)
add("layer_norm bare", lambda x: F.layer_norm(x, (5,)), f(2, 5))
add("rms_norm of all", lambda x, w: F.rms_norm(x, x.shape[1:], w), f(2, 5, 4), f(5, 4))
add("rms_norm bare", lambda x: F.rms_norm(x, (5,), eps=1e-3), f(2, 5))


# complex numbers
def rotated(x, t):
    turn = torch.polar(torch.ones_like(t), t)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


add("complex rope", rotated, f(2, 5, 4), constant(5, 2))
add("view_as_complex", lambda x: torch.view_as_real(torch.view_as_complex(x).conj() * 2), f(5, 2))
add("complex", lambda x, y: torch.complex(x, y).abs(), f(5, 2), f(5, 2))
add(
    "real and imag",
    lambda x: (torch.view_as_complex(x).real, torch.view_as_complex(x).imag),
    f(5, 2),
)
add("resolve_conj", lambda x: torch.view_as_complex(x).conj().resolve_conj().imag, f(5, 2))

# transforms
add("fft", lambda x: torch.fft.fft(x, dim=1).abs(), f(4, 5))
add("fft longer", lambda x: torch.fft.fft(x, n=8, dim=-1).abs(), f(4, 5))
add("ifft", lambda x: torch.fft.ifft(torch.view_as_complex(x), dim=0).abs(), f(5, 4, 2))
add("rfft and back", lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1) ** 2, n=5, dim=1), f(4, 5))
add("fft2", lambda x: torch.fft.fft2(x).real, f(4, 3, 5))
add("rfftn", lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(1, 2)), dim=(1, 2)), f(4, 3, 4))

# distances
add("cdist", torch.cdist, f(2, 5, 4), f(2, 7, 4))
add("cdist 1", lambda x, y: torch.cdist(x, y, p=1), f(5, 4), f(7, 4))
add("cdist broadcast", lambda x, y: torch.cdist(x, y), f(3, 5, 4), f(7, 4))
add("bucketize.Tensor", lambda x, v: torch.bucketize(x.clone(), v.sort()[0]), f(5, 4), constant(3))
add("searchsorted", lambda v, x: torch.searchsorted(v.sort()[0], x.clone()), constant(3), f(5, 4))
add("searchsorted.Tensor", lambda v, x: torch.searchsorted(v.sort()[0], x), f(3, 5), f(3, 4))

# ends
add("flip halves", lambda x: (x.flip(0) * x).sin(), f(7, 2))
add("flip all", lambda x: x.flip(0, 1).sin(), f(7, 4))
add("flip merged", lambda x: x.reshape(10, 2).flip(0) * x.reshape(10, 2), f(2, 5, 2))
add("pad reflect 2d", lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect").sin(), f(1, 1, 5, 4))
add("pad replicate 2d", lambda x: F.pad(x, (0, 2, 3, 1), mode="replicate").sin(), f(1, 1, 5, 4))
add("pad circular 2d", lambda x: F.pad(x, (1, 0, 2, 4), mode="circular").sin(), f(1, 1, 5, 4))
add("pad replicate and add", lambda x: F.pad(x, (2, 0), mode="replicate")[..., :-2] * x, f(1, 2, 5))
add("pad reflect and fold", lambda x: F.pad(x, (3, 1), mode="reflect").sum(-1), f(1, 2, 5))
add("view split uneven", lambda x: x.view(2, 3, 4, 2).mean(2).sin(), f(2, 12, 2))
add(
    "unpatchify",
    lambda x: x.view(2, 2, 3, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 4, 6).sin(),
    f(2, 6, 16),
)
