"""The optimizer's update in a rank's graph as one operator: some 25 operators per parameter become AdamW for all.

Extends lowering.py. MindSpore writes MindFormers' AdamW out for every parameter, with a copy of each state before and
after; on CPU these thousands of small operators took as long as the matrix products. A function is replaced only when
every single assignment in it is AdamW's own formula (see cpu_kernels/adamw.cc); any other optimizer stays as it is.
Numbers that the step multiplies all gradients with before (the loss scale taken out, the clip coefficient) become the
operator's factor.
"""

from dataclasses import dataclass

from mindformers_ext.cpu_kernels.library import library_path
from mindformers_ext.lowering.graph import Graph, constant, made, number_made
from mindformers_ext.lowering.patterns import Nodes, NoMatch, op
from mindformers_ext.rank_compiler import mind_ir as pb

PASS_ON = ("Depend", "Load", "TensorMove")  # their first input is their value
MONADS = ("UMonadType", "IOMonadType")  # inputs that only order what happens: to memory, and to the outside
HARMLESS = ("Load", "UpdateState", "Depend", "MakeTuple", "TensorMove")  # may hold a state and write nothing


@dataclass(frozen=True)
class Update:
    """The new value of one parameter, as the names of what it is made of."""

    parameter: str
    first: str
    second: str
    gradient: str
    rate: str
    decay: float
    beta1: float
    beta2: float
    eps: float
    step: str  # the counter, after this step


NEW_FIRST = op("Add", op("Mul", "first", "beta1"), op("Mul", "gradient", "rest1"))
NEW_SECOND = op("Addcmul", op("Mul", "second", "beta2"), "gradient", "gradient", "rest2")
POWER1 = op("Sub", "one", op("Pow", "beta1", op("Cast", "step", "float")))
POWER2 = op("Sub", "one", op("Pow", "beta2", op("Cast", "step", "float")))
DIRECTION = op("Div", "first", op("Add", op("Sqrt", op("Div", "second", POWER2)), "eps"))
STEP = op("Mul", DIRECTION, op("Div", "rate", POWER1))
DECAYED = op("Mul", "parameter", op("Sub", "one", op("Mul", "rate", "decay")))
NEW_PARAMETER = (op("Sub", DECAYED, STEP), op("Sub", "parameter", STEP))


class UpdateFunction(Nodes):
    """A function of the model that may be AdamW's update."""

    def __init__(self, graph: Graph, function: pb.GraphProto):
        super().__init__(graph.primitives, graph.constants, function.node, PASS_ON)
        self.function = function

    def updates(self) -> list[Update]:
        """What is assigned, if all of it together is AdamW. Raises NoMatch."""
        assigned: dict[str, str] = {}
        counters = []
        for node in self.function.node:
            operator = self.operator(node)
            if operator == "Assign":
                if assigned.setdefault(node.input[0], node.input[1]) != node.input[1]:
                    raise NoMatch(f"{node.input[0]} is assigned twice")
            elif operator == "AssignAdd":
                counters.append(node.input[0])
            elif operator not in HARMLESS and self._has_effect(node):
                raise NoMatch(f"{operator} has an effect")
        found = [self._update(name, assigned) for name in assigned if not self._is_state(name, assigned)]
        whole = {name for update in found for name in (update.parameter, update.first, update.second)}
        if not found or whole != set(assigned) or set(counters) != {update.step for update in found}:
            raise NoMatch("something else is assigned")
        if len({(u.rate, u.beta1, u.beta2, u.eps, u.step) for u in found}) != 1:
            raise NoMatch("parameters are updated with different rules")
        return found

    def _has_effect(self, node: pb.NodeProto) -> bool:
        primitive = self.primitive(node)
        return primitive is not None and any("side_effect" in attribute.name for attribute in primitive.attribute)

    def _is_state(self, name: str, assigned: dict[str, str]) -> bool:
        return self.maker(self.origin(assigned[name]))[0] != "Sub"

    def _update(self, parameter: str, assigned: dict[str, str]) -> Update:
        found = self.match_one(assigned[parameter], NEW_PARAMETER, parameter=parameter)
        for state, pattern in (("first", NEW_FIRST), ("second", NEW_SECOND)):
            if found[state] not in assigned:
                raise NoMatch(f"{found[state]} is not assigned")
            self.match(assigned[found[state]], pattern, found)
        numbers = {name: self.number(found[name]) for name in ("beta1", "beta2", "eps", "one", "rest1", "rest2")}
        decay = self.number(found["decay"]) if "decay" in found else 0.0
        rests = abs(numbers["rest1"] + numbers["beta1"] - 1) + abs(numbers["rest2"] + numbers["beta2"] - 1)
        if numbers["one"] != 1 or rests > 1e-6:
            raise NoMatch("the moments are no running means")
        rule = {name: numbers[name] for name in ("beta1", "beta2", "eps")}
        places = {name: found[name] for name in ("parameter", "first", "second", "gradient", "rate", "step")}
        return Update(**places, decay=decay, **rule)


def fuse_updates(graph: Graph) -> None:
    """Replace every function of the model that is AdamW's update by one operator."""
    for function in graph.model.functions:
        candidate = UpdateFunction(graph, function)
        try:
            updates = candidate.updates()
        except NoMatch:
            continue
        _replace(graph, candidate, updates)


def _replace(graph: Graph, old: UpdateFunction, updates: list[Update]) -> None:
    """Let the function compute the learning rate and then the one operator; its value stays."""
    function, one = old.function, updates[0]
    states = [given.name for given in function.input if given.denotation in MONADS]
    value = function.output[0].name
    while old.maker(value)[0] == "Depend":
        value = old.made_by[value].input[0]
    if value in old.made_by or not states:
        raise ValueError(f"'{function.name}' updates all weights, but returns something that it computes")
    prefix = f"{function.name}:adamw"
    numbers = [constant(f"{prefix}/decay", [update.decay for update in updates])]
    factor = _absorb_factor(graph, function, [update.gradient for update in updates])
    if factor is None:
        numbers.append(constant(f"{prefix}/factor", [1.0]))
        factor = numbers[-1].output[0]
    columns = ("parameter", "first", "second", "gradient")
    tensors = [getattr(update, column) for column in columns for update in updates]
    inputs = [one.step, one.rate, factor, numbers[0].output[0], *tensors, states[0]]
    update = number_made(prefix, inputs)
    rule = {name: repr(getattr(one, name)) for name in ("beta1", "beta2", "eps")}
    graph.custom(update, f"{library_path()}:AdamW", side_effect_mem=True, **rule)
    result, nodes = value, []
    for i, after in enumerate((prefix, *states[1:])):
        node = made(f"{prefix}/result{i}", [result, after])
        graph.use(node, "Depend")
        nodes.append(node)
        result = node.output[0]
    needed = _needed(old, one.rate)
    kept = [node for node in function.node if node.output[0] in needed or node.op_type == "Constant"]
    kept = [pb.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del function.node[:]
    function.node.extend([*kept, *numbers, update, *nodes])
    function.output[0].name = result


def _absorb_factor(graph: Graph, function: pb.GraphProto, gradients: list[str]) -> str | None:
    """Give the function the gradients before they are multiplied with numbers; returns its new input, the product.

    None where the function is not called once from the main graph or makes its gradients itself, or where no number
    multiplies them all.
    """
    calls = [node for node in graph.nodes if function.name in node.input]
    if len(calls) != 1 or graph.operator(calls[0]) != "Partial":
        return None
    given = calls[0].input  # the function, and what it gets
    place_of = {entry.name: place for place, entry in enumerate(function.input, 1)}
    if not place_of.keys() >= set(gradients):
        return None
    places = [place_of[name] for name in gradients]
    plain, numbers = graph.unscaled([given[place] for place in places])
    if not numbers:
        return None
    for place, name in zip(places, plain, strict=True):
        given[place] = name
    name = f"{function.name}:factor"
    first_monad = next(i for i, entry in enumerate(function.input) if entry.denotation in MONADS)
    entry = pb.ValueInfoProto(name=name)
    entry.tensor.add(dims=[1], data_type=pb.TensorProto.FLOAT)
    function.input.insert(first_monad, entry)
    given.insert(first_monad + 1, graph.product(f"{name}/given", numbers))
    return name


def _needed(old: UpdateFunction, name: str) -> set[str]:
    """Everything in the function that `name` is computed from."""
    needed, waiting = set(), [name]
    while waiting:
        node = old.made_by.get(waiting.pop())
        if node is not None and node.output[0] not in needed:
            needed.add(node.output[0])
            waiting.extend(node.input)
    return needed
