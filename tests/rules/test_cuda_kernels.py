"""What is around the CUDA kernels, without CUDA: layouts, padding, windows, biases, conventions.

Stand-ins with the kernels' signatures and conventions take the place of ATen's ops and of the
flash_attn packages, and the checks of ``gpu/check_kernels.py`` are run on them.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gpu.check_kernels import CHECKS, Check, cell, errors, exact, mask_of, plain
from torch import Tensor

from mosaic.api.errors import UnsupportedError
from mosaic.attention import kernels
from mosaic.attention.kernels import aten, efficient, flash_attn
from mosaic.attention.kernels.math import MATH
from mosaic.attention.kernels.measured import BACKWARD, FORWARD, HALF, SINGLE

NAMES = ("flash_attn 4", "flash_attn 3", "cudnn", "flash", "efficient")


def options(q, k, left=None, right=None, bias=None, scale=1.0) -> dict:
    ahead = k.shape[2] - q.shape[2]
    band = (None if left is None else ahead - left, None if right is None else ahead + right)
    return {"band": band, "mask": bias, "scale": scale, "keep": None, "shift": None}


def run(q, k, v, **sides) -> tuple[Tensor, Tensor]:
    out, lse = MATH.forward(q, k, v, **options(q, k, **sides))
    return out.to(q.dtype), lse


def run_back(dout, q, k, v, out, lse, need=False, **sides) -> list[Tensor | None]:
    assert all(x.dtype == q.dtype for x in (dout, k, v, out)) and lse.is_contiguous()
    grads = MATH.backward(dout, q, k, v, out, lse, **options(q, k, **sides), need_dmask=need)
    return [None if grad is None else grad.to(q.dtype) for grad in grads]


def swap(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def sides_of(causal: bool, left, right) -> dict:
    assert not (causal and left not in (None, -1))
    left, right = (None if side == -1 else side for side in (left, right))
    return {"left": left, "right": 0 if causal else right}


def flash(
    q, k, v, cq, ck, s, t, p, causal, debug, *, scale, window_size_left=None, window_size_right=None
):
    assert (cq, ck, p, debug) == (None, None, 0.0, False) and (s, t) == (q.shape[1], k.shape[1])
    assert q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    sides = sides_of(causal, window_size_left, window_size_right)
    out, lse = run(*swap(q, k, v), scale=scale, **sides)
    return out.transpose(1, 2), lse, None, None, None


def flash_back(
    dout,
    q,
    k,
    v,
    out,
    lse,
    cq,
    ck,
    s,
    t,
    p,
    causal,
    a,
    b,
    *,
    scale,
    window_size_left=None,
    window_size_right=None,
):
    sides = sides_of(causal, window_size_left, window_size_right)
    return swap(*run_back(*swap(dout, q, k, v, out), lse, scale=scale, **sides)[:3])


def cudnn(q, k, v, bias, with_lse, p, causal, debug, *, scale):
    assert bias is None and with_lse and (not causal or q.shape[2] == k.shape[2])
    assert q.shape[-1] % 8 == v.shape[-1] % 8 == 0
    out, lse = run(q, k, v, right=0 if causal else None, scale=scale)
    return out, lse.unsqueeze(-1), None


def cudnn_back(dout, q, k, v, out, lse, a, b, bias, cq, ck, s, t, p, causal, *, scale):
    assert lse.shape == (*q.shape[:3], 1)
    right = 0 if causal else None
    return run_back(dout, q, k, v, out, lse.squeeze(-1), right=right, scale=scale)[:3]


def check_bias(q, k, bias) -> None:
    assert k.shape[1] == q.shape[1] and q.shape[-1] % 8 == 0
    if bias is not None:
        assert bias.dtype == q.dtype and bias.shape == (*q.shape[:3], k.shape[2])
        assert bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in bias.stride()[:3])
        assert bias.isfinite().all()


def memory_efficient(q, k, v, bias, with_lse, p, causal, *, scale):
    check_bias(q, k, bias)
    assert with_lse and (not causal or q.shape[2] == k.shape[2])
    out, lse = run(q, k, v, right=0 if causal else None, bias=bias, scale=scale)
    return out, F.pad(lse, (0, -q.shape[2] % 32), value=7.0), None, None


def memory_efficient_back(dout, q, k, v, bias, out, lse, a, b, p, needed, causal, *, scale):
    check_bias(q, k, bias)
    assert lse.shape[2] % 32 == 0 and not lse.isnan().any()
    sides = {"right": 0 if causal else None, "bias": bias, "scale": scale, "need": needed[3]}
    return run_back(dout, q, k, v, out, lse[:, :, : q.shape[2]].contiguous(), **sides)


def package(version: int) -> SimpleNamespace:
    def sides(softmax_scale, causal, window_size_left, window_size_right) -> dict:
        if version == 4:
            assert -1 not in (window_size_left, window_size_right)
        return {"scale": softmax_scale, **sides_of(causal, window_size_left, window_size_right)}

    def forward(
        q,
        k,
        v,
        dropout_p=0.0,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        return_lse=True,
        **given,
    ):
        out, lse = run(*swap(q, k, v), **sides(**given))
        return out.transpose(1, 2), lse, None, None

    def backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        dropout_p=0.0,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        is_causal=None,
        **given,
    ):
        given = {"causal": is_causal, **given}
        grads = run_back(*swap(dout, q, k, v, out), lse, **sides(**given))[:3]
        for into, grad in zip((dq, dk, dv), swap(*grads), strict=True):
            into.copy_(grad)

    def backward_4(q, k, v, out, dout, lse, **given):
        backward(dout, q, k, v, out, lse, **given)

    if version == 4:
        return SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward_4)
    return SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)


OPS = {
    "_flash_attention_forward": flash,
    "_flash_attention_backward": flash_back,
    "_scaled_dot_product_cudnn_attention": cudnn,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_back,
    "_scaled_dot_product_efficient_attention": memory_efficient,
    "_scaled_dot_product_efficient_attention_backward": memory_efficient_back,
}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU with everything installed."""
    ops = SimpleNamespace(**{name: SimpleNamespace(default=op) for name, op in OPS.items()})
    monkeypatch.setattr(aten, "aten", ops)
    monkeypatch.setattr(efficient, "aten", ops)
    of = kernels.Case.of.__func__
    there = classmethod(lambda cls, *a: of(cls, *a)._replace(device="cuda", capability=9))
    monkeypatch.setattr(kernels.Case, "of", there)
    monkeypatch.setattr(flash_attn, "_installed", lambda version: True)
    versions = {module: version for version, module in flash_attn._MODULES.items()}
    monkeypatch.setattr(flash_attn, "import_module", lambda name: package(versions[name]))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("check", [check for check in CHECKS if not check.compiled], ids=str)
def test_stand_ins_are_right(check: Check) -> None:
    full = (
        torch.bfloat16
        if check.dtype == torch.float32 and "float32" not in check.name
        else check.dtype
    )
    check = replace(check, tokens=min(45, check.tokens), dtype=full)
    mask = mask_of(check)
    want = plain(check, torch.float64, mask, exact)
    base = errors(plain(check, check.dtype, mask, exact), want)
    done = []
    for name in NAMES:
        text, problem = cell(check, name, mask, want, base)
        assert not problem
        done += [name] if text != "-" else []
    assert "efficient" in done and (check.mask or "flash" in done or full == torch.float32)


@pytest.mark.usefixtures("hopper")
def test_the_table_is_read_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(dtype=torch.bfloat16, dim=64, mask=None, dropout=False) -> str:
        q = torch.zeros(1, 1, 3, dim, dtype=dtype)
        case = kernels.Case.of(q, q, q, None if mask is None else q.to(mask), dropout)
        return next(kernel.name for kernel in kernels.KERNELS if kernel.fits(case))

    assert first() == first(dim=256) == "flash_attn 4"
    assert (
        first(mask=torch.bool) == first(mask=torch.bfloat16) == first(torch.float32) == "efficient"
    )
    assert first(mask=torch.float32) == first(dropout=True) == first(torch.float64) == "math"
    monkeypatch.setattr(flash_attn, "_installed", lambda version: False)
    assert (first(), first(dim=256), first(dim=260)) == ("cudnn", "flash", "efficient")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("dtype", "length", "dim", "forward", "backward"),
    [
        (torch.bfloat16, 3, 24, "efficient", "efficient"),
        (torch.bfloat16, 64, 24, "efficient", "efficient"),
        (torch.bfloat16, 65, 24, "cudnn", "cudnn"),
        (torch.bfloat16, 129, 24, "cudnn", "flash_attn 4"),
        (torch.bfloat16, 513, 24, "flash_attn 4", "flash_attn 4"),
        (torch.bfloat16, 11, 64, "flash_attn 4", "flash_attn 4"),
        (torch.float32, 11, 24, "math", "math"),
        (torch.float32, 12, 24, "efficient", "math"),
        (torch.float32, 64, 24, "efficient", "efficient"),
        (torch.float64, 11, 24, "math", "math"),
    ],
)
def test_short_sequences_go_by_what_was_measured(dtype, length, dim, forward, backward) -> None:
    q = torch.zeros(1, 1, length, dim, dtype=dtype)
    case, piece = kernels.Case.of(q, q, q, None, False), kernels._piece(q, q, (None, None))
    chosen = [kernels._choose(case, piece, way).name for way in (FORWARD, BACKWARD)]
    assert chosen == [forward, backward]


@pytest.mark.usefixtures("hopper")
def test_what_was_measured_is_in_the_table() -> None:
    """And a mask, which was not, changes nothing."""
    named = {name for times in (HALF, SINGLE) for row in times.values() for name in row}
    assert named <= {kernel.name for kernel in kernels.KERNELS}
    q = torch.zeros(1, 1, 11, 24)
    case = kernels.Case.of(q, q, q, q > 0, False)
    piece = kernels._piece(q, q, (None, None))
    assert kernels._choose(case, piece, FORWARD).name == "efficient"


@pytest.mark.usefixtures("hopper")
def test_kernels_of_a_gpu_have_a_limit() -> None:
    """Of batches: a grid has no more in its second and third dims."""
    limits = {kernel.name: kernel.most_batches for kernel in kernels.KERNELS}
    assert {limits[name] for name in NAMES} == {65535}
    assert {limits[name] for name in ("math", "cpu flash")} == {None}


@pytest.mark.usefixtures("hopper")
def test_a_package_that_lacks_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise ModuleNotFoundError("No module named 'quack'")

    monkeypatch.setattr(flash_attn, "import_module", fails)
    q = torch.zeros(1, 1, 65, 40, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="flash_attn 4 is installed, and cannot"):
        kernels.forward(q, q, q, band=(None, None), mask=None, scale=1.0, keep=None)
