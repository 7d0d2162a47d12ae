"""One autograd Function for all split operations, and the weight gradient as a value that can wait.

While nothing is deferred the weight gradient goes the usual way through autograd. A deferred one is fed into the same
gradient edge later, so that views, casts, several uses, hooks and the type of the gradient are autograd's business in
both cases.

A layer may differentiate within its own forward: forces of a learned energy, gradient penalties. Only a backward that
accumulates into the parameter defers; one that is to be differentiated itself (`create_graph`) runs on differentiable
formulas, whose own backward autograd does as part of I. Under forward-mode differentiation and the transforms of
`torch.func` the plain operations run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward

from .weight_grad_ops import FusedWgrad, SplitOp

#: Other tensors (distributed, quantised, the fake ones of a compiler) have rules of their own.
_PLAIN = (Tensor, nn.Parameter)

#: Nodes that keep no tensor, hence can run in I (on nothing) and again in W.
_REPLAYABLE = re.compile(
    r"(T|Transpose|Permute|Select|Slice|View|UnsafeView|ReshapeAlias|Unsqueeze|Squeeze|Alias|Clone|Unbind|Split|ToCopy)"
    r"Backward\d"
)


class Contribution(NamedTuple):
    """A weight gradient that has not been computed yet."""

    param: nn.Parameter
    edge: GradientEdge
    op: SplitOp
    grad: Tensor
    x: Tensor
    like: Tensor
    bias_edge: GradientEdge | None  #: for an operation whose bias gradient comes with the weight's
    offset: int | None  #: where the weight starts in the parameter; None if it does not share the parameter's memory

    @property
    def leaves(self) -> list[Tensor]:
        """What the gradients of `compute` belong to, if `is_direct`."""
        return [edge.node.variable for edge in (self.edge, self.bias_edge) if edge is not None]  # type: ignore[attr-defined]

    @property
    def is_direct(self) -> bool:
        """Whether no view or cast stands between the gradients and their parameters."""
        return all(hasattr(edge.node, "variable") for edge in (self.edge, self.bias_edge) if edge is not None)

    def compute(self) -> list[tuple[GradientEdge, Tensor]]:
        if self.bias_edge is None:
            return [(self.edge, self.op.weight_grad(self.grad, self.x, self.like))]
        weight, bias = self.op.joint_grads(self.grad, self.x, self.like)
        return [(self.edge, weight), (self.bias_edge, bias)]

    def add_to(self, total: Tensor, fused: FusedWgrad | None) -> None:
        """Add to an fp32 sum of the parameter's shape."""
        if self.offset is None or not total.is_contiguous():
            total.add_(torch.autograd.grad(self.edge, self.param, self.compute()[0][1])[0])
        else:
            view = total.as_strided(self.like.shape, self.like.stride(), total.storage_offset() + self.offset)
            self.op.add_weight_grad(view, self.grad, self.x, self.like, fused)


@torch.no_grad()
def accumulate(contributions: list[Contribution], fused: FusedWgrad | None = None) -> None:
    """Compute weight gradients of one backward, add up those of each parameter, and forget them.

    They go into `main_grad` (fp32) where the parameter has one, else into `grad` as autograd does it, post-accumulate
    hooks included: of all parameters in one call of its engine.
    """
    apart: list[Contribution] = []
    first: list[Contribution] = []
    through_views = {each.param for each in contributions if not each.is_direct}  # together, for one order of the sum
    for each in contributions:
        main_grad = getattr(each.param, "main_grad", None)
        if main_grad is not None:
            each.add_to(main_grad, fused)
        elif each.param in through_views or all(leaf.grad is not None for leaf in each.leaves):
            apart.append(each)
        else:
            first.append(each)
    contributions.clear()
    edges: list[Any] = []
    grads: list[Tensor] = []
    for each in apart:
        for edge, grad in each.compute():
            edges.append(edge)
            grads.append(grad)
    apart.clear()
    if first:
        with torch.enable_grad():
            root = _Late.apply(first, *(leaf for each in first for leaf in each.leaves))
        edges.append(root)
        grads.append(root.detach())
    if edges:
        _engine_run_backward(tuple(edges), tuple(grads), False, False, (), allow_unreachable=True, accumulate_grad=True)


AutogradContext: TypeAlias = Any
"""What torch gives the methods of a Function, which keep on it what they like."""

AutogradNode: TypeAlias = Any
"""A node of a graph; torch has no type for one that has a `variable`."""


class _Late(torch.autograd.Function):
    """Makes weight gradients in its backward, so that autograd owns them alone, and need not copy what it keeps: the
    first ones, which become `grad`. What is added to those is kept by nobody, and costs less without a Function."""

    @staticmethod
    def forward(ctx: AutogradContext, contributions: list[Contribution], *leaves: Tensor) -> Tensor:
        ctx.contributions = contributions
        return leaves[0].new_empty(())

    @staticmethod
    def backward(ctx: AutogradContext, *_: Tensor) -> tuple[Tensor | None, ...]:
        contributions: list[Contribution] = ctx.contributions
        grads: list[Tensor] = []
        contributions.reverse()
        while contributions:
            grads += [grad for _, grad in contributions.pop().compute()]
        return None, *grads


class Sink(Protocol):
    """Where the weight gradients of a backward go; see `DeferredWeightGrads`."""

    deferring: bool
    fused_wgrad: FusedWgrad | None
    split_params: set[nn.Parameter]

    def put(self, deferred: Contribution | Callable[[], None]) -> None: ...

    def holds(self, param: nn.Parameter) -> bool: ...


def split(sink: Sink, op: SplitOp, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Run `op` so that its weight gradient can be deferred; None if the caller must run the plain operation."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return None
    if not torch.is_grad_enabled() or type(x) not in _PLAIN or type(weight) not in _PLAIN or not weight.requires_grad:
        return None
    if weight.is_complex():  # its gradients are conjugated, and autograd's to make
        return None
    param = _splittable(weight)
    if param is None or (op.joint_bias and bias is not None and bias.requires_grad and _splittable(bias) is None):
        return None
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = _autocast(op, x, weight, bias)
    if op.deferrable:
        sink.split_params.add(param)
    out: Tensor = _Split.apply(x, weight, bias, op, param, sink)
    return out


def _splittable(weight: Tensor) -> nn.Parameter | None:
    if has_hooks(weight):
        return None
    param = weight if weight.grad_fn is None else _source(weight.grad_fn)
    return param if type(param) is nn.Parameter and not has_hooks(param) else None


def has_hooks(tensor: Tensor) -> bool:
    """Whether a tensor has hooks for its gradient, which run once a backward."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def _source(node: Node | None) -> Tensor | None:
    """The leaf that a chain of views and casts starts from; None for any other graph."""
    while node is not None and _REPLAYABLE.fullmatch(node.name()):
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _autocast(op: SplitOp, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would. Inside the Function it would do so without gradient and keep that copy in its cache."""
    device = x.device.type
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op.kernel, f"Autocast{_KEYS.get(device, device.upper())}"):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.device.type == device and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(x), cast(weight), None if bias is None else cast(bias)


_KEYS = {"privateuseone": "PrivateUse1"}


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        op: SplitOp,
        param: nn.Parameter,
        sink: Sink,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.op = op
        ctx.param = param  # the saved weight is another tensor under activation checkpointing
        ctx.sink = sink
        out = op.forward(x, weight, bias)
        return out.data if out._is_view() else out  # autograd lets nobody change a Function's view in place

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        op: SplitOp = ctx.op
        has_main_grad = getattr(ctx.param, "main_grad", None) is not None
        differentiable = torch.is_grad_enabled()
        if differentiable and has_main_grad and need_weight:
            weight = _IntoMainGrad.apply(weight, ctx.param)
        joint = op.joint_bias and need_weight and need_bias and (differentiable or not has_main_grad)
        grad_x = op.input_grad(grad, x, weight) if need_x else None
        grad_weight = grad_bias = None
        where = _destination(ctx.next_functions[1][0]) if need_weight else _NOWHERE
        if where == _NOWHERE:
            joint = False
        elif where == _GRAD and not differentiable and _put_off(ctx, grad, x, weight, joint):
            pass
        elif joint:
            grad_weight, grad_bias = op.joint_grads(grad, x, weight)
        else:
            grad_weight = op.weight_grad(grad, x, weight)
        if need_bias and not joint:
            grad_bias = op.bias_grad(grad, ctx.bias_shape)
        return grad_x, grad_weight, grad_bias, None, None, None


_NOWHERE, _GRAD, _CALLER = "nowhere", "grad", "caller"


def _destination(node: AutogradNode) -> str:
    """Where the backward that runs brings the gradient that goes into `node`: nowhere, as it is not asked for; to the
    `grad` of the parameter; or to the caller of `torch.autograd.grad`."""
    try:
        if not torch._C._will_engine_execute_node(node):
            return _NOWHERE
        while not hasattr(node, "variable"):
            node = node.next_functions[0][0]
        return _GRAD if torch._C._will_engine_execute_node(node) else _CALLER
    except RuntimeError:  # what `grad` was asked for has no answer
        return _CALLER


class _IntoMainGrad(torch.autograd.Function):
    """A weight whose gradient, of a second differentiation, is added to the parameter's `main_grad` at once."""

    @staticmethod
    def forward(ctx: AutogradContext, weight: Tensor, param: nn.Parameter) -> Tensor:
        ctx.param = param
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, None]:
        node = ctx.next_functions[0][0]
        if _destination(node) != _GRAD:
            return grad, None
        whole = (
            grad
            if hasattr(node, "variable")
            else torch.autograd.grad(GradientEdge(*ctx.next_functions[0]), ctx.param, grad)[0]
        )
        ctx.param.main_grad.add_(whole)
        return None, None


def _put_off(ctx: AutogradContext, grad: Tensor, x: Tensor, weight: Tensor, joint: bool) -> bool:
    """Leave a gradient for W, or add it to `main_grad`; False if autograd shall have it now."""
    sink: Sink = ctx.sink
    param: nn.Parameter = ctx.param
    has_main_grad = getattr(param, "main_grad", None) is not None
    wait = sink.deferring and (ctx.op.deferrable or sink.holds(param))
    if not wait and not (has_main_grad and ctx.op.deferrable):
        return False
    later = Contribution(
        param,
        GradientEdge(*ctx.next_functions[1]),
        ctx.op,
        grad,
        x.detach(),
        _like(weight.shape, weight.stride(), weight.dtype),
        GradientEdge(*ctx.next_functions[2]) if joint else None,
        _offset(weight, param) if has_main_grad else None,
    )
    if wait:
        sink.put(later)
    else:
        accumulate([later], sink.fused_wgrad)
    return True


@functools.lru_cache(maxsize=1024)
def _like(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A meta tensor in place of a weight. Nothing is written to it, so that weights that look alike share one."""
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _offset(weight: Tensor, param: nn.Parameter) -> int | None:
    shared = weight.untyped_storage().data_ptr() == param.untyped_storage().data_ptr()
    if not shared or weight.dtype != param.dtype or not param.is_contiguous():
        return None
    return int(weight.storage_offset() - param.storage_offset())
