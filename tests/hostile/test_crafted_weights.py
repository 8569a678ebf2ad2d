"""Malicious weights files: each is refused in one sentence, with little memory and time."""

import bz2
import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits itself by Linux's /proc")

NUMBERS = struct.pack("<4f", 0, 1, 2, 3)


# Parts of pickles: the instructions that `op` returns push one value on the stack.


def op(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def storage(key=b"0", kind=b"FloatStorage", count=None):
    kind = b"ctorch\n" + kind + b"\n"
    return b"(" + op("storage") + kind + op(key.decode()) + op("cpu") + (count or op(4)) + b"tQ"


def tensor(offset=0, shape=(4,), strides=(1,), source=None):
    window = (source or storage()) + b"".join(map(op, (offset, shape, strides, False)))
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + window + ORDERED + b"tR"


ORDERED = name("collections", "OrderedDict") + b")R"


def state(*values):
    """Return a dictionary with the keys a, b, ..."""
    items = (op(chr(ord("a") + index)) + value for index, value in enumerate(values))
    return b"}(" + b"".join(items) + b"u"


def zipped(content, numbers=NUMBERS, *, how=zipfile.ZIP_STORED, more=()):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how, compresslevel=1) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("x/data/0", numbers)
        for member, data in more:
            archive.writestr(member, data)
    return file.getvalue()


def streamed(content, *, keys=None, count=4, little=True):
    about = op({"protocol_version": 1001, "little_endian": little})
    parts = [op(0x1950A86A20F9469CFC6C), op(1001), about, content, keys or op(["0"])]
    head = b"".join(b"\x80\x02" + part + b"." for part in parts)
    return head + struct.pack("<Q", count) + NUMBERS


def both(label, content):
    """Return the same pickle in both formats."""
    return {f"{label}.zip.pth": zipped(content), f"{label}.old.pth": streamed(content)}


def safe(header, data=NUMBERS, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(start=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def renamed_twice():
    """Return a file with two members of the same name, which zipfile only warns about when it writes."""
    return zipped(state(tensor()), more=[("x/data/9", bytes(16))]).replace(b"data/9", b"data/0")


def lying(field, value):
    """Return a file whose central directory has a wrong size for a member."""
    data = bytearray(zipped(state(tensor())))
    at = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    for offset in field:
        struct.pack_into("<I", data, at + offset, value)
    return bytes(data)


def overlapping():
    """Return a file whose central directory lists the same member a thousand times."""
    many = [tensor(source=storage(str(index).encode(), count=op(250_000))) for index in range(1000)]
    items = b"".join(op(f"t{index}") + value for index, value in enumerate(many))
    data = zipped(b"}(" + items + b"u", bytes(1_000_000))
    end = data.index(b"PK\x05\x06")
    directory = data[data.index(b"PK\x01\x02") : end]
    first, last = directory[: 46 + 10], directory[46 + 10 :]
    copies = b"".join(
        last[:28] + struct.pack("<H", len(f"x/data/{i}")) + last[30:46] + f"x/data/{i}".encode()
        for i in range(1000)
    )
    tail = bytearray(data[end:])
    struct.pack_into("<HHI", tail, 8, 1001, 1001, len(first + copies))
    return data[: data.index(b"PK\x01\x02")] + first + copies + bytes(tail)


def doubled(times):
    """Return a nested tuple of 2**times numbers; both halves of each level are the same object."""
    return b"K\x01\x85" + b"".join(b"q%c2\x86" % index for index in range(times))


LARGE = 2**40
BOMB = bytes(2**28)
EVIL = b"(" + op("touch EXECUTED") + b"tR"
SYSTEM = name("posix", "system") + EVIL
TYPE = name("torch", "FloatStorage")

KINDS = {
    "build": {
        **both("on_a_storage_type", state(tensor()) + b"0" + TYPE + op({"dtype": "O"}) + b"b."),
        **both("on_a_type_in_place", state(TYPE + op({"dtype": "O", "count": 9}) + b"b")),
        **both("with_slots", state(TYPE + b"N" + op({"dtype": "O"}) + b"\x86b")),
        **both("on_a_tensor", state(tensor() + op({"offset": 10**6}) + b"b")),
        **both("on_a_storage", state(storage() + op({"count": 10**6}) + b"b")),
        **both("on_a_function", state(name("torch._utils", "_rebuild_tensor_v2") + op({}) + b"b")),
        **both("on_a_plain_dictionary", state(op({}) + op({"__class__": 1}) + b"b")),
    },
    "memo": {
        **both("far_index", b"Nr" + struct.pack("<I", 2**32 - 1) + b"0" + state(op(1))),
        **both("unset_index", state(b"j" + struct.pack("<I", 2**32 - 1))),
        **both("text_index", b"Np999999999999999\n0" + state(op(1))),
        **both("itself", b"}q\x00" + op("a") + b"h\x00s"),
        **both("doubled_shape", state(tensor()).replace(op((4,)), doubled(40), 1)),
        **both("doubled_name", b"}(" + doubled(40) + tensor() + b"u"),
        "doubled_keys.old.pth": streamed(state(tensor()), keys=b"]" + doubled(40) + b"a"),
        **both("doubled_reference", b"}" + op("a") + doubled(40) + b"Qs"),
    },
    "strides": {
        **both("zero", state(tensor(shape=(LARGE,), strides=(0,)))),
        **both("zero_twice", state(tensor(shape=(2**16, 2**16), strides=(0, 0)))),
        **both("negative", state(tensor(offset=3, strides=(-1,)))),
        **both("beyond", state(tensor(strides=(2,)))),
        **both("offset", state(tensor(offset=1))),
        **both("negative_offset", state(tensor(offset=-1, shape=(1,)))),
        **both("around_the_end_of_integers", state(tensor(shape=(2,), strides=(2**62,)))),
        **both("larger_than_integers", state(tensor(shape=(1,), strides=(2**70,)))),
        **both("of_another_number", state(tensor(shape=(2, 2)))),
        **both("of_texts", state(tensor(strides=("1",)))),
        **both("of_a_storage_that_lies", state(tensor(source=storage(count=op(LARGE))))),
        **both("many_axes", state(tensor(shape=(1,) * 70, strides=(1,) * 70))),
    },
    "deflate": {
        "numbers.pth": zipped(
            state(tensor(source=storage(count=op(2**26)))), BOMB, how=zipfile.ZIP_DEFLATED
        ),
        "index.pth": zipped(op("a" * 2**24) + b"0" + state(tensor()), how=zipfile.ZIP_DEFLATED),
        "bzip2.pth": zipped(state(tensor()), how=zipfile.ZIP_BZIP2),
        "lzma.pth": zipped(state(tensor()), how=zipfile.ZIP_LZMA),
        "a_bzip2_file.pth": bz2.compress(NUMBERS),
    },
    "global": {
        **both("system", state(SYSTEM)),
        **both("eval", state(name("builtins", "eval") + EVIL)),
        **both("by_two_texts", b"\x80\x04" + op("posix") + op("system") + b"\x93" + EVIL),
        **both("instance", state(b"(" + op("touch EXECUTED") + b"iposix\nsystem\n")),
        **both("object", state(b"(" + name("posix", "system") + op("touch EXECUTED") + b"o")),
        **both("new_object", state(name("builtins", "object") + b")\x81")),
        **both("new_object_of_ours", state(TYPE + b")\x81")),
        **both("extension", state(b"\x82\x01")),
        **both("attribute_path", state(name("collections", "OrderedDict.fromkeys") + EVIL)),
        **both("array_of_objects", state(name("numpy.core.multiarray", "_reconstruct") + EVIL)),
        **both("called_type", state(TYPE + EVIL)),
        **both("called_text", state(op("posix.system") + EVIL)),
        **both("dictionary_of_pairs", state(ORDERED.replace(b")R", op(([["a", 1]],)) + b"R"))),
        "before_the_magic.pth": b"\x80\x02" + SYSTEM + b"." + streamed(state(tensor())),
        "bare.pth": pickle.dumps([1, 2]) + SYSTEM,
    },
    "duplicate_names": {
        "members.pth": renamed_twice(),
        "indices.pth": zipped(state(tensor()), more=[("y/data.pkl", b"N.")]),
        "keys.old.pth": streamed(state(tensor()), keys=op(["0", "0"])),
        **both("two_types", state(tensor(), tensor(source=storage(kind=b"IntStorage")))),
        **both("two_lengths", state(tensor(), tensor(shape=(3,), source=storage(count=op(3))))),
        "tensors.safetensors": safe(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
        "parts.safetensors": safe(
            b'{"a":{"dtype":"F32","shape":[4],"shape":[4],"data_offsets":[0,16]}}'
        ),
    },
    "overlapping_offsets": {
        "a_thousand_members.pth": overlapping(),
        "same.safetensors": safe({"a": entry(), "b": entry()}),
        "partly.safetensors": safe({"a": entry(0, 12, [3]), "b": entry(8, 16, [2])}),
        "gap.safetensors": safe({"a": entry(0, 4, [1]), "b": entry(8, 16, [2])}),
        "before.safetensors": safe({"a": entry(-16, 0)}),
        "beyond.safetensors": safe({"a": entry(16, 32)}),
        "turned.safetensors": safe({"a": entry(16, 0)}),
        "behind.safetensors": safe({"a": entry()}, NUMBERS + SYSTEM),
    },
    "huge_headers": {
        "length.safetensors": safe({"a": entry()}, length=2**63),
        "largest_length.safetensors": safe({"a": entry()}, length=2**64 - 1),
        "past_the_end.safetensors": safe({"a": entry()}, length=10**6),
        "no_length.safetensors": safe({"a": entry()}, length=0),
        "lists.safetensors": safe(b'{"__metadata__":[%b0]}' % (b"[]," * 400_000)),
        "longer.safetensors": safe(b"{" + b" " * 2**24 + b"}"),
        "deep.safetensors": safe(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "shape.safetensors": safe({"a": entry(shape=[2**62, 0, 2**62])}),
        "shape_over_integers.safetensors": safe({"a": entry(shape=[2**32, 2**32, 2**32])}),
        "long_numbers.safetensors": safe({"a": entry(shape=[10**4000] * 200)}),
        "axes.safetensors": safe({"a": entry(0, 4, [1] * 70)}, NUMBERS[:4]),
        "no_kind.safetensors": safe({"a": entry(dtype="F31")}),
        "fractions.safetensors": safe({"a": entry(shape=[4.0])}),
        "truths.safetensors": safe({"a": entry(0, 4, [True])}, NUMBERS[:4]),
        "a_list.safetensors": safe([entry()]),
        "no_object.safetensors": safe({"a": 3}),
        **both("text", b"\x8d" + struct.pack("<Q", 2**60)),
        **both("number", b"\x8b" + struct.pack("<I", 2**31 - 1)),
        **both("bytes", b"\x8e" + struct.pack("<Q", 2**62)),
        **both("frame", b"\x95" + struct.pack("<Q", 2**62) + state(op(1))),
        **both("lists", b"]" * 2**16),
        "many_lists.pth": zipped(b"]" * 2**23),
        **both("nested", b"]" * 2**14 + b"a" * (2**14 - 1)),
        **both("digits", b"L" + b"9" * 10**5 + b"L\n"),
        "count.old.pth": streamed(state(tensor()), count=2**62),
        "big_endian.old.pth": streamed(state(tensor()), little=False),
        "member.pth": lying([20, 24], 2**31),
        "member_of_two_sizes.pth": lying([24], 2**31),
        "member_far_away.pth": lying([42], 2**31),
    },
}
HONEST = {
    "honest.pth": zipped(state(tensor())),
    "honest.old.pth": streamed(state(tensor())),
    "ordered.pth": zipped(ORDERED + op("a") + tensor() + b"s" + op({"_metadata": {}}) + b"b"),
    "byte_order.pth": zipped(state(tensor()), more=[("x/byteorder", b"little")]),
    "honest.safetensors": safe({"__metadata__": {"format": "pt"}, "a": entry()}),
}
CRAFTED = {f"{kind}-{each}": data for kind, files in KINDS.items() for each, data in files.items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for file, data in (HONEST | CRAFTED).items():
        (folder / file).write_bytes(data)
    program = Path(__file__).with_name("weights_reader.py")
    done = subprocess.run(
        [sys.executable, program, "honest.pth", *HONEST, *CRAFTED],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not (folder / "EXECUTED").exists()
    return json.loads(done.stdout)


READ = "read {'a': [0.0, 1.0, 2.0, 3.0]}"


@pytest.mark.parametrize("file", HONEST)
def test_honest_files_are_read(outcomes, file):
    assert outcomes[file] == [0, f"{READ} then: {READ}"]


@pytest.mark.parametrize("file", CRAFTED)
def test_crafted_files_are_refused(outcomes, file):
    signal, said = outcomes[file]
    assert signal == 0
    assert said.startswith("refused: ")
    assert "MemoryError" not in said
    assert said.isprintable()
    assert said.endswith(f"then: {READ}")
    assert len(said) < 600
