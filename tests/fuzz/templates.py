"""What random programs are made of: one line is one step, with holes that holes.py fills.

A step ends in an expression; what stands before it, split by `` ;; ``, are statements, in which
``_`` is a name of its own.
"""

# ruff: noqa: E501  (one step, one line)

from __future__ import annotations

POINTWISE = """
F.{relu|gelu|silu|softplus|elu|mish|hardswish|leaky_relu|logsigmoid|tanhshrink|relu6|selu|celu}({x})
{x}.{sin|cos|tanh|sigmoid|abs|square|neg|erf|atan|sign|floor|round|exp2|frac|expm1|asinh|sinc}()
torch.{sin|tanh|exp|sigmoid}({x}.clamp(-2, 2))
({x}.abs() + 0.5).{log1p|sqrt|rsqrt|log|reciprocal}()
{x}.clamp({-1.0|-0.5|None}, {1.0|0.5|0.2})
F.hardtanh({x}, -0.7, 0.7)
F.threshold({x}, 0.1, -1.0)
F.softshrink({x}, 0.2) + F.hardshrink({x}, 0.2)
{x}.{pow(2)|pow(3)|float().double()|nan_to_num()|clone()|contiguous()|detach()|mul(2)|logit(0.1)|clamp_min(0)|clamp_max(0.3)}
{x} {+|-|*} {b}
{b} {+|-|*} {x}
{x} / ({b} * {b} + 0.5)
{x} {+|-|*} {y}
torch.{maximum|minimum|atan2|copysign|hypot|logaddexp|fmax|fmin|sub|dist}({x}, {y})
torch.{where({m}, {x}, {y})|where({x} > {c}, {x}, {b})}
torch.where({m}, {x}, {b})
torch.where({m}, {x}, {c})
torch.lerp({x}, {y}, {c})
torch.addcmul({x}, {y}, {y}, value={c})
torch.addcdiv({x}, {y}, {y}.square() + 1, value={c})
{x}.masked_fill({m}, {c})
{x} * {m}
{x}.masked_fill({m}, 0).masked_fill(~{m}, {c})
{x}.remainder({c}) + {x}.fmod(1.5)
({x} > {b}).{double()|int()|long()|logical_not()}
{x}.to(torch.float32).to(torch.float64)
{x} + torch.{zeros_like|ones_like}({x})
torch.full_like({x}, {c}) - {x}
{x}.new_{zeros|ones}({x}.shape) + {x}
{x}.addcmul({b}, {b})
torch.heaviside({x}, {y})
torch.{xlogy|special.xlog1py}({x}, {y}.abs() + 0.1)
{x}.float().double() * {w:n}.view([-1] + [1] * ({x}.ndim - 1 - {d} % {x}.ndim))
({x} if {x}.shape[{d}] % 2 else -{x})
sum([{x} * i for i in range({k1})], {x})
F.prelu({x}, {w:1})
torch._dynamo.graph_break() ;; {x} * 2
{x} * torch.sigmoid({x} @ {w:E,1})
{x} * torch.cos(torch.arange({n}) * 0.3).view([-1] + [1] * ({x}.ndim - 1 - {d} % {x}.ndim)) + {x}.roll(1, -1)
torch.cat([-{x}[..., {x}.shape[-1] // 2 :], {x}[..., : {x}.shape[-1] // 2]], -1) * torch.arange({n}).sin().view([-1] + [1] * ({x}.ndim - 1 - {d} % {x}.ndim))
{x} * {x}.{size|stride}({d}) if {flag} else {x} / {x}.numel()
"""

REDUCTIONS = """
{x}.{sum|mean|amax|amin|nansum|nanmean|logsumexp|std|var|prod|softmax|log_softmax|cumsum|logcumsumexp|norm}({d})
{x}.{sum|mean|amax|amin|logsumexp|std|var}({dims}, keepdim={keep})
{x}.{sum|mean|amax|amin|std|var|norm|max|min|prod|median|nansum}()
{x}.{argmax|argmin|argsort}({d})
{x}.{max|min|median|sort|cummax|cummin}({d})[0]
{x}.{max|min|median|sort|cummax}({d})[1]
{x}.{var|std}({d}, correction={0|1}, keepdim={keep})
torch.{var_mean|std_mean}({x}, {dims}, keepdim={keep})
torch.aminmax({x}, dim={d}, keepdim={keep})
({x} > {c}).{any|all|sum|count_nonzero}({d})
({x} > {c}).{any|all|sum}({d}, keepdim=True) * {x}
({x} > {c}).cumsum({d})
{x}.count_nonzero({d})
{x}.topk(min({k1}, {n}), dim={d}, largest={keep})[0]
{x}.topk(min({k1}, {n}), {d}).indices
{x}.kthvalue(min({k1}, {n}), {d}).values
{x}.quantile(0.3, dim={d}, keepdim={keep})
torch.linalg.vector_norm({x}, {1|2|3|0|float('inf')|-1.0|0.5}, dim={dims}, keepdim={keep})
torch.linalg.norm({x}, dim={d})
torch.norm({x}, p={1|2|'fro'}, dim={d}, keepdim={keep})
F.normalize({x}, p={1.0|2.0}, dim={d})
{x}.renorm(2, {d}, 1.0)
{x}.{cumsum|cumprod|logcumsumexp}({d})
{x}.flip({d}).cumsum({d}).flip({d})
{x}.diff(dim={d})
{x}.diff(n=2, dim={d}, prepend={x}.narrow({d}, 0, 1))
{x}.trapz(dim={d}) if {flag} else torch.cumulative_trapezoid({x}, dim={d})
{x}.unfold({d}, min({k1}, {n}), {k1}).{mean|amax|sum}(-1)
{x} - {x}.mean({d}, keepdim=True)
({x} - {x}.mean({dims}, keepdim=True)) / ({x}.std({dims}, keepdim=True, correction=0) + 1e-2)
{x}.softmax({d}) * {x}
{x}.sum({d}, dtype=torch.float64) + {x}.mean({d})
{x}.mean().expand({x}.shape)
torch.cdist({x3}, {y}, p={1.0|2.0})
F.cosine_similarity({x}, {y}, dim={d})
F.pairwise_distance({x}, {y})
torch.cov({x2})
torch.corrcoef({x2}).nan_to_num()
torch.trace({x2})
torch.std({x}, {d}, unbiased={flag})
{x}.max() - {x}.min({d}, keepdim=True).values
"""

VIEWS = """
{x}.{view|reshape}({view})
{x}.contiguous().view({view})
{x}.flatten({0|1|-2})
{x}.flatten({k}, -1)
{x}.unflatten({d}, {unf})
{x}.unflatten({d}, {unf}).{mean|sum}({d})
{x}.unflatten({d}, {unf}).transpose({0|1|-2}, -1)
{x}.permute({perm})
{x}.transpose({d}, {d2})
{x}.movedim({d}, {d2})
{x}.mT.contiguous()
{x2}.t()
{x}.{unsqueeze}({d})
{x}.unsqueeze(0).expand({k1}, *{x}.shape)
{x}.squeeze()
{x}.mean({d}, keepdim=True).expand_as({x}) + {x}
{x}.mean({d}, keepdim=True).expand({x}.shape)
{x}.repeat({k1}, *[1] * ({x}.ndim - 1))
{x}.repeat(*[1] * ({x}.ndim - 1), 2)
{x}.tile({k1}, 1)
{x}.repeat_interleave({k1}, {d})
{x}.repeat_interleave(torch.arange({n}) % 3 + 1, {d}, output_size=int((torch.arange({n}) % 3 + 1).sum()))
{x}.chunk({k1}, {d})
{x}.split({k1}, {d})
{x}.split({split}, {d})
torch.tensor_split({x}, {k1}, dim={d})
torch.cat({x}.split({split}, {d})[::-1], {d})
torch.cat([{x}, {y}], {d})
torch.cat([{x}, {y}, {x}.narrow({d}, 0, 1)], {d})
torch.cat([{x}.narrow({d}, 0, {n} // 2), {y}], {d})
torch.cat([{x}, {x}[{at}].mean() + torch.zeros_like({x}).narrow({d}, 0, 1)], dim={d})
torch.stack([{x}, {y}], {d})
torch.stack([{x}, {y}, {x}], {d}).{sum({d})|flatten(0, 1)|unbind({d})[1]|mean(-1)}
torch.stack({x}.unbind({d})[::-1], {d})
torch.stack([t * i for i, t in enumerate({x}.unbind({d}))], {d2})
{x}.unbind({d})
{x}.roll({s}, {d})
{x}.roll(({s}, {s}), ({d}, {d2}))
{x}.flip({d})
{x}.flip(({d}, {d2}))
{x}.rot90(1, ({d}, {d2}))
{x}.{swapaxes}({d}, {d2}).{contiguous()|clone()|reshape(-1)}
{x}.narrow({d}, {n} // 3, {n} - {n} // 3)
{x}.select({d}, {i})
{x}[{at}]
{x}[{at}]
{x}[{ix}]
{x}[{at}] + {x}[{at}]
{x}[..., None, :] - {x}[..., :, None]
{x}.diagonal(dim1={d}, dim2={d2})
torch.diag_embed({x})
{x}.{tril|triu}({s})
F.pad({x}, ({s}, {k}))
F.pad({x}, (0, 0, {s}, {k}), value={c})
F.pad({x3}, ({k}, {k}), mode='{reflect|replicate|circular}')
F.pad({x}.movedim({d}, -1), ({k}, {k}), mode='{constant|replicate|reflect|circular}').movedim(-1, {d})
F.pad({x4}, ({k}, {k}, {k}, 0), mode='{reflect|replicate|circular}')
{x}.unfold({d}, min({k1}, {n}), {k1})
torch.meshgrid({x}.reshape(-1)[:3], {x}.reshape(-1)[:2], indexing='ij')
torch.atleast_3d({x})
torch.{hstack|vstack|dstack|column_stack}([{x}, {y}])
torch.broadcast_tensors({x}, {x}.mean({d}, keepdim=True))
torch.block_diag({x}.reshape({x}.shape[0], -1)[:3], torch.ones(1, 2))
{x}.view_as({x}) + {x}.reshape_as({y})
{x}.T if {x}.ndim == 2 else {x}.mT
{x}.as_strided(({n},), ({x}.stride({d}),), {k})
torch.{kron}({x}.reshape(-1)[:3], {x}.mean({d}))
torch.combinations({x}.reshape(-1)[:4])
torch.cartesian_prod({x}.reshape(-1)[:3], {x}.reshape(-1)[-2:])
{x}.expand(2, *{x}.shape)[:, ..., {i}]
{x}[:, -1:] if {x}.shape[0] > 1 else {x}[-1:]
{x}.{unsafe_chunk|chunk}(2, {d})[0]
torch.channel_shuffle({x4}, 2)
"""

INDEXING = """
{x}.index_select({d}, torch.tensor({list}))
{x}.index_select({d}, {ids:4;n})
{x}.gather({d}, {ids:S;n})
torch.take_along_dim({x}, {x}.argsort({d}), {d})
{x}.gather({d}, {x}.argmax({d}, keepdim=True))
{x}.take({ids:5;B})
torch.take({x}, torch.tensor([0, -1, 2]))
{x}[{ids:5;B}]
{x}[:, {ids:6;C}]
{x}[torch.arange({x}.shape[0])[:, None], {ids:B,3;C}]
{x}[torch.arange({x}.shape[0]), {ids:B;C}]
{x}[torch.arange({x}.shape[0]), {x}.flatten(1).argmax(1) % {x}.shape[1]]
{x}[{list}] if {d} == 0 else {x}[:, torch.arange({x}.shape[1]) // 2]
{x}[:, torch.arange({x}.shape[1]).flip(0)]
{x}.scatter({d}, {ids:S;n}, {c})
{x}.scatter({d}, {ids:S;1}, {y})
torch.zeros_like({x}).scatter_add({d}, {ids:S;n}, {y})
{x}.scatter_add({d}, {ids:S;n}, {y})
{x}.scatter_reduce({d}, {ids:S;n}, {y}, '{sum|mean|amax|prod}', include_self={flag})
{x}.index_add({d}, torch.arange({n}).flip(0), {y}, alpha={c})
{x}.index_add({d}, {ids:n;n}, {y})
{x}.index_copy({d}, torch.arange({n}).roll(1), {y})
{x}.index_fill({d}, torch.tensor({list}), {c})
{x}.index_put(({ids:3;B},), torch.tensor({c}), accumulate={flag})
{x}.index_put((torch.arange({x}.shape[0]), {ids:B;C}), torch.tensor(1.5))
{x}.index_fill(1, {ids:4;C}, {c})
{x}.masked_scatter({m}, {y})
{x}.{select_scatter}({x}.select({d}, 0) * 2, {d}, {i})
{x}.slice_scatter({x}.narrow({d}, 0, 1), {d}, -1)
{x}.slice_scatter({x}.narrow({d}, 0, ({n} + 1) // 2) * 2, {d}, 0, {n}, 2)
{x}.diagonal_scatter({x}.diagonal(dim1={d}, dim2={d2}) * 2, 0, {d}, {d2})
F.one_hot({ids:S;5}, 5).double() * {x}[..., None]
F.embedding({ids:B,C;7}, {w:7,E})
F.embedding({ids:n;n}, {x2})
F.embedding({ids:B,C;7}, {w:7,E}, padding_idx=1)
{mod:nn.Embedding(9, E)}({ids:B,C;9}) + {x}
{mod:nn.Embedding(n, 4)}(torch.arange({n}))
{mod:nn.EmbeddingBag(9, E)}({ids:B,C;9})
torch.bucketize({x}, torch.linspace(-1, 1, 5))
torch.searchsorted(torch.linspace(-1, 1, 5), {x}.contiguous())
{w:9,E}[{x}.abs().long().clamp(max=8)]
{w:n,E}[:{n}] + {x} if {x}.shape[-2:-1] == ({n},) else {x}
{x}[..., {x}.shape[-1] // 2]
{xi}.double() * 0.1
{xi} + 1
{xi}.cumsum({d})
({xi} % 3).double()
{xi}.{sum|argmax|cumsum}({d})
F.one_hot({xi} % 4, 4).sum({d})
{xb}.double()
~{xb}
{xb}.{any|all|sum}({d})
{w:3,E,E}[({x}[..., 0].abs() * 10).long() % 3].mul({x}.unsqueeze(-1)).sum(-2)
torch.zeros(3, {x}.shape[-1]).index_add(0, {ids:n;3}, {x}.movedim({d}, 0).flatten(1)[:, :{x}.shape[-1]])
sum(({x} @ w) * (({x} @ {w:E,3}).argmax(-1, keepdim=True) == i) for i, w in enumerate({w:3,E,E}))
{x}[:, {x}.mean(-1).flatten(1)[0].argsort()[:2]]
torch.isin({xi}, torch.tensor([0, 2]))
{xi}.{bincount(minlength=4)|unique()}
{xi}.where({xi} > 0, -100)
torch.nonzero({x} > 0)
{x}[{m}.expand({x}.shape)]
"""

INPLACE = """
_ = {x}.clone() ;; _[{at}] = {c} ;; _
_ = {x}.clone() ;; _[{at}] *= 2 ;; _
_ = {x}.clone() ;; _[{at}] += {x}[{at}] ;; _
_ = {x} * 1 ;; _[{at}] = _[{at}] * 2 ;; _
_ = {x}.clone() ;; _[{ix}] = {c} ;; _
_ = {x}.clone() ;; _[{m}.expand({x}.shape)] = {c} ;; _
_ = {x}.clone() ;; _[:, {list}] = 0 ;; _
_ = {x}.clone() ;; _.{mul_(2)|add_(1)|relu_()|clamp_(-0.5, 0.5)|neg_()|zero_()|fill_(0.5)|sin_()|tanh_()|exp_()|t_()} ;; _
_ = {x}.clone() ;; _.{add_|mul_|sub_|copy_}({b}) ;; _
_ = {x}.clone() ;; _.masked_fill_({m}, {c}) ;; _
_ = {x}.clone() ;; _.index_add_({d}, torch.arange({n}).flip(0), {y}) ;; _
_ = {x}.clone() ;; _.scatter_({d}, {ids:S;n}, {c}) ;; _
_ = {x}.clone() ;; _.scatter_add_({d}, {ids:S;n}, {y}) ;; _
_ = {x}.clone() ;; _.index_fill_({d}, torch.tensor({list}), {c}) ;; _
_ = {x}.clone() ;; _.select({d}, {i}).{add_(1)|mul_(2)|zero_()} ;; _
_ = {x}.clone() ;; _.narrow({d}, 0, 1).copy_({x}.narrow({d}, {n} - 1, 1)) ;; _
_ = {x}.clone() ;; _.transpose({d}, {d2}).mul_(2) ;; _
_ = {x}.clone() ;; _.view(-1)[{k}:{k1} + 2].zero_() ;; _
_ = {x}.clone() ;; _.diagonal(dim1={d}, dim2={d2}).fill_(0.5) ;; _
_ = {x} + 0 ;; _ += {y} ;; _ *= {c} ;; _
_ = torch.zeros_like({x}) ;; _[{at}] = {x}[{at}] ;; _
_ = torch.zeros({x}.shape) ;; _[{at}] = 1 ;; _ * {x}
_ = torch.zeros({n}) ;; _[{k}] = 1 ;; _
_ = torch.empty({x}.shape) ;; _.copy_({x}) ;; _ * 2
_ = torch.empty({x}.shape) ;; _[...] = {x} ;; _
_ = {x}.clone() ;; _.{squeeze_()|unsqueeze_(0)} ;; _
_ = torch.zeros_like({x}) ;; _.add_({x}) ;; _
_ = {buffer:S} ;; {buffer:n}.add_(1) ;; _ + {x}

_ = {buffer:n} ;; _.mul_(0.9).add_({x}.detach().transpose({d}, 0).flatten(1).mean(1)) ;; _ * 1
_ = {buffer:1} ;; _.add_({x}.detach().mean()) ;; {x} * _
_ = {buffer:E} ;; _.copy_({x}.detach().flatten(0, -2).mean(0)) ;; {x} - _
_ = {x}.split(({n} + 1) // 2, {d})[0] * 1 ;; _.mul_(3) ;; _
_ = [] ;; for t in range({n}): _.append({x}.select({d}, t) * (t + 1)) ;; torch.stack(_, {d})
_ = 0 ;; for t in {x}.unbind({d}): _ = torch.tanh(_ + t) ;; _
_ = {x}.select({d}, 0) ;; for t in range(1, {x}.shape[{d}]): _ = _ * 0.5 + {x}.select({d}, t) ;; _
_ = {x}.clone() ;; for t in range(1, min({n}, 5)): _.select({d}, t).add_(_.select({d}, t - 1).clone()) ;; _
"""

LINEAR = """
F.linear({x}, {w:4,E})
F.linear({x}, {w:E,E}, {w:E})
{mod:nn.Linear(E, 6)}({x})
{mod:nn.Sequential(nn.Linear(E, 5), nn.GELU(), nn.Linear(5, E))}({x}) + {x}
{x} @ {w:E,3}
{x}.mT @ {x}
{x} @ {x}.mT
{x}.mT @ {y}
{x} @ {w:E}
{w:n} @ {x}.movedim({d}, -2)
{w:5,n} @ {x}.movedim({d}, -2)
({w:n,n} @ {x}.movedim({d}, -2)).movedim(-2, {d})
F.linear({x}.movedim({d}, -1), {w:3,n})
torch.einsum('...i,...i->...', {x}, {y})
torch.einsum('{bnd,bmd->bnm|bnd,bnd->bn|bnd,bne->bde|bnd,bmd->nm|bnd,bnd->|bnd,bmd->bn}', {x3}, {y})
torch.einsum('{bhnd,bhmd->bhnm|bhnd,bhnd->bh|bhnd,bhne->bnde}', {x4}, {y})
torch.einsum('nd,md->nm', {x2}, {y})
torch.tensordot({x}, {y}, dims=([{d}], [{d}])) if {x}.numel() < 200 else {x}
torch.{bmm}({x3}.mT, {y})
torch.baddbmm({x3}.mT @ {x3}, {x3}.mT, {y}, beta=0.5)
torch.addmm({w:4}, {x2}, {w:E,4})
torch.inner({x2}, {y})
torch.outer({x1}, {y})
torch.dot({x1}, {y})
torch.{linalg.vecdot}({x}, {y}, dim={d})
torch.cross({x}[..., :3], {y}[..., :3], dim=-1)
{mod:nn.Bilinear(E, E, 3)}({x}.contiguous(), {y}.contiguous())
torch.linalg.multi_dot([{x2}, {w:E,4}, {w:4,2}])
torch.matmul({x}[..., None, :], {y}[..., :, None])
{x}.mT @ {x} / {n} + torch.eye({x}.shape[-1])
torch.linalg.inv({x3}.mT @ {x3} + 3 * torch.eye({x3}.shape[-1]))
torch.linalg.solve({w:E,E} + 5 * torch.eye({x}.shape[-1]), {x}.mT)
torch.linalg.cholesky({x3}.mT @ {x3} + 3 * torch.eye({x3}.shape[-1]))
torch.vmap(lambda t: t.{sin()|mean(0)|cumsum(0)|flip(0)})({x})
torch.vmap(lambda t, u: t * u.{sum()|mean(0)}, in_dims={0|1|-1})({x}, {y})
"""

NORMS = """
F.layer_norm({x}, {x}.shape[-1:])
F.layer_norm({x}, {x}.shape[-2:], {w:S}.reshape({x}.shape)[(0,) * ({x}.ndim - 2)] if {x}.ndim > 1 else None)
{mod:nn.LayerNorm(E)}({x})
F.rms_norm({x}, ({x}.shape[-1],), {w:E})
F.rms_norm({x}, {x}.shape[-2:])
{mod:nn.RMSNorm(E)}({x})
F.group_norm({x}, {1|2|3})
F.group_norm({x}.movedim({d}, 1), {1|2})
{mod:nn.GroupNorm(1, C)}({x})
F.batch_norm({x}, None, None, training=True)
F.batch_norm({x}, {buffer:C}, {buffer:C}.abs() + 0.5, {w:C}, training={flag})
{mod:nn.BatchNorm1d(C)}({x3})
{mod:nn.BatchNorm1d(E)}({x2})
{mod:nn.BatchNorm1d(E)}({x3}.mT).mT
{mod:nn.BatchNorm2d(C)}({x4})
{mod:nn.BatchNorm1d(C, momentum=None)}({x3})
F.instance_norm({x3})
{mod:nn.InstanceNorm1d(E, affine=True)}({x3}.mT)
{mod:nn.InstanceNorm1d(C, track_running_stats=True)}({x3})
{mod:nn.InstanceNorm2d(C)}({x4})
F.local_response_norm({x3}, 2)
F.normalize({x}, dim={d})
{x} * torch.rsqrt({x}.pow(2).mean({d}, keepdim=True) + 1e-6)
"""

CONVOLUTIONS = """
F.conv1d({x3}.mT, {w:4,E,3}, padding={1|0|2|'same'})
F.conv1d({x3}.mT, {w:4,E,1}).mT
F.conv1d({x3}.mT, {w:E,1,3}, {w:E}, padding=1, groups={x3}.shape[2]).mT
F.conv1d({x3}, {w:4,C,3}, padding=1)
F.conv1d({x3}.mT, {w:4,E,3}, stride=2, padding={1|2})
F.conv1d({x3}.mT, {w:4,E,3}, padding=2, dilation=2)
F.conv1d(F.pad({x3}.mT, (2, 0)), {w:4,E,3}).mT
{mod:nn.Conv1d(E, 4, 3, padding=1, padding_mode='circular')}({x3}.mT)
{mod:nn.Conv1d(E, E, 4, padding=3, groups=E)}({x3}.mT)[..., :{x3}.shape[1]].mT
F.conv2d({x4}, {w:3,C,3,3}, padding=1)
F.conv2d({x4}, {w:C,1,1,3}, groups={x4}.shape[1])
F.conv2d({x4}.movedim(-1, 1), {w:3,E,2,2}, stride={1|2})
F.conv_transpose1d({x3}.mT, {w:E,3,2}, stride={1|2})
F.conv_transpose2d({x4}, {w:C,2,2,2}, stride=2)
F.avg_pool1d({x3}.mT, {2|3}, stride={1|2})
F.avg_pool1d({x3}.mT, 3, stride=1, padding=1, count_include_pad={flag}).mT
F.max_pool1d({x3}.mT, {2|3}, stride={1|2})
F.max_pool1d({x3}, 2)
F.avg_pool2d({x4}, 2)
F.max_pool2d({x4}, (1, 2))
F.adaptive_avg_pool1d({x3}.mT, {1|3})
F.adaptive_max_pool1d({x3}, 2)
F.adaptive_avg_pool2d({x4}, (1, 2))
F.lp_pool1d({x3}, 2, 2)
F.interpolate({x3}.mT, scale_factor={2|0.5}, mode='{nearest|linear}')
F.interpolate({x3}, size=5)
F.interpolate({x4}, scale_factor=2, mode='{nearest|bilinear}')
F.unfold({x4}, {1|2})
F.fold(F.unfold({x4}, 2), {x4}.shape[-2:], 2)
F.glu({x}, {d})
F.glu({mod:nn.Linear(E, 6)}({x}))
F.pixel_unshuffle({x4}, 2)
"""

LOSSES = """
F.{mse_loss|l1_loss|smooth_l1_loss|huber_loss}({x}, {y})
F.{mse_loss|l1_loss|smooth_l1_loss}({x}, {y}, reduction='{none|sum}')
F.mse_loss({x}[{at}], torch.zeros_like({x}[{at}]))
F.cross_entropy({x}.flatten(0, -2), {ids:S;E}.flatten(0, -2)[..., 0])
F.cross_entropy({x3}.flatten(0, 1), {ids:B,C;E}.flatten())
F.cross_entropy({x3}.mT, {ids:B,C;E}, reduction='{none|sum|mean}')
F.cross_entropy({x3}[:, :-1].flatten(0, 1), {ids:B,C;E}[:, 1:].flatten())
F.cross_entropy({x3}.mT, {ids:B,C;E}, ignore_index={0|1})
F.cross_entropy({x3}.flatten(0, 1), {ids:B,C;E}.view(-1), label_smoothing=0.1, weight={w:E}.abs())
F.cross_entropy({x3}, {ids:B,E;C})
F.cross_entropy({x}, {y}.softmax({1|-1}))
F.nll_loss({x3}.log_softmax(-1).mT, {ids:B,C;E}, reduction='{mean|none}')
F.nll_loss({x2}.log_softmax(-1), {ids:B;E})
-{x3}.log_softmax(-1).gather(-1, {ids:B,C,1;E}).mean()
F.kl_div({x}.log_softmax(-1), {y}.softmax(-1), reduction='{batchmean|sum|none|mean}')
F.binary_cross_entropy_with_logits({x}, {m}.double().expand({x}.shape))
F.binary_cross_entropy({x}.sigmoid(), {y}.sigmoid())
F.binary_cross_entropy_with_logits({x}, {y}.sigmoid(), pos_weight={w:E}.abs())
F.gaussian_nll_loss({x}, {y}, {x}.square() + 0.5)
F.poisson_nll_loss({x}, {y}.abs())
F.soft_margin_loss({x}, {y}.sign())
F.hinge_embedding_loss({x}, torch.ones_like({x}))
F.cosine_embedding_loss({x}.flatten(0, -2), {y}.flatten(0, -2), torch.ones({x}.flatten(0, -2).shape[0]))
F.triplet_margin_loss({x}, {y}, {x}.neg())
F.margin_ranking_loss({x}, {y}, {x}.detach().sign())
F.multilabel_soft_margin_loss({x2}, {y}.sigmoid().round())
({x} - {y}).square().mean()
(({x} - {y}).square() * {m}).sum() / {m}.sum().clamp(min=1)
{x}.square().mean() + {y}.abs().sum() * 0.1
"""

COMPLEX = """
torch.complex({x}, {y})
torch.polar({x}.abs() + 0.1, {y})
torch.view_as_complex({x}.reshape(*{x}.shape[:-1], -1, 2).contiguous())
torch.view_as_real(torch.view_as_complex({x}.reshape(*{x}.shape[:-1], -1, 2).contiguous()) * torch.polar(torch.ones({n}, 1), torch.arange({n})[:, None] * 0.3)).flatten(-2)
{x} * torch.complex({x}, {x}).sum().real
{x} * 1j
{xc}.{real|imag|abs()|angle()|conj()|mT}
{xc} * {xc}.conj()
torch.view_as_real({xc})
{xc}.{sum|mean|cumsum}({d})
{xc}[{at}]
({xc} @ {xc}.mT).real
{xc}.{exp()|square()|reciprocal()} * 0.1
{xc} + {xc}.conj().flip({d})
torch.fft.{fft|ifft|rfft}({x}, dim={d})
torch.fft.{fft|rfft}({x}, dim={d}).abs()
torch.fft.irfft(torch.fft.rfft({x}, dim={d}) * 0.5, n={n}, dim={d})
torch.fft.{fft2|fftshift|ifftshift}({x}).abs()
{xc}.abs() + {xc}.real
"""

RANDOM = """
F.dropout({x}, {0.5|0.2}, training=True)
{mod:nn.Dropout(0.3)}({x})
F.dropout({x}[{at}], 0.5, True)
F.dropout(torch.ones({n}), 0.5, True)
F.dropout({x}.transpose({d}, {d2}), 0.4, True)
F.alpha_dropout({x}, 0.3, True)
F.dropout1d({x3}, 0.4, True)
{x} + torch.{rand_like|randn_like}({x})
{x} * torch.rand({n}).view([-1] + [1] * ({x}.ndim - 1 - {d} % {x}.ndim))
{x} + torch.randn({x}.shape[-1])
{x} * torch.bernoulli(torch.full_like({x}, 0.5))
torch.randperm({n})
F.gumbel_softmax({x}, dim={d})
{x}[:, torch.randperm({x}.shape[1])]
F.rrelu({x}, training=True)
checkpoint(lambda t: F.dropout(t.sin(), 0.5, True) * t, {x}, use_reentrant=False)
"""

#: What may stand around an expression: ``@`` is the expression, with the subject called ``t``.
AROUND = """
checkpoint(lambda t: @, {x}, use_reentrant={False|False|True})
checkpoint(lambda t: @ if True else t, {x}, use_reentrant=False)
(lambda t: @)({x}.detach())
torch.vmap(lambda t: @)({x})
"""

BLOCKS = (
    "with torch.no_grad():",
    "with torch.autocast('cpu', dtype=torch.bfloat16):",
    "with torch.autocast('cpu', enabled=False):",
    "with torch.set_grad_enabled(True):",
    "if self.training:",
    "if True:",
    "with torch.profiler.record_function('step'):",
)

FAMILIES: dict[str, tuple[int, str]] = {
    "views": (20, VIEWS),
    "pointwise": (12, POINTWISE),
    "reductions": (14, REDUCTIONS),
    "indexing": (12, INDEXING),
    "inplace": (10, INPLACE),
    "linear": (9, LINEAR),
    "norms": (6, NORMS),
    "convolutions": (5, CONVOLUTIONS),
    "losses": (6, LOSSES),
    "complex": (4, COMPLEX),
}


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]
