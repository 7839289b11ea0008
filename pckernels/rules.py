"""The learning rules, as data: no tensors here, and no code that runs them (design: a rule reaches a backend as data)."""

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

Nudge = float | tuple[str, float]
SWEEPS = ("jacobi", "top_down", "red_black")


@dataclass(frozen=True)
class Dynamics:
    """What a backend needs to know of a rule; backends know no rule by name.

    Attributes:
        moves: "values" (predictions follow the moving values), "errors" (predictions stay at the feed-forward pass) or
            "free_errors" (values follow the moving errors by a forward pass).
        steps: T, or None for the depth of the graph.
        rate, momentum, sweep, tolerance: as in Strict.
        closed_form: give the T-step errors by backward sweeps in place of the steps.
        nested: relax one time step after the other, from the last to the first.
        learn_on_arrival: on the levelled graph, a vertex learns after as many updates as its distance, not after T.
        learn_at_each_step: values and weights move together at every step, in place of values first and weights at the end.
        weight_rate: by how much of their reduced gradient the weights then move; None leaves that to the call's optimizer.
        nudges: one relaxation for each factor beta of the loss in F; what is learned is their mean, each divided by its beta.
        feedback, derivative, error_weights: as in Relaxed.
        stale_errors: weights learn from the errors of before the last step, at the values after it.
        halving: after a step in which the energy of any sample rose the rate is halved; after another step in which 2 F fell by less
            than halving * rate / units, a mean over samples, inference stops. None: neither.
        clamp: what vertices send back, and gradients, are clamped to +- this, and weights learn twice (backends/published_code.py).
    """

    moves: str
    steps: int | None
    rate: float
    momentum: float = 0.0
    sweep: str = "jacobi"
    tolerance: float | None = None
    closed_form: bool = False
    nested: bool = False
    learn_on_arrival: bool = False
    learn_at_each_step: bool = False
    weight_rate: float | None = None
    nudges: tuple[float, ...] = (1.0,)
    feedback: str = "symmetric"
    derivative: bool = True
    error_weights: str = "identity"
    stale_errors: bool = False
    halving: float | None = None
    clamp: float | None = None

    @property
    def has_own_feedback(self) -> bool:
        """Whether errors come back by another way than the transposed Jacobian of the prediction."""
        return self.feedback != "symmetric" or not self.derivative

    @property
    def has_error_weights(self) -> bool:
        """Whether a value is compared with a mixture of its vertex's prediction."""
        return self.error_weights != "identity"

    @property
    def is_nudged(self) -> bool:
        """Whether the loss pulls with another factor than 1: then no target is the value of an output."""
        return self.nudges != (1.0,)


@dataclass(frozen=True)
class Rule:
    """A way to relax the value nodes of a network before its weights learn.

    `exact` says which family a rule belongs to. Exact rules carry errors from the feed-forward pass to backprop's
    gradient; there BatchNorm uses live batch statistics with their full Jacobian, as backprop does. The other rules
    descend the energy F, and hold every statistic of the feed-forward pass constant.
    """

    exact: ClassVar[bool]

    def __new__(cls, *args: Any, **options: Any) -> "Rule":
        """Refuse an option that only other rules have, in a sentence that names them."""
        for name in options:
            owners = [rule.__name__ for rule in Rule.__subclasses__() if name in _options_of(rule)]
            if owners and name not in _options_of(cls):
                raise TypeError(f"{name}= is an option of {' and '.join(owners)}, not of {cls.__name__}; drop it, or choose such a rule.")
        return super().__new__(cls)

    @cached_property  # every call asks for it several times
    def dynamics(self) -> Dynamics:
        """The rule as a backend sees it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Strict(Rule):
    """Gradient descent of the energy F on the value nodes, predictions recomputed at every step.

    Args:
        steps: T, the number of inference steps; 0 leaves the feed-forward values.
        rate: step size of the value nodes, > 0.
        momentum: in [0, 1); velocity <- momentum * velocity + drive.
        sweep: "jacobi" moves every node at once; "top_down" moves distance 1, 2, .. in turn; "red_black" the odd
            distances, then the even. One step is one full sweep.
        tolerance: a sample rests after the first step in which no entry of its value nodes moved by more than this
            (absolute, in the units of the values); the steps end when all samples rest. None runs all steps.
        nudge: beta, not 0, of either sign: the values descend F_beta = hidden energy + beta * loss, and what is learned is divided
            by beta. Relaxed to equilibrium it is backprop's gradient up to O(beta). ("centered", beta), beta > 0: the mean of
            what is learned at +beta and at -beta, each relaxed from the feed-forward start; then up to O(beta^2). None is 1.
            Values, errors, energy and history are those of F_beta, of the +beta relaxation where there are two: the error
            of an output is -beta dloss/dmu, its value mu. `inference.loss` is the loss itself.

    Source: Rao & Ballard 1999; Whittington & Bogacz 2017; "Strict" after Rosenbaum 2022 (arXiv 2106.13082). Nudging is that of
    equilibrium propagation (arXiv 1602.05179), centered in predictive coding as in arXiv 2606.03584.
    """

    exact: ClassVar[bool] = False

    steps: int
    rate: float
    momentum: float = 0.0
    sweep: str = "jacobi"
    tolerance: float | None = None
    nudge: Nudge | None = None

    def __post_init__(self) -> None:
        require_descent(self.steps, self.rate, self.momentum, self.sweep)
        if self.tolerance is not None:
            require_number("tolerance", self.tolerance, above=0.0)
        require_nudge(self.nudge)

    @cached_property
    def dynamics(self) -> Dynamics:
        return Dynamics("values", self.steps, self.rate, self.momentum, self.sweep, self.tolerance, nudges=_betas(self.nudge))


@dataclass(frozen=True)
class ErrorOptimization(Rule):
    """Gradient descent of the energy F on the errors themselves; the values follow by a forward pass (ePC).

    With v_i = mu_i(v_pa(i)) + eps_i, F(eps) = sum of 1/2 ||eps_i||^2 + loss(mu_out), and with delta_i = -dL/dv_i through that
    pass: velocity_i <- momentum * velocity_i + (delta_i - eps_i); eps_i <- eps_i + rate * velocity_i. Weights then learn
    locally, from eps_i and the values v_pa(i), as with every rule.

    It has the equilibria of Strict, and on deep networks without momentum needs far fewer steps: what the loss says reaches every
    vertex in one step, undamped. Its inference is not local: each step is a forward pass and a backward sweep over the whole graph.

    Args:
        steps: T, the number of inference steps; 0 leaves the feed-forward pass. The paper takes 5.
        rate: step size of the errors, > 0. The paper takes 0.001, so small that the errors are nearly rate * steps * delta.
        momentum: in [0, 1); velocity <- momentum * velocity + drive.
        sweep: as in Strict; here each group of a sweep costs a pass forwards and back.

    Source: Goemaere et al. 2025 (arXiv 2505.20137).
    """

    exact: ClassVar[bool] = False

    steps: int
    rate: float
    momentum: float = 0.0
    sweep: str = "jacobi"

    def __post_init__(self) -> None:
        require_descent(self.steps, self.rate, self.momentum, self.sweep)

    @cached_property
    def dynamics(self) -> Dynamics:
        return Dynamics("free_errors", self.steps, self.rate, self.momentum, self.sweep)


@dataclass(frozen=True)
class Incremental(Rule):
    """Values and weights descend the energy F together, at every step, from the same old state (iPC).

    Step t, with everything on the right from the state before it: v_i <- v_i - rate dF/dv_i as in Strict, and
    theta_i <- theta_i - weight_rate dF/dtheta_i, a local update; then predictions and errors are those of the new values and the new
    weights. From the feed-forward start the first step moves the weights of the output alone, by backprop's gradient there.

    `PCNetwork.backward` and `infer` move a copy of the weights, by weight_rate times the reduced gradient, and leave the module's
    own alone; `backward` adds the sum of the T gradients to `.grad`. `PCNetwork.step` moves the module's own parameters, by
    its optimizer at each of the T steps; weight_rate then has no part in it. `inference.energy` is F(v_t, theta_t) at t = 0 .. T, and
    `inference.values` and `errors` are of v_T and theta_T.

    Args:
        steps: T, the number of steps, and of moves of the weights.
        rate: step size of the value nodes, > 0.
        weight_rate: step size of the weights in `backward` and `infer`, at least 0; None where only `step` is called.
        momentum: of the value nodes, in [0, 1); velocity <- momentum * velocity + drive.
        sweep: of the value nodes, as in Strict. Weights move once a step, by their gradient at its start.

    Source: Salvatori et al. 2022 (arXiv 2212.00720).
    """

    exact: ClassVar[bool] = False

    steps: int
    rate: float
    weight_rate: float | None = None
    momentum: float = 0.0
    sweep: str = "jacobi"

    def __post_init__(self) -> None:
        require_descent(self.steps, self.rate, self.momentum, self.sweep)
        if self.weight_rate is not None:
            require_number("weight_rate", self.weight_rate, at_least=0.0)

    @cached_property
    def dynamics(self) -> Dynamics:
        course = Dynamics("values", self.steps, self.rate, self.momentum, self.sweep)
        return replace(course, learn_at_each_step=True, weight_rate=self.weight_rate)


@dataclass(frozen=True)
class FixedPrediction(Rule):
    """Errors relax while predictions and Jacobians stay at the feed-forward pass (the fixed-prediction assumption).

    Args:
        steps: T, the number of inference steps.
        rate: in (0, 2), where the errors converge to backprop's deltas; at 1 with steps >= depth they equal them.
        solver: "closed_form" gives the T-step errors from backward sweeps; "iterate" runs the T steps.
        order: "global" relaxes the whole graph at once; "nested" one time step of a recurrent graph after the other,
            from the last to the first.

    Source: Millidge, Tschantz & Buckley 2020 (arXiv 2006.04182).
    """

    exact: ClassVar[bool] = True

    steps: int
    rate: float
    solver: str = "closed_form"
    order: str = "global"

    def __post_init__(self) -> None:
        require_steps(self.steps)
        require_fixed_prediction_rate(self.rate)
        require_choice("solver", self.solver, ("closed_form", "iterate"))
        require_choice("order", self.order, ("global", "nested"))

    @cached_property
    def dynamics(self) -> Dynamics:
        return Dynamics("errors", self.steps, self.rate, closed_form=self.solver == "closed_form", nested=self.order == "nested")


@dataclass(frozen=True)
class ZeroDivergence(Rule):
    """Strict dynamics at rate 1 on the levelled graph; a vertex at distance d learns after d updates: exactly backprop.

    Args:
        solver: "sweep" gives the same numbers in one backward sweep; "iterate" runs the literal levelled dynamics.

    Source: Song et al. 2020 (Z-IL); Salvatori et al. 2021 (arXiv 2103.04689) for arbitrary graphs.
    """

    exact: ClassVar[bool] = True

    solver: str = "sweep"

    def __post_init__(self) -> None:
        require_choice("solver", self.solver, ("sweep", "iterate"))

    @cached_property
    def dynamics(self) -> Dynamics:
        if self.solver == "sweep":
            return Dynamics("errors", None, 1.0, closed_form=True, learn_on_arrival=True)
        return Dynamics("values", None, 1.0, learn_on_arrival=True)


@dataclass(frozen=True)
class Relaxed(Rule):
    """Any other rule with less to demand of biology: no weight transport, no f' on the way back, no one-to-one error connections.

    The value update of the rule becomes
        drive_i = -eps_i + sum over children j of B_j^T eps_j,   eps_i = v_i - E_i mu_i,
    where B_j is d mu_j / d v_i with backward weights psi in place of the weights W, and with 1 in place of f'. The weight update
    is the rule's own, from these errors: -(d mu_i / d theta_i)^T eps_i, with W and with f'. Symmetric, True, identity is the rule itself.

    Args:
        rule: Strict, ErrorOptimization, Incremental, FixedPrediction or ZeroDivergence.
        feedback: "symmetric" (W^T), or backward weights psi, one for each weight that errors come back through: "learned" by the
            Hebbian product that W learns by, transposed, so that psi gets the `.grad` of W; or "random", fixed (feedback alignment).
        derivative: False drops f' of activation functions; pooling, norms, softmax and products of values keep their Jacobians.
        error_weights: "identity"; or a matrix E_i for each hidden vertex over its features (channels where a value has four or five
            dimensions, else the last one), "learned" by dF/dE_i = -eps_i mu_i^T, or "random". No value starts at rest then:
            every error is (1 - E_i) mu_i at first, so there is no light cone and no closed form, and the literal steps run.

    What is learned or random are parameters of the network, `PCNetwork.extra_parameters()`, made at its first trace from a seed
    of their names: psi ~ N(0, s^2) with s the root mean square of W's entries then, E_i ~ N(0, 1 / features).

    Closed forms: with feedback= and derivative= alone FixedPrediction is still linear in its errors, and they are c_k(T) times
    what one backward sweep by B gives; ZeroDivergence's one sweep is as exact. Both run as such.

    Source: Millidge, Tschantz, Seth & Buckley 2020 (arXiv 2010.01047), whose E_i have no part in the way back, as here; its
    published code moves E_i up the energy, by the other sign. Over ZeroDivergence it is this package's own combination.
    """

    exact: ClassVar[bool] = False  # of an instance: that of its rule

    rule: Rule
    feedback: str = "symmetric"
    derivative: bool = True
    error_weights: str = "identity"

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule) or isinstance(self.rule, Relaxed):
            raise TypeError(f"Relaxed takes another rule, as Relaxed(Strict(steps=20, rate=0.1)); got {type(self.rule).__name__}.")
        require_choice("feedback", self.feedback, ("symmetric", "learned", "random"))
        require_choice("error_weights", self.error_weights, ("identity", "learned", "random"))
        if not isinstance(self.derivative, bool):
            raise TypeError(f"derivative must be True or False; got {type(self.derivative).__name__}.")
        if self.error_weights != "identity" and self.rule.dynamics.moves == "free_errors":
            raise ValueError(
                f"error_weights= weighs the comparison of a value with its prediction, and {type(self.rule).__name__} compares none: "
                'its errors are what moves. Use error_weights="identity", or Strict, which has the same equilibria.'
            )
        object.__setattr__(self, "exact", self.rule.exact)

    @cached_property
    def dynamics(self) -> Dynamics:
        rule = self.rule
        if self.error_weights != "identity" and isinstance(rule, FixedPrediction | ZeroDivergence):
            rule = replace(rule, solver="iterate")
        return replace(rule.dynamics, feedback=self.feedback, derivative=self.derivative, error_weights=self.error_weights)


def require_steps(steps: Any) -> None:
    """Raise unless `steps` is a whole number of inference steps."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, the number of inference steps T; got {type(steps).__name__}.")
    if steps < 0:
        raise ValueError(f"steps must be 0 or more; got {steps}.")


def require_descent(steps: Any, rate: Any, momentum: Any, sweep: Any) -> None:
    """Raise unless these can be the course of a rule that descends the energy."""
    require_steps(steps)
    require_number("rate", rate, above=0.0)
    require_number("momentum", momentum, at_least=0.0, below=1.0)
    require_choice("sweep", sweep, SWEEPS)


def require_nudge(nudge: Any) -> None:
    """Raise unless `nudge` is None, beta, or ("centered", beta)."""
    if isinstance(nudge, tuple):
        if len(nudge) != 2 or nudge[0] != "centered":
            raise ValueError(f'nudge must be beta or ("centered", beta); got {nudge!r}.')
        require_number("the beta of a centered nudge", nudge[1], above=0.0)
    elif nudge is not None:
        if isinstance(nudge, bool) or not isinstance(nudge, int | float):
            raise TypeError(f'nudge must be a float beta, or the tuple ("centered", beta); got {type(nudge).__name__}.')
        if nudge == 0 or not math.isfinite(nudge):
            raise ValueError(f"nudge must be finite and not 0, since what is learned is divided by it; got {nudge}.")


def _betas(nudge: Nudge | None) -> tuple[float, ...]:
    if isinstance(nudge, tuple):
        return float(nudge[1]), -float(nudge[1])
    return (1.0,) if nudge is None else (float(nudge),)


def _options_of(rule: type[Rule]) -> set[str]:
    return {option.name for option in fields(rule)}


def require_number(
    name: str,
    value: Any,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise unless `value` is a finite number in the given range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a float; got {type(value).__name__}.")
    if not (math.isfinite(value) and above < value < below and at_least <= value):
        raise ValueError(f"{name} must be {_range(above, at_least, below)}; got {value}.")


def require_fixed_prediction_rate(rate: Any) -> None:
    """Raise unless 0 < rate < 2, where fixed prediction converges."""
    require_number("rate", rate)
    if not 0.0 < rate < 2.0:
        raise ValueError(f"rate must lie in (0, 2), where fixed prediction converges; got {rate}. Use 1.0 for backprop's gradient.")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, one of {', '.join(choices)}; got {type(value).__name__}.")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def _range(above: float, at_least: float, below: float) -> str:
    parts = []
    if above > -math.inf:
        parts.append(f"greater than {above:g}")
    if at_least > -math.inf:
        parts.append(f"at least {at_least:g}")
    if below < math.inf:
        parts.append(f"below {below:g}")
    return " and ".join(["finite", *parts])
