"""The offline play of all ranks' collectives."""

import pytest

from mindformers_ext.lowering.calls import Call
from mindformers_ext.lowering.deadlock import DeadlockError, check, traffic


def reduce(*ranks: int, elements: int = 8, how: str = "sum") -> Call:
    return Call("AllReduce", ranks, (("reduce", how),), "float", elements, 4 * elements, "layer/AllReduce")


def send(source: int, target: int, tag: int = 0) -> Call:
    return Call("Send", (source, target), (tag,), "float", 8, 32, "Send")


def receive(source: int, target: int, tag: int = 0) -> Call:
    return Call("Receive", (source, target), (tag,), "float", 8, 32, "Receive")


def test_matching_sequences_run():
    check([[reduce(0, 1), send(0, 2), receive(2, 0)], [reduce(0, 1)], [receive(0, 2), send(2, 0)]])


def test_crossed_receives_are_named():
    with pytest.raises(DeadlockError) as found:
        check([[receive(1, 0), send(0, 1)], [receive(0, 1), send(1, 0)]])
    assert "rank 0 waits in collective 1 of 2: Receive 1 -> 0 of 8 float (Receive)" in str(found.value)
    assert "rank 1 waits in collective 1 of 2: Receive 0 -> 1" in str(found.value)


def test_groups_in_another_order_block():
    with pytest.raises(DeadlockError, match=r"rank 1 waits in collective 1 of 2: AllReduce \[1, 2\]"):
        check([[reduce(0, 1), reduce(0, 2)], [reduce(1, 2), reduce(0, 1)], [reduce(0, 2), reduce(1, 2)]])


def test_missing_peer_blocks():
    with pytest.raises(DeadlockError, match="rank 0 waits in collective 1 of 1"):
        check([[reduce(0, 1)], []])


def test_disagreement_is_named():
    with pytest.raises(DeadlockError, match="rank 0 runs AllReduce .* of 8 .* while rank 1 runs AllReduce .* of 4"):
        check([[reduce(0, 1)], [reduce(0, 1, elements=4)]])
    with pytest.raises(DeadlockError, match="while rank 1 runs"):
        check([[reduce(0, 1)], [reduce(0, 1, how="max")]])


def test_sender_may_be_two_messages_ahead_and_no_more():
    check([[send(0, 1)] * 2 + [reduce(0, 1)], [reduce(0, 1)] + [receive(0, 1)] * 2])
    with pytest.raises(DeadlockError, match="rank 0 waits in collective 3 of 4: Send 0 -> 1"):
        check([[send(0, 1)] * 3 + [reduce(0, 1)], [reduce(0, 1)] + [receive(0, 1)] * 3])


def test_message_that_nobody_receives():
    with pytest.raises(DeadlockError, match="nobody receives: Send 0 -> 1"):
        check([[send(0, 1)], []])


def test_traffic():
    assert traffic([reduce(0, 1), reduce(0, 1), send(0, 1)]) == {"AllReduce": (2, 64), "Send": (1, 32)}
