"""Muon (Moonlight, arXiv 2502.16982): matrices move by their orthogonalized momentum, everything else by AdamW.

Stands in for MindFormers 1.9.0's Muon, which knows only MindFormers' own models, always rounds to bfloat16 and
gathers matrices inside the branch of an overflow. Here a step that is not taken is selected away, so that every rank
has the same collectives. It can go when upstream's takes the model's own list of matrices.

A matrix that lies on several ranks is gathered, orthogonalized on each of them, and cut again; stacked experts, which
are split by whole matrices only, are each orthogonalized where they lie.
"""

import math

import mindspore as ms
import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.communication import create_group, get_rank
from mindspore.parallel._auto_parallel_context import auto_parallel_context

from mindformers_ext.sharded_checkpoint.shards import optimizer_ways

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives singular values towards one
EPSILON = 1e-7  # smallest norm that a matrix is divided by
MOMENTUM = "muon_m."  # how the names of Muon's momenta begin
REGISTERED = "MatrixMuon"  # what MindFormers' Trainer is told, which does more to a model of its own at the name Muon


class Orthogonalize(nn.Cell):
    """Newton-Schulz iterations: (..., rows, columns) to nearly the closest matrix with orthonormal rows or columns.

    Args:
        axes: 2, or 3 for a stack of matrices.
        dtype: of the products.
    """

    def __init__(self, axes: int, rows: int, columns: int, steps: int, dtype: mstype.Type):
        super().__init__()
        self.steps, self.dtype, self.is_tall = steps, dtype, rows > columns
        product = ops.MatMul if axes == 2 else ops.BatchMatMul
        self.product, self.product_t = product(), product(transpose_b=True)
        self.swap, self.swapped = ops.Transpose(), (1, 0) if axes == 2 else (0, 2, 1)
        self.inner = (0, 1) if axes == 2 else (1, 2)
        self.sum = ops.ReduceSum(keep_dims=True)

    def construct(self, x):
        """Of x, or of every matrix of it."""
        a, b, c = COEFFICIENTS
        if self.is_tall:
            x = self.swap(x, self.swapped)
        norm = ops.sqrt(self.sum(ops.square(x), self.inner))
        x = ops.cast(x / ops.maximum(norm, EPSILON), self.dtype)
        for _ in range(self.steps):
            gram = self.product_t(x, x)
            x = a * x + self.product(b * gram + c * self.product(gram, gram), x)
        if self.is_tall:
            x = self.swap(x, self.swapped)
        return ops.cast(x, mstype.float32)


class Gather(nn.Cell):
    """The whole of something that ranks hold parts of along one axis, and a rank's part again."""

    def __init__(self, ranks: list[int], axis: int):
        super().__init__()
        self.axis, self.ways, self.place = axis, len(ranks), ranks.index(get_rank())
        name = "muon-" + "-".join(map(str, ranks))
        create_group(name, ranks)
        self.gather, self.swap, self.split = ops.AllGather(group=name), ops.Transpose(), ops.Split(axis, self.ways)

    def construct(self, x):
        """The whole."""
        if self.axis == 0:
            return self.gather(x)
        return self.swap(self.gather(self.swap(x, (1, 0))), (1, 0))

    def cut(self, x):
        """This rank's part."""
        return self.split(x)[self.place]


class MuonUpdate(nn.Cell):
    """The update of one matrix, or of the `parts` matrices that lie side by side in each of a stack."""

    def __init__(self, weight: Parameter, parts: int, gathers: list[Gather], rules: "Muon", rows: tuple | None):
        super().__init__(auto_prefix=False)
        self.threshold = rules.qk_clip_threshold
        self.logits, self.take, self.stack = None, ops.Gather(), ops.Concat(0)
        if rows:
            self.logits, own = rows
            for gather in gathers[::-1]:
                own = np.split(own, gather.ways)[gather.place]
            self.rows, self.scale = Tensor(own[:, None]), self.scale_rows
            if gathers:  # the compiler reads shapes before it cuts weights, and a Morph's body after
                self.scale = ops.Morph(self.scale_rows, self.as_weight, self.as_weight)
        *_, rows, columns = weight.shape
        self.is_stack, self.parts = weight.ndim == 3, parts
        self.momentum, self.nesterov = rules.momentum, rules.nesterov
        self.orthogonalize = Orthogonalize(weight.ndim, rows, columns // parts, rules.ns_steps, rules.ns_type)
        self.size = rules.matched_adamw_rms * math.sqrt(max(rows, columns // parts))
        self.gathers, self.cuts = gathers, gathers[::-1]
        self.split, self.join = ops.Split(-1, parts), ops.Concat(-1)

    def direction(self, momentum):
        """Where the weight moves."""
        if self.is_stack:
            if self.parts == 1:
                return self.orthogonalize(momentum)
            turned = ()
            for part in self.split(momentum):
                turned = (*turned, self.orthogonalize(part))
            return self.join(turned)
        for gather in self.gathers:
            momentum = gather(momentum)
        turned = self.orthogonalize(momentum)
        for gather in self.cuts:
            turned = gather.cut(turned)
        return turned

    def clipped(self, weight):
        """The weight with the heads scaled down whose logits have grown too large (Kimi K2, arXiv 2507.20534)."""
        scale = self.threshold / ops.maximum(self.logits, self.threshold)  # (N,)
        return self.scale(weight, self.stack((ops.sqrt(scale), scale, ops.ones_like(scale))))

    def scale_rows(self, weight, kinds):
        """This rank's rows times the number of their kind."""
        return weight * self.take(kinds, self.rows, 0)

    def as_weight(self, weight, kinds):
        """Shape and type of the result."""
        return weight

    def construct(self, weight, first, second, gradient, rate, decay, corrections, taken):
        """Change weight and momentum where `taken`."""
        gradient = ops.cast(gradient, mstype.float32)
        momentum = first + (gradient - first) * (1 - self.momentum)
        ahead = gradient + (momentum - gradient) * self.momentum if self.nesterov else momentum
        old = ops.cast(weight, mstype.float32)
        new = old * (1 - rate * decay) - rate * self.size * self.direction(ahead)
        if self.logits is not None:
            new = self.clipped(new)
        new = ops.cast(ops.select(taken, new, old), weight.dtype)
        new = ops.depend(new, ops.assign(first, ops.select(taken, momentum, first)))
        return ops.assign(weight, new)


class AdamWUpdate(nn.Cell):
    """The update of everything else, as MindFormers' AdamW."""

    def __init__(self, betas: tuple[float, float], eps: float):
        super().__init__(auto_prefix=False)
        (self.beta1, self.beta2), self.eps = betas, eps

    def construct(self, weight, first, second, gradient, rate, decay, corrections, taken):
        """Change weight and moments where `taken`."""
        gradient = ops.cast(gradient, mstype.float32)
        mean = first * self.beta1 + gradient * (1 - self.beta1)
        square = second * self.beta2 + ops.square(gradient) * (1 - self.beta2)
        step = mean / corrections[0] / (ops.sqrt(square / corrections[1]) + self.eps)
        old = ops.cast(weight, mstype.float32)
        new = ops.cast(ops.select(taken, old * (1 - rate * decay) - rate * step, old), weight.dtype)
        new = ops.depend(new, ops.assign(first, ops.select(taken, mean, first)))
        new = ops.depend(new, ops.assign(second, ops.select(taken, square, second)))
        return ops.assign(weight, new)


@MindFormerRegister.register(MindFormerModuleType.OPTIMIZER, alias=REGISTERED)
class Muon(nn.Optimizer):
    """Muon for the model's matrices, AdamW for embedding, head, norms and router.

    Args:
        params: weights, or groups of them, as MindSpore's optimizers take them.
        learning_rate: a number or a schedule, of both.
        model: says which weights are matrices and how they are split (`matrices`).
        matched_adamw_rms: root mean square of a matrix's update, which lets AdamW's rate and decay stay.
        momentum, nesterov, ns_steps: of Muon.
        adamw_betas, adamw_eps: of AdamW.
        qk_clip_threshold: attention logits above it scale the projections of their head down; None: none do.
    """

    def __init__(
        self,
        params: list,
        learning_rate: float | nn.Cell = 1e-3,
        weight_decay: float = 0.1,
        matched_adamw_rms: float = 0.2,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        qk_clip_threshold: float | None = None,
        model: nn.Cell = None,
    ):
        super().__init__(learning_rate, params, weight_decay)
        self.matched_adamw_rms, self.momentum, self.nesterov = matched_adamw_rms, momentum, nesterov
        self.ns_steps, self.betas, self.qk_clip_threshold = ns_steps, tuple(adamw_betas), qk_clip_threshold
        self.beta1 = Tensor([self.betas[0]], mstype.float32)  # as AdamW's, for who asks
        self.ns_type = getattr(mstype, model.config.compute_dtype)
        matrices, rows = model.matrices(), model.rows_to_clip() if qk_clip_threshold else {}
        self.uses_muon = [weight.name in matrices for weight in self._parameters]
        self.first = ParameterTuple(
            state(weight, MOMENTUM if muon else "adam_m.")
            for weight, muon in zip(self._parameters, self.uses_muon, strict=True)
        )
        others = [w for w, muon in zip(self._parameters, self.uses_muon, strict=True) if not muon]
        self.second = ParameterTuple(state(weight, "adam_v.") for weight in others)
        self.updates = nn.CellList()
        for weight, muon in zip(self._parameters, self.uses_muon, strict=True):
            if muon:
                axes, parts = matrices[weight.name]
                gathers = gathers_of(weight, axes, model.config.parallel_config)
                self.updates.append(MuonUpdate(weight, parts, gathers, self, rows.get(weight.name)))
            else:
                self.updates.append(AdamWUpdate(self.betas, adamw_eps))

    def construct(self, gradients, taken):
        """Take the step where `taken`, (1,) bool; else leave everything as it is."""
        gradients = self.flatten_gradients(gradients)
        decay, rate = self.get_weight_decay(), self.get_lr()
        self.assignadd(self.global_step, ops.cast(taken, mstype.int32))
        step = ops.maximum(ops.cast(self.global_step, mstype.float32), 1.0)
        corrections = 1 - ops.pow(self.betas[0], step), 1 - ops.pow(self.betas[1], step)
        done, second = (), 0
        for i, update in enumerate(self.updates):
            own_rate = rate[i] if self.is_group_lr else rate
            own_decay = decay[i] if self.is_group else decay
            square = self.first[i] if self.uses_muon[i] else self.second[second]
            second = second if self.uses_muon[i] else second + 1
            weight, first = self._parameters[i], self.first[i]
            done = (*done, update(weight, first, square, gradients[i], own_rate, own_decay, corrections, taken))
        return done


def state(weight: Parameter, prefix: str) -> Parameter:
    """A state of the optimizer, split as its weight, in float32 whatever the weight is."""
    zeros = weight.clone("zeros")
    zeros.set_dtype(mstype.float32)
    zeros.name = prefix + weight.name
    return zeros


def gathers_of(weight: Parameter, axes: tuple[str, ...], parallel_config) -> list[Gather]:
    """What makes a whole matrix of this rank's part, in order: its optimizer shards, then what `mp` splits."""
    split = ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")
    if not split or weight.ndim == 3:
        return []
    mp = parallel_config.model_parallel
    devices = parallel_config.data_parallel * parallel_config.context_parallel * mp
    first, place = get_rank() // devices * devices, get_rank() % devices
    axis = axes.index("mp") if "mp" in axes else None
    ways = mp if axis is not None else 1
    copies = range(place % ways, devices, ways)
    rows = weight.shape[0] // (ways if axis == 0 else 1)
    bytes_ = weight.size * weight.itemsize
    shards = ms_optimizer_ways(rows, bytes_, len(copies)) if weight.parallel_optimizer else 1
    found = []
    if shards > 1:
        begin = list(copies).index(place) // shards * shards
        found.append(Gather([first + rank for rank in copies[begin : begin + shards]], 0))
    if ways > 1:
        found.append(Gather(list(range(first + place // mp * mp, first + place // mp * mp + mp)), axis))
    return found


def ms_optimizer_ways(rows: int, size: int, copies: int) -> int:
    """`optimizer_ways` of the parallel context that is set."""
    context = auto_parallel_context()
    if not context.get_enable_parallel_optimizer():
        return 1
    shard_size, kilobytes = context.get_optimizer_weight_shard_size(), context.get_parallel_optimizer_threshold()
    return optimizer_ways(rows, size, copies, shard_size, 1024 * kilobytes)
