"""Read TensorBoard's event files without TensorBoard."""

import struct

from tensorboardX.proto.event_pb2 import Event


def read_events(path):
    """Return the events of a file, which is a series of records [length, 4 bytes, event, 4 bytes]."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found
