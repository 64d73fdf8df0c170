"""Check that the collectives of all ranks fit together, before anything runs."""

from collections import Counter, deque
from collections.abc import Sequence

from mindformers_ext.errors import UserError
from mindformers_ext.lowering.calls import MESSAGES, Call

MAILBOX_DEPTH = 2  # kMailboxDepth of shared_job.h: messages of one tag that a sender may be ahead


class DeadlockError(UserError, ValueError):
    """The ranks would wait for each other for ever, or disagree about a collective."""


def check(sequences: Sequence[Sequence[Call]]) -> None:
    """Play the collectives of one step of all ranks; raises DeadlockError with the ranks and operations that block.

    `sequences[r]` is what `lowering.lower` returned for rank r.
    """
    place = [0] * len(sequences)
    sent: dict[tuple, deque[Call]] = {}
    moved = True
    while moved:
        moved = False
        for rank, calls in enumerate(sequences):
            while place[rank] < len(calls) and _advance(sequences, place, sent, rank):
                moved = True
    blocked = [rank for rank, calls in enumerate(sequences) if place[rank] < len(calls)]
    if blocked:
        waits = [f"rank {r} waits in collective {place[r] + 1} of {len(sequences[r])}: " for r in blocked]
        lines = [wait + str(sequences[r][place[r]]) for r, wait in zip(blocked, waits, strict=True)]
        raise DeadlockError("the ranks would block each other:\n" + "\n".join(lines))
    left = [queue[0] for queue in sent.values() if queue]
    if left:
        raise DeadlockError(f"nobody receives: {left[0]}")


def _advance(sequences, place: list[int], sent: dict, rank: int) -> bool:
    """Run the next collective of `rank` (with all its peers) if it can run."""
    call = sequences[rank][place[rank]]
    if call.operation in MESSAGES:
        return _message(call, place, sent, rank)
    waiting = [sequences[peer][place[peer]] if place[peer] < len(sequences[peer]) else None for peer in call.ranks]
    if any(other is None or other.operation in MESSAGES or other.ranks != call.ranks for other in waiting):
        return False
    for peer, other in zip(call.ranks, waiting, strict=True):
        if _agreed(other) != _agreed(call):
            raise DeadlockError(f"rank {rank} runs {call} while rank {peer} runs {other}")
    if call.operation == "AlltoAllV":
        _check_counts(waiting)
    for peer in call.ranks:
        place[peer] += 1
    return True


def _check_counts(calls: Sequence[Call]) -> None:
    """What each member sends to another is what that one expects, where it is known before the step."""
    if not all(call.detail for call in calls):
        return
    for i, sender in enumerate(calls):
        for j, receiver in enumerate(calls):
            sent, expected = sender.detail[0][j], receiver.detail[1][i]
            if sent != expected:
                source, target = sender.ranks[i], sender.ranks[j]
                raise DeadlockError(
                    f"rank {source} sends {sent} elements to rank {target}, which expects {expected}: {sender}"
                )


def _agreed(call: Call) -> tuple:
    """What all members of a group must have in common."""
    if call.operation == "AlltoAllV":
        return call.operation, call.dtype
    return call.operation, call.detail, call.dtype, call.elements


def _message(call: Call, place: list[int], sent: dict, rank: int) -> bool:
    queue = sent.setdefault((call.ranks, call.detail), deque())
    if call.operation == "Send":
        if len(queue) == MAILBOX_DEPTH:
            return False
        queue.append(call)
    else:
        if not queue:
            return False
        message = queue.popleft()
        if (message.dtype, message.elements) != (call.dtype, call.elements):
            raise DeadlockError(f"rank {call.ranks[0]} runs {message}, rank {rank} expects {call}")
    place[rank] += 1
    return True


def traffic(calls: Sequence[Call]) -> dict[str, tuple[int, int]]:
    """{operation: (how many, bytes)} of one rank's step."""
    count, size = Counter(), Counter()
    for call in calls:
        count[call.operation] += 1
        size[call.operation] += call.bytes
    return {operation: (count[operation], size[operation]) for operation in count}
