"""MindIR in protobuf's C implementation is MindSpore's, byte for byte."""

from pathlib import Path

from mindspore.train import mind_ir_pb2

from mindformers_ext.rank_compiler import mind_ir as pb

ROOT = Path(__file__).parents[2]


def test_messages_are_mindspores():
    model = pb.ModelProto()
    node = model.graph.node.add(name="n", op_type="REF::P", input=["a", "b"], output=["c"])
    node.attribute.add(name="value", type=pb.AttributeProto.TENSORS).tensors.add(
        dims=[2, 3], data_type=pb.TensorProto.BFLOAT16, raw_data=b"\0" * 12
    )
    model.primitives.add(name="P", op_type="Add", prim_type=pb.PrimitiveProto.PRIMITIVE)
    theirs = mind_ir_pb2.ModelProto.FromString(model.SerializeToString())
    assert theirs.graph.node[0].attribute[0].tensors[0].dims == [2, 3]
    assert theirs.SerializeToString() == model.SerializeToString()
    assert pb.TensorProto.DataType.Name(pb.TensorProto.BFLOAT16) == "BFLOAT16"


def test_nobody_takes_the_slow_ones():
    """The two kinds cannot be mixed in one graph."""
    files = [file for folder in ("mindformers_ext", "scripts", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    direct = [file.name for file in files if "import mindspore.train.mind_ir_pb2" in file.read_text()]
    assert direct == []
