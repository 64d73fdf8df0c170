"""MindIR's messages, in protobuf's C implementation.

Extends mindspore.train.mind_ir_pb2 (2.9.0): MindSpore chooses the Python implementation of protobuf for its process,
in which reading, changing and writing a rank's graph takes as long as a fifth of its compilation. It can go when
MindSpore no longer does.
"""

from google.protobuf import message
from mindspore.train import mind_ir_pb2


def _messages() -> dict[str, type]:
    """The message classes by name; MindSpore's own where protobuf has no C implementation."""
    try:
        from google._upb import _message as c
    except ImportError:
        return vars(mind_ir_pb2)
    file = c.DescriptorPool().AddSerializedFile(mind_ir_pb2.DESCRIPTOR.serialized_pb)
    return {name: _message_class(c, told) for name, told in file.message_types_by_name.items()}


def _message_class(c, told) -> type:
    inner = {part.name: _message_class(c, part) for part in told.nested_types}
    return c.MessageMeta(told.name, (message.Message,), {"DESCRIPTOR": told, "__module__": __name__, **inner})


_found = _messages()
AttributeProto, GraphProto, ModelProto = (_found[f"{name}Proto"] for name in ("Attribute", "Graph", "Model"))
NodeProto, PrimitiveProto, TensorProto = (_found[f"{name}Proto"] for name in ("Node", "Primitive", "Tensor"))
ValueInfoProto = _found["ValueInfoProto"]
