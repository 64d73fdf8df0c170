"""What lives at the memory peak of a rank planned at level memory: python benchmarks/graph/peak.py FOLDER

FOLDER has what `dryrun.py --level memory` or against_mindformers.py left of a rank: graph.mindir, and the order in
which the backend runs it. A value lives from its operator to its last reader in that order; parameters always do. Only
for graphs without functions, as those of one stage with accumulated gradients.
"""

import argparse
import csv
from collections import Counter, defaultdict
from pathlib import Path

from mindformers_ext.rank_compiler import mindir
from mindformers_ext.rank_compiler.operators import Tensor, operators
from mindformers_ext.rank_compiler.roofline import CHANGES_A_PART, OVERWRITES, VIEWS, size, tensors

SAME = ("Depend", "Load", "TupleGetItem", "MakeTuple", "TensorToTuple", *VIEWS)  # its values are those it was given
IN_PLACE = ("AssignAdd", *CHANGES_A_PART, *OVERWRITES)


def main() -> None:
    """Print the peak, and the values at it by operator and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (path,), (order,) = (list(folder.rglob(name)) for name in ("graph.mindir", "execute_order.csv"))
    model = mindir.load_model(path.read_bytes())
    if len(mindir.functions(model)) > 1:
        raise SystemExit(f"error: {path} has functions; compile a layout without a pipeline")
    with order.open() as file:
        place = {row["node_name"]: i for i, row in enumerate(csv.DictReader(file))}
    names = {primitive.name: primitive.op_type for primitive in model.primitives}
    made = {operator.output: operator for _, operator in operators(model)}
    sources: dict[str, tuple[str, ...]] = {}
    last: dict[str, int] = {}
    for node in model.graph.node:
        name, output = names.get(mindir.reference(node), ""), node.output[0]
        first_only = name in ("Depend", "Load", "TupleGetItem", *IN_PLACE)
        if name == "UpdateState":  # it orders, and holds nothing
            continue
        given = tuple(s for value in node.input for s in sources.get(value, ()))
        if node.domain in place and name not in SAME:
            last |= {value: max(last[value], place[node.domain]) for value in given}
        if name in SAME or name in IN_PLACE or node.domain not in place:
            sources[output] = sources.get(node.input[0], ()) if first_only and node.input else given
        elif output in made:
            sources[output], last[output] = (output,), place[node.domain]
    change: dict[int, float] = defaultdict(float)
    for value, end in last.items():
        change[place[made[value].scope]] += size(made[value].result)
        change[end + 1] -= size(made[value].result)
    live, most, peak = 0.0, 0.0, 0
    for i in sorted(change):
        live += change[i]
        most, peak = max((most, peak), (live, i))
    kept = sum(size(operator_tensor(parameter)) for parameter in model.graph.parameter)
    print(f"parameters {kept / 1e9:.1f} GB, values at the peak {most / 1e9:.1f} GB, together {(kept + most) / 1e9:.1f}")
    found: Counter = Counter()
    for value, end in last.items():
        operator = made[value]
        if place[operator.scope] <= peak <= end:
            cell = operator.scope.rpartition("/")[0].rpartition("/")[2]
            found[f"{operator.name} {' '.join(str(t.shape) for t in tensors(operator.result))} {cell}"] += size(
                operator.result
            )
    for what, moved in found.most_common(12):
        print(f"{moved / 1e9:8.2f} GB {what}")


def operator_tensor(parameter):
    """A parameter as the roofline sizes it."""
    kind = mindir.pb.TensorProto.DataType.Name(parameter.data_type).lower()
    return (Tensor(kind, tuple(parameter.dims)),)


if __name__ == "__main__":
    main()
