"""The same rows of an image, a label and captions, written for each kind of source."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

COUNT = 40


def pictures(count=COUNT, *, size=(6, 6), seed=0):
    """Images of noise, uint8 [N, H, W, 3], of which no two are equal."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_npz(path, files, labels, captions):
    offset = np.cumsum([0, *map(len, files)])
    content = np.frombuffer(b"".join(files), np.uint8)
    caption = np.array([texts[0] for texts in captions])
    np.savez(path, jpeg=content, offset=offset, label=labels, caption=caption)


def write_parquet(path, files, labels, captions, **options):
    struct = [{"bytes": file, "path": None} for file in files]
    table = pa.table({"image": struct, "label": list(map(int, labels)), "text": captions})
    pq.write_table(table, path, row_group_size=7, **options)


def example(**values):
    """A message tf.train.Example."""
    message = tf_example_pb2.Example()
    for name, value in values.items():
        kind = message.features.feature[name]
        chosen = kind.int64_list if any(type(each) is int for each in value) else kind.bytes_list
        chosen.value.extend(value)
    return message.SerializeToString()


def write_records(path, messages):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for message in messages:
        writer.write(message)
    writer.close()


def write_arrayrecord(path, files, labels, captions):
    rows = zip(files, map(int, labels), captions, strict=True)
    write_records(
        path,
        [
            example(image=[file], label=[label], caption=[text.encode() for text in texts])
            for file, label, texts in rows
        ],
    )


def write_tar(path, members, *, mode="w"):
    """A tar file of members {name: bytes}."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_webdataset(path, files, labels, captions, **options):
    members = {}
    for row, (file, label, texts) in enumerate(zip(files, labels, captions, strict=True)):
        name = f"some/{row:06}"
        kind = "npy" if file.startswith(b"\x93NUMPY") else "png"
        members[f"{name}.{kind}"] = file
        members[f"{name}.cls"] = f"{label}\n".encode()
        if len(texts) == 1:
            members[f"{name}.txt"] = texts[0].encode()
        else:
            members[f"{name}.json"] = json.dumps({"caption": texts, "width": 6}).encode()
    write_tar(path, members, **options)


def write_compressed(path, files, labels, captions):
    write_webdataset(path, files, labels, captions, mode="w:gz")


WRITERS = {
    "parquet": (write_parquet, ".parquet"),
    "arrayrecord": (write_arrayrecord, ".array_record"),
    "webdataset": (write_webdataset, ".tar"),
    "hf": (write_parquet, "/train.parquet"),
}


def write(kind, folder, *, images=None, labels=None, captions=None, stem="all", encode=png):
    """Writes one file of the kind. Returns the place in its source's name."""
    images = pictures() if images is None else images
    labels = np.arange(len(images)) % 3 if labels is None else labels
    captions = [[f"picture {i}"] for i in range(len(images))] if captions is None else captions
    writer, suffix = WRITERS[kind]
    path = folder / f"{stem}{suffix}"
    path.parent.mkdir(exist_ok=True)
    writer(path, [encode(image) for image in images], labels, captions)
    return path.parent if kind == "hf" else path
