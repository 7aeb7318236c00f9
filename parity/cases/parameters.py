"""What a layer learns: one row per array. Oracle, runners, recordings, checkpoints and reports read this table."""

from collections.abc import Callable
from typing import Any, NamedTuple

from parity.cases.case import Case, Kind


class Parameter(NamedTuple):
    """An array that a layer learns."""

    name: str
    axes: str  # letters; H is the hidden width of the shared expert
    stage: str  # the stage that takes it
    dtype: Kind
    there: Callable[[Case], Any]  # whether a case has it
    learned: bool = True  # whether it has a gradient

    @property
    def gradient(self) -> str:
        """The name of its gradient, as stage/value."""
        return f"{self.stage}/d{self.name}"

    @property
    def shared(self) -> bool:
        """Whether it is the shared expert's."""
        return self.name.startswith("shared")

    @property
    def per_rank(self) -> bool:
        """Whether each rank holds only its own experts' part. Other parameters are the same on all ranks."""
        return self.stage == "apply_experts" and self.axes[0] == "E"


def always(case: Case) -> bool:  # noqa: ARG001
    """Every case has it."""
    return True


PARAMETERS = (
    Parameter("router", "D E", "route", "logits", always),
    Parameter("w_gate", "E D F", "apply_experts", "case", lambda case: case.gated),
    Parameter("w_up", "E D F", "apply_experts", "case", always),
    Parameter("w_down", "E F D", "apply_experts", "case", always),
    Parameter("router_bias", "E", "route", "logits", lambda case: case.router_bias),
    Parameter("selection_bias", "E", "route", "score", lambda case: case.selection_bias, learned=False),
    Parameter("expert_scale", "E", "route", "score", lambda case: case.expert_scale),
    Parameter("b_gate", "E F", "apply_experts", "case", lambda case: case.gated and case.expert_bias),
    Parameter("b_up", "E F", "apply_experts", "case", lambda case: case.expert_bias),
    Parameter("b_down", "E D", "apply_experts", "case", lambda case: case.expert_bias),
    Parameter("shared_w_gate", "D H", "apply_experts", "case", lambda case: case.gated and case.shared_hidden),
    Parameter("shared_w_up", "D H", "apply_experts", "case", lambda case: case.shared_hidden),
    Parameter("shared_w_down", "H D", "apply_experts", "case", lambda case: case.shared_hidden),
    Parameter("shared_score", "D", "apply_experts", "case", lambda case: case.shared_score),
)
BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


class Parameters(NamedTuple):
    """The values of the parameters, for all experts; None where a case has no such parameter."""

    router: Any
    w_gate: Any = None
    w_up: Any = None
    w_down: Any = None
    router_bias: Any = None
    selection_bias: Any = None
    expert_scale: Any = None
    b_gate: Any = None
    b_up: Any = None
    b_down: Any = None
    shared_w_gate: Any = None
    shared_w_up: Any = None
    shared_w_down: Any = None
    shared_score: Any = None

    def there(self) -> dict[str, Any]:
        """The values that are not None, by name."""
        return {name: a for name, a in self._asdict().items() if a is not None}


def parameters_of(case: Case) -> tuple[Parameter, ...]:
    """The parameters that a case has."""
    return tuple(parameter for parameter in PARAMETERS if parameter.there(case))


def shape(case: Case, parameter: Parameter) -> tuple[int, ...]:
    """The shape of a parameter, for all experts."""
    size = {"D": case.width, "E": case.experts, "F": case.hidden, "H": case.shared_hidden}
    return tuple(size[letter] for letter in parameter.axes.split())
