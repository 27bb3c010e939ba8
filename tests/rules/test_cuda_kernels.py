"""What is around the CUDA kernels, without CUDA: layouts, padding, windows, biases, conventions.

Stand-ins with the kernels' signatures and conventions take the place of ATen's ops and of the
flash_attn packages, and the checks of ``gpu/check_kernels.py`` are run on them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gpu import check_masks
from gpu.check_kernels import CHECKS, Check, cell, errors, exact, mask_of, plain
from torch import Tensor

from mosaic.api.errors import UnsupportedError
from mosaic.attention import kernels
from mosaic.attention.blocks import FULL, Band, Piece
from mosaic.attention.kernels import aten, efficient, flash_attn, flash_masks, flex, measured, short
from mosaic.attention.kernels import calibrate as calibrate_module
from mosaic.attention.kernels.calibrate import POINTS, calibrate
from mosaic.attention.kernels.math import MATH
from mosaic.attention.kernels.measured import BACKWARD, FORWARD, Point
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.strategy import LOCAL
from mosaic.attention.structure import Structure, of_keys
from mosaic.attention.visit import Inputs, visit
from mosaic.layout import Layout

NAMES = ("flash_attn 4", "cudnn", "flash", "efficient")


def options(q, k, left=None, right=None, bias=None, scale=1.0, cap=0.0) -> dict:
    ahead = k.shape[2] - q.shape[2]
    band = (None if left is None else ahead - left, None if right is None else ahead + right)
    scores = Structure(f"float32: tanh(%0); mul.Tensor(%1, {cap})", ()) if cap else None
    rest = {"scale": scale, "keep": None, "shift": None, "scores": scores}
    return {"band": band, "mask": bias, **rest}


def run(q, k, v, **sides) -> tuple[Tensor, Tensor]:
    out, lse = MATH.forward(q, k, v, **options(q, k, **sides))
    return out.to(q.dtype), lse


def run_back(dout, q, k, v, out, lse, need=False, **sides) -> list[Tensor | None]:
    assert all(x.dtype == q.dtype for x in (dout, k, v, out)) and lse.is_contiguous()
    grads = MATH.backward(dout, q, k, v, out, lse, **options(q, k, **sides), need_dmask=need)
    return [None if grad is None else grad.to(q.dtype) for grad in grads[:4]]


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


def launch(name, tensors, seen, scale, band) -> None:
    """In place of the Triton kernels."""
    q, k, v, out, lse = (tensors[name] for name in ("q", "k", "v", "out", "lse"))
    assert max(q.shape[2], k.shape[2]) <= (32 if q.dtype == torch.float32 else 128)
    given = {"band": band, "mask": seen, "scale": scale, "keep": None, "shift": None}
    if name == "forward":
        found, into = MATH.forward(q, k, v, **given), (out, lse)
    else:
        assert lse.is_contiguous()
        grads = MATH.backward(tensors["dout"], q, k, v, out, lse, **given, need_dmask=False)
        found, into = grads[:3], [tensors[name] for name in ("dq", "dk", "dv")]
    for place, x in zip(into, found, strict=True):
        place.copy_(x)


def options_of(q, k, leaves, program, scale, way) -> dict:
    """In place of blocks and a function of a pair: the mask."""
    assert flash_masks.reads(program, [leaf.dtype for leaf in leaves]) and way in (0, 1)
    mask = Structure(program, tuple(leaves)).tile(Piece(0, q.shape[2], 0, k.shape[2]))
    return {"softmax_scale": scale, "mask": mask}


def keys_of(used: Tensor, k: Tensor) -> Tensor:
    return (torch.arange(k.shape[1]) < used[:, None])[:, None, None]


def package(name: str) -> SimpleNamespace:
    assert name == "flash_attn.cute.interface"

    def sides(
        softmax_scale, causal=False, window_size_left=None, window_size_right=None, score_mod=0.0
    ) -> dict:
        assert -1 not in (window_size_left, window_size_right)
        bounds = sides_of(causal, window_size_left, window_size_right)
        return {"scale": softmax_scale, "cap": score_mod, **bounds}

    def forward(q, k, v, return_lse, seqused_k=None, mask=None, **given):
        mask = mask if seqused_k is None else keys_of(seqused_k, k)
        out, lse = run(*swap(q, k, v), **sides(**given), bias=mask)
        if seqused_k is not None:  # what the package says then is not known
            out[seqused_k == 0] = lse[seqused_k == 0] = float("nan")
        return out.transpose(1, 2), lse, None, None

    def backward(
        q, k, v, out, dout, lse, dq, dk, dv, seqused_k=None, mask=None, score_mod_bwd=0.0, **given
    ):
        assert score_mod_bwd == given.get("score_mod", 0.0)
        assert q.shape[-1] % 32 == v.shape[-1] % 32 == 0  # others: wrong, silently, on Hopper
        mask = mask if seqused_k is None else keys_of(seqused_k, k)
        grads = run_back(*swap(dout, q, k, v, out), lse, **sides(**given), bias=mask)[:3]
        for into, grad in zip((dq, dk, dv), swap(*grads), strict=True):
            into.copy_(grad)

    return SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)


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
    monkeypatch.setattr(flash_attn, "_installed", lambda: True)
    monkeypatch.setattr(flash_attn, "import_module", package)
    monkeypatch.setattr(flash_attn, "cap_mods", lambda cap: (cap, cap))
    monkeypatch.setattr(flash_masks, "options_of", options_of)
    monkeypatch.setattr(short, "launch", launch)
    for module in (flex, short):
        monkeypatch.setattr(module, "find_spec", lambda name: name)


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
    for name in ("short", "short float32", *NAMES):
        text, problem = cell(check, name, mask, want, base)
        assert not problem
        done += [name] if text != "-" else []
    assert "efficient" in done and (check.mask or "flash" in done or full == torch.float32)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("check", check_masks.CHECKS, ids=lambda check: check.name)
def test_stand_ins_with_structure_are_right(check: check_masks.Check) -> None:
    """On three simulated ranks: those that read a mask of keys, and those that read any."""
    check, device = replace(check, tokens=min(45, check.tokens)), torch.device("cpu")
    _, found = check_masks.tried(check, check_masks.STRUCTURED[:-1], device)
    assert [problem for _, problem in found.values() if problem] == []
    done = [name for name, (text, _) in found.items() if text != "-"]
    half, by_pairs = check.dtype != torch.float32, check.band != FULL or check.documents
    is_band = not (check.mask or check.documents)
    by_keys = check.mask in ("padding", "nothing") and (not by_pairs or check.tokens == 3)
    assert ("flash_attn 4, seen keys" in done) == (half and by_keys)
    has_bias = check.mask in check_masks.BIASES
    by_masks = max(check.dim, check.v_dim) <= 128 and check.mask != "distances" and not has_bias
    assert ("flash_attn 4, masks" in done) == (half and by_masks)
    assert ("flash_attn 4" in done) == is_band
    assert ("tiles" in done) == has_bias


@pytest.mark.usefixtures("hopper")
def test_the_table_is_read_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(dtype=torch.bfloat16, dim=80, mask=None, dropout=False) -> str:
        q = torch.zeros(1, 1, 3, dim, dtype=dtype)
        case = kernels.Case.of(q, q, q, None if mask is None else q.to(mask), dropout)
        return next(kernel.name for kernel in kernels.KERNELS if kernel.fits(case))

    assert first() == first(dim=256) == "flash_attn 4"
    assert (first(dim=64), first(torch.float32, 64)) == ("short", "short float32")
    assert (
        first(mask=torch.bool) == first(mask=torch.bfloat16) == first(torch.float32) == "efficient"
    )
    assert first(mask=torch.float32) == first(dropout=True) == first(torch.float64) == "math"
    monkeypatch.setattr(flash_attn, "_installed", lambda: False)
    assert (first(), first(dim=256), first(dim=260)) == ("cudnn", "flash", "efficient")


MEASURED = {
    Point(16, 32, 11, 11, 1024, ""): {"short": (1.0, 3.0), "efficient": (2.0, 2.0)},
    Point(16, 32, 128, 128, 64, ""): {
        "short": (9.0, 9.0),
        "cudnn": (1.0, 4.0),
        "flash": (2.0, 3.0),
    },
    Point(16, 128, 4096, 4096, 64, "window"): {"flash": (3.0, 3.0), "flex": (2.0, 3.0)},
    Point(16, 64, 1024, 1024, 64, "window"): {"flash": (2.0, 3.0), "flex": (3.0, 3.0)},
}


def chosen(q: Tensor, band=(None, None), mask=None) -> tuple[str, str]:
    case, piece = kernels.Case.of(q, q, q, mask, False), kernels._piece(q, q, band)
    forward, backward = (kernels._choose(case, piece, way).name for way in (FORWARD, BACKWARD))
    return forward, backward


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("dtype", "length", "names"),
    [
        (torch.bfloat16, 3, ("short", "efficient")),
        (torch.float16, 20, ("short", "efficient")),
        (torch.bfloat16, 90, ("cudnn", "flash")),
        (torch.bfloat16, 5000, ("cudnn", "flash")),
        (torch.float32, 11, ("short float32", "short float32")),
        (torch.float64, 11, ("math", "math")),
    ],
)
def test_the_nearest_that_was_measured_says(monkeypatch, dtype, length, names) -> None:
    """For forward and for backward; what was not measured (numbers of 32 bits) goes in order."""
    monkeypatch.setattr(measured, "table", lambda device: MEASURED)
    assert chosen(torch.zeros(8, 16, length, 24, dtype=dtype)) == names


@pytest.mark.usefixtures("hopper")
def test_a_mask_goes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "table", lambda device: MEASURED)
    q = torch.zeros(1, 1, 11, 24, dtype=torch.bfloat16)
    assert chosen(q, mask=q > 0) == ("efficient", "efficient")
    assert chosen(q, mask=of_keys(q[:, :, :1, :11] > 0)) == ("short", "short")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("length", "dim", "names"),
    [(4096, 128, ["flex"]), (1024, 64, []), (4096, 8, [])],
)
def test_a_window_may_be_a_structure(monkeypatch, length: int, dim: int, names: list) -> None:
    """Where flex was quicker than what knows bands; it does no heads of 8."""
    monkeypatch.setattr(measured, "table", lambda device: MEASURED)
    monkeypatch.setattr(flash_attn, "_installed", lambda: False)
    q = torch.zeros(1, 1, length, dim, dtype=torch.bfloat16)
    layout = Layout.zigzag(length, 1)
    plan = AttentionPlan(LOCAL, 0, "", layout, layout, Band(63, 0), 1.0)
    found = visit(plan, layout.ranks[0], layout.ranks[0], q, Inputs())
    ((piece, options), *_) = found.calls(q, q, q)
    assert [options["mask"] is not None, piece.band == FULL] == [bool(names)] * 2


@pytest.mark.usefixtures("hopper")
def test_what_was_measured_is_in_the_table() -> None:
    for device in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "another"):
        named = {name for times in measured.table(device).values() for name in times}
        assert named <= {kernel.name for kernel in kernels.KERNELS}
    point = Point(16, 24, 11, 11, 200_000, "")
    assert measured.table("NVIDIA H100 PCIe")[point]["cudnn"] == (3.34, 5.27)


def test_calibrate_says_that_it_needs_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match="torch sees none"):
        calibrate()


def test_calibrate_goes_on_where_it_ended(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a user's own numbers, those are taken; of a file that is broken, its name is said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(calibrate_module, "measured", lambda point: {"short": (1.0, 2.0)})
    monkeypatch.setattr(calibrate_module, "SECONDS", 0.0)
    said: list[str] = []
    calibrate(said.append)
    assert said[0].startswith(f"{len(POINTS)} of {len(POINTS)} are left")
    monkeypatch.setattr(calibrate_module, "SECONDS", 60.0)
    calibrate(said.append)
    path = measured.path_of("NVIDIA H200")
    assert path.parent == tmp_path / "mosaic" and set(measured.read(path)) == set(POINTS)
    measured.table.cache_clear()
    assert measured.table("NVIDIA H200")[POINTS[0]]["short"] == (1.0, 2.0)
    measured.table.cache_clear()
    path.write_text("[[1, 2]")
    with pytest.raises(UnsupportedError, match=re.escape(path.name)):
        measured.read(path)


@pytest.mark.parametrize(
    ("program", "dtypes", "is_read"),
    [
        ("bool: eq.Tensor(%0, %1)", (torch.int64, torch.int64), True),
        ("bool: eq.Tensor(%0, %1)", (torch.float32, torch.int64), False),
        ("bool: ne.Scalar(%0, 0)", (torch.bool,), True),
        ("bool: logical_not(%0); bitwise_or.Tensor(%0, %1)", (torch.bool,), True),
        ("bool: bitwise_not(%0); eq.Scalar(%1, 0)", (torch.int64,), False),
        ("bool: sub.Tensor(%0, %1, alpha=2); le.Scalar(%2, 0)", (torch.int32,) * 2, False),
        ("bool: le.Scalar(%0, 4294967296)", (torch.int64,), False),
        ("bool: remainder.Scalar(%0, 3); eq.Scalar(%1, 0)", (torch.int64,), False),
        ("int64: sub.Tensor(%0, %1)", (torch.int64, torch.int64), False),
        ("", (), False),
    ],
)
def test_what_flash_attention_reads_of_masks(program: str, dtypes: tuple, is_read: bool) -> None:
    assert flash_masks.reads(program, dtypes) == is_read


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
    q = torch.zeros(1, 1, 1000, 40, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="flash_attn 4 is installed, and cannot"):
        kernels.forward(q, q, q, band=(None, None), mask=None, scale=1.0, keep=None)
