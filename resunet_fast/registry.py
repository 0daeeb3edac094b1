"""Operators and their implementations: one definition, several ways to compute it, one chosen.

An :class:`Operator` is a dispatcher operator `resunet_fast::<name>`: its schema, its fake (shapes
only), its autograd formula. An :class:`Implementation` only computes. :func:`select` picks the
first implementation, in the order of preference below, that neither refuses the inputs (it cannot
run) nor declines them (it can, but another is faster), and :func:`explain` says why the others were
passed over. Nothing here knows what an operator computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._autograd import _profiler_enabled
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.nn import Parameter

Refusals = Callable[..., list[str]]

# Earlier names are preferred; "reference" refuses nothing and therefore comes last.
PREFERENCE = ("cudnn", "cuda", "triton", "cpu", "reference")


def nothing(*_: Any) -> list[str]:
    """No reasons: what an implementation says that takes, and wants, any inputs."""
    return []


_EXPORT_TRACES = DispatchKey.PreDispatch
_REQUIRED = object()  # marks arguments without a default
LIBRARY = torch.library.Library("resunet_fast", "DEF")
OPERATORS: dict[str, Operator] = {}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run; the message carries its reasons."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute one operator.

    Args:
        name: the backend, one of :data:`PREFERENCE`.
        compute: takes exactly the operator's arguments without the trailing `backend`.
        refusals: takes the same arguments; the reasons why `compute` cannot run on them, as
            sentences. An empty list means that it can.
        declines: takes the same arguments; the reasons why it is not chosen although it could run,
            such as a measurement that another one wins. It still runs where it is forced.
    """

    name: str
    compute: Callable[..., Any]
    refusals: Refusals = nothing
    declines: Refusals = nothing


@dataclass
class Operator:
    """One dispatcher operator and everything that is true of it whichever way it is computed.

    Args:
        name: the name behind `resunet_fast::`.
        schema: the signature with defaults, in the dispatcher's language. The last argument is
            `str backend=''`: the backend forced by :func:`use_backend`, or empty. It travels as an
            argument because autograd's own threads see no context. An argument `bool keep=False`
            asks for results that only backward needs; autograd sets it.
        fake: output shapes, dtypes and layouts from the inputs' (no data is read); like `compute`,
            it takes every argument but `backend`.
        setup_context, backward: the autograd formula as for `torch.library.register_autograd`, or
            None where the operator is not differentiable.

    Attributes:
        written: positions of the arguments that the operator writes into.
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        LIBRARY.define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._compute, "CompositeExplicitAutograd")
        qualified = f"resunet_fast::{self.name}"
        torch.library.register_fake(qualified, self._fake, lib=LIBRARY)
        if self.backward is None:
            LIBRARY.impl(self.name, self._mutate_dispatched, "Autograd")
        else:
            self._straight = _autograd_function(self, self._compute)
            self._dispatched = _autograd_function(self, self._dispatch)
            LIBRARY.impl(self.name, self._differentiate_dispatched, "Autograd")
        self.overload: Any = getattr(torch.ops.resunet_fast, self.name).default
        arguments = self.overload._schema.arguments
        self._defaults = tuple(
            a.default_value if a.has_default_value() else _REQUIRED for a in arguments
        )
        names = [argument.name for argument in arguments]
        self._keep = names.index("keep") if "keep" in names else None
        self.written = [
            i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        OPERATORS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        """Call the operator; autograd, fake tensors, tracing and profiling see it.

        Where none of them but autograd is there, the dispatcher would only convert every argument
        to C++ and back, twice: then its steps are taken without it.
        """
        if not unobserved() or not _plain(args):
            return self.overload(*args)
        if self.backward is None:
            return self._mutate(args, self._compute)
        return self._differentiate(args, self._compute, self._straight)

    def add(self, *implementations: Implementation) -> None:
        """Register implementations, kept in the order of :data:`PREFERENCE`."""
        for implementation in implementations:
            self.implementations[implementation.name] = implementation
        self.implementations = dict(
            sorted(self.implementations.items(), key=lambda item: PREFERENCE.index(item[0]))
        )

    def _compute(self, *args: Any) -> Any:
        *inputs, backend = self.complete(args)
        implementation = select(self, inputs, backend)
        if not torch._C._is_any_autocast_enabled():
            return implementation.compute(*inputs)
        with _no_autocast(inputs):
            return implementation.compute(*inputs)

    def _dispatch(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def _fake(self, *args: Any) -> Any:
        return self.fake(*self.complete(args)[:-1])

    def _differentiate_dispatched(self, *args: Any) -> Any:
        return self._differentiate(args, self._dispatch, self._dispatched)

    def _differentiate(
        self, args: Sequence[Any], run: Callable[..., Any], function: type[Function]
    ) -> Any:
        inputs = self.complete(args)
        if _has_tangents(inputs):
            # A custom operator would return tangents of zero, silently.
            return self.implementations["reference"].compute(*inputs[:-1])
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        ):
            if self._keep is not None:
                inputs = (*inputs[: self._keep], True, *inputs[self._keep + 1 :])
            # Not `function.apply`, which first looks for what torch.func may have left behind.
            return super(Function, function).apply(*inputs)  # type: ignore[misc]
        return run(*inputs)

    def _mutate_dispatched(self, *args: Any) -> None:
        self._mutate(args, self.overload)

    def _mutate(self, args: Sequence[Any], run: Callable[..., Any]) -> None:
        # Below autograd, or what is written would join the graph of an argument such as a bias.
        with torch._C._AutoDispatchBelowAutograd():
            run(*args)
        if torch.is_inference_mode_enabled():
            return
        # Autograd learns that a tensor has changed from its version, and of nothing else.
        written = [args[i] for i in self.written if args[i] is not None]
        torch.autograd.graph.increment_version(written)

    def complete(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Append the schema's defaults: the dispatcher drops trailing arguments that equal them."""
        missing = self._defaults[len(args) :]
        if _REQUIRED in missing:
            raise TypeError(f"{self.name}: got {len(args)} arguments for {self.schema}")
        return (*args, *missing)


def unobserved() -> bool:
    """Whether the operators that are called now have no other audience than autograd."""
    return not (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _dispatch_tls_is_dispatch_key_included(_EXPORT_TRACES)
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def _plain(values: Sequence[Any]) -> bool:
    """Whether nothing but autograd has to see what is done to these."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            # The older vmap, behind torch.autograd.grad(is_grads_batched=True), has no class. What
            # a view negates lazily, such as an imaginary part, the dispatcher negates.
            legacy = torch._C._functorch.is_legacy_batchedtensor(value)
            if value.is_meta or value.is_neg() or legacy:
                return False
        elif isinstance(value, Tensor):
            return False
    return True


def _no_autocast(inputs: Sequence[Any]) -> AbstractContextManager[None]:
    """An implementation's own arithmetic is not autocast's business, whoever calls it."""
    device = next(value.device.type for value in inputs if isinstance(value, Tensor))
    if device == "meta":  # autocast does not know it
        return nullcontext()
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _has_tangents(inputs: Sequence[Any]) -> bool:
    """Whether forward-mode AD differentiates with respect to one of the inputs."""
    if torch.autograd.forward_ad._current_level < 0:
        return False
    return any(
        isinstance(value, Tensor)
        and torch.autograd.forward_ad.unpack_dual(value).tangent is not None
        for value in inputs
    )


def _autograd_function(operator: Operator, run: Callable[..., Any]) -> type[Function]:
    """Wrap an operator's formula for autograd; `run` computes without it.

    torch.library.register_autograd would do, but looks up every default of the schema at each call.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        outputs = run(*inputs)
        assert operator.setup_context is not None
        operator.setup_context(ctx, inputs, outputs)
        return outputs

    def backward(ctx: Any, *grads: Any) -> Any:
        assert operator.backward is not None
        return operator.backward(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{operator.name}_autograd", (Function,), members)


def select(operator: Operator, inputs: Sequence[Any], backend: str) -> Implementation:
    """Return the implementation that computes `operator` on `inputs`.

    Args:
        operator: the operator.
        inputs: its arguments without `backend`.
        backend: a forced backend, or empty. An operator that has no implementation of that name
            chooses as usual; one that has it and refuses raises.

    Raises:
        BackendError: the forced implementation refuses; the message holds its reasons.
    """
    forced = operator.implementations.get(backend)
    if forced is not None:
        reasons = forced.refusals(*inputs)
        if reasons:
            raise BackendError(f"{operator.name} cannot run on '{backend}': " + "; ".join(reasons))
        return forced
    for implementation in operator.implementations.values():
        if not implementation.refusals(*inputs) and not implementation.declines(*inputs):
            return implementation
    raise BackendError(f"{operator.name} has no implementation for these inputs")


@dataclass(frozen=True)
class Explanation:
    """Why an implementation was chosen: its name, and what each has against the inputs."""

    operator: str
    chosen: str
    refusals: dict[str, list[str]]
    declines: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.chosen}"]
        for name, reasons in self.refusals.items():
            if name == self.chosen:
                verdict = "chosen"
            elif reasons:
                verdict = "; ".join(reasons)
            elif self.declines[name]:
                verdict = "can run, declines: " + "; ".join(self.declines[name])
            else:
                verdict = "can run, less preferred"
            lines.append(f"  {name}: {verdict}")
        return "\n".join(lines)


def explain(op_name: str, *inputs: Any) -> Explanation:
    """Say which implementation an operator chooses for some inputs, and what the others refuse.

    Args:
        op_name: a name in `resunet_fast.registry.OPERATORS`, such as "bn_act".
        inputs: the operator's leading arguments; the rest take the schema's defaults.

    Raises:
        ValueError: there is no operator of that name.
    """
    operator = OPERATORS.get(op_name)
    if operator is None:
        raise ValueError(f"op_name: expected one of {sorted(OPERATORS)}, got {op_name!r}")
    *arguments, _ = operator.complete(inputs)
    refusals = {
        name: implementation.refusals(*arguments)
        for name, implementation in operator.implementations.items()
    }
    declines = {
        name: [] if refusals[name] else implementation.declines(*arguments)
        for name, implementation in operator.implementations.items()
    }
    chosen = select(operator, arguments, forced_backend()).name
    return Explanation(op_name, chosen, refusals, declines)


# A module global, like torch's own backend switches: torch.compile guards on it and recompiles when
# it changes, which it does not for context variables and thread-locals.
_forced = ""
_availability: dict[str, Callable[[], list[str]]] = {}


def register_backend(name: str, unavailable: Callable[[], list[str]]) -> None:
    """Announce a backend and how to ask why this machine cannot run it (empty: it can)."""
    _availability[name] = unavailable


def backends() -> dict[str, list[str]]:
    """Return every backend with the reasons why this machine cannot run it (empty: it can)."""
    return {name: _availability[name]() for name in PREFERENCE if name in _availability}


def forced_backend() -> str:
    """Return the backend forced by :func:`use_backend`, or an empty string."""
    return _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for every operator called inside the `with`, process-wide.

    It is captured when an operator's forward runs and travels with it: its backward uses the same
    backend wherever and whenever it runs. Operators without an implementation of that name choose
    as usual.

    Args:
        name: "reference", "cpu", "cuda", "cudnn" or "triton".

    Raises:
        ValueError: there is no such backend in this version.
        BackendError: this machine cannot run it; the message says why.
    """
    if name not in _availability:
        raise ValueError(f"backend: expected one of {sorted(_availability)}, got {name!r}")
    reasons = _availability[name]()
    if reasons:
        raise BackendError(f"backend '{name}' cannot run here: " + "; ".join(reasons))
    global _forced
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous
