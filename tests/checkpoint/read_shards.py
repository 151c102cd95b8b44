#!/usr/bin/env python3
"""Reads latent shards by their documentation alone (data/README.md): HDF5 only finds the stored chunks, every filter is
undone here.

    read_shards.py SPLIT MODALITY        verify, and print the samples of a directory of shards
    read_shards.py --test MAKE_SET OLD   compare OLD, a set of version 1 (fixtures/shards), with the formula that made it,
                                         and sets that MAKE_SET writes with each filter with one another; exit 77
                                         without the packages
"""
import itertools
import os
import subprocess
import sys
import tempfile
import zlib

try:
    import h5py
    import numpy as np
    import zstandard
except ImportError as error:
    print(f"skipped: {error}; needs h5py, numpy, zstandard")
    sys.exit(77)

GZIP, SHUFFLE, FLETCHER, ZSTD = 1, 2, 3, 32015
STORED = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
SEEN = set()  # filters that were undone, and "edge": a chunk that the dataset fills in part


def check(condition, message):
    if not condition:
        raise ValueError(message)


def text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


# ---- filters ----

def fletcher32(data):
    """Sums of big-endian 16-bit words modulo 65535, where only an empty sum is 0."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2")
    first = second = 0
    for word in words.tolist():
        first += word
        second += first
    return sum(((s - 1) % 65535 + 1 if s else 0) << shift for s, shift in ((first, 0), (second, 16)))


def unshuffle(data, size):
    count = len(data) // size
    planes = np.frombuffer(data[:count * size], np.uint8).reshape(size, count)
    return planes.T.tobytes() + data[count * size:]


def undo(filters, mask, data, most):
    """filters as they were applied: [(number, parameters)]; bit i of the mask: filter i was left out."""
    for place, (number, parameters) in reversed(list(enumerate(filters))):
        if mask >> place & 1:
            continue
        SEEN.add(number)
        if number == GZIP:
            data = zlib.decompress(data)
        elif number == SHUFFLE:
            data = unshuffle(data, parameters[0])
        elif number == ZSTD:
            data = zstandard.ZstdDecompressor().decompress(data, max_output_size=most)
        elif number == FLETCHER:
            data, stored = data[:-4], int.from_bytes(data[-4:], "little")
            check(fletcher32(data) == stored, "Fletcher's checksum")
        else:
            raise ValueError(f"filter {number} is not of the format")
    return data


# ---- one dataset, chunk by chunk ----

def read_dataset(dataset):
    if dataset.chunks is None:
        return dataset[...]
    properties = dataset.id.get_create_plist()
    filters = [(f[0], f[2]) for f in (properties.get_filter(i) for i in range(properties.get_nfilters()))]
    chunk, out = dataset.chunks, np.zeros(dataset.shape, dataset.dtype)
    size = int(np.prod(chunk)) * dataset.dtype.itemsize
    for origin in itertools.product(*(range(0, n, c) for n, c in zip(dataset.shape, chunk))):
        mask, stored = dataset.id.read_direct_chunk(origin)
        raw = undo(filters, mask, stored, size)
        check(len(raw) == size, f"{dataset.name}: a chunk of {len(raw)} bytes, expected {size}")
        inside = tuple(slice(0, min(c, n - o)) for o, c, n in zip(origin, chunk, dataset.shape))
        if any(s.stop < c < n for s, c, n in zip(inside, chunk, dataset.shape)):
            SEEN.add("edge")
        place = tuple(slice(o, o + s.stop) for o, s in zip(origin, inside))
        out[place] = np.frombuffer(raw, dataset.dtype).reshape(chunk)[inside]
    return out


# ---- shards ----

def read_shard(path, modality):
    """(dtype, width, [(id, label, latent [rows, width] in float32)])"""
    with h5py.File(path, "r") as file:
        of = {key: text(file.attrs[key]) for key in ("format", "modality", "encoder", "dtype")}
        check(of["format"] == "antiphon-latents" and int(file.attrs["version"]) == 1, f"{path}: format")
        check(of["modality"] == modality and of["encoder"], f"{path}: modality and encoder")
        ids, offset, latent = (read_dataset(file[name]) for name in ("id", "offset", "latent"))
        label = read_dataset(file["label"]) if "label" in file else np.full(len(ids), -1)
        width = int(file.attrs["width"])
    offset = offset.astype(np.int64)
    check(latent.dtype == np.dtype(STORED[of["dtype"]]), f"{path}: latent is stored as {latent.dtype}")
    check(len(offset) == len(ids) + 1 == len(label) + 1 and offset[0] == 0 and offset[-1] == len(latent), f"{path}: offset")
    check((np.diff(offset) >= 0).all(), f"{path}: offsets decrease")
    if of["dtype"] == "bfloat16":
        latent = (latent.astype("<u4") << 16).view("<f4")
    latent = latent.astype(np.float32)
    check(latent.shape[1:] == (width,), f"{path}: width")
    rows = [latent[offset[i]:offset[i + 1]] for i in range(len(ids))]
    return of["dtype"], width, list(zip(ids.tolist(), label.tolist(), rows))


def read_split(split, modality):
    """(dtype, width, samples of all shards, samples in each shard)"""
    samples, counts = [], []
    while os.path.exists(path := os.path.join(split, f"{modality}-{len(counts):05d}.h5")):
        dtype, width, shard = read_shard(path, modality)
        samples += shard
        counts.append(len(shard))
    check(counts, f"{split}: no shard of {modality}")
    check(len({sample[0] for sample in samples}) == len(samples), f"{split}: ids are not unique")
    return dtype, width, samples, counts


# ---- tests ----

def old_latent(modality, sample, element):
    """As in test_checkpoint_old.c."""
    return ((sample * 16 + modality * 8 + element) % 97 - 48) / 8


def test_old(old):
    expected = [("image", "float32", 6), ("text", "bfloat16", 3)]
    for m, (name, dtype, width) in enumerate(expected):
        found_dtype, found_width, samples, counts = read_split(os.path.join(old, "train"), name)
        check((found_dtype, found_width, counts) == (dtype, width, [3, 3]), f"{name}: type, width, samples")
        for s, (number, label, latent) in enumerate(samples):
            rows = 0 if (m, s) == (1, 4) else 1 + (s + m) % 3
            values = [old_latent(m, s, i) for i in range(rows * width)]
            check((number, label) == (100 + 7 * s, s % 2), f"{name}: id and label of sample {s}")
            check(latent.shape == (rows, width) and latent.reshape(-1).tolist() == values, f"{name}: sample {s}")
    check(SEEN >= {GZIP, SHUFFLE, FLETCHER, ZSTD}, f"not every filter occurred: {SEEN}")


def test_filters(make_set):
    """Several chunks a shard: 2,000 samples of 5 rows and less, 64 and 9 wide."""
    first = None
    for name in ("none", "gzip", "shuffle+gzip", "zstd", "shuffle+zstd"):
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run([make_set, f"directory={directory}", "samples=2000", "rows=5", "image=64", "absent=9",
                            f"filter={name}"], check=True)
            sets = [read_split(directory, modality) for modality in ("image", "text")]
        check([len(s[2]) for s in sets] == [2000, 2000], f"{name}: samples")
        check([a[0] for a in sets[0][2]] == [b[0] for b in sets[1][2]], f"{name}: ids of the two modalities")
        plain = [[(i, label, latent.tobytes()) for i, label, latent in s[2]] for s in sets]
        first = first or plain
        check(plain == first, f"{name}: other samples than without a filter")
        deviation = np.concatenate([latent for _, _, latent in sets[0][2]]).std()
        check("edge" in SEEN, "expected a dataset that does not fill its last chunk")
        check(2.9 < deviation < 3.1, f"{name}: the standard deviation is {deviation}, expected 3")


def main():
    if len(sys.argv) == 4 and sys.argv[1] == "--test":
        test_old(sys.argv[3])
        test_filters(sys.argv[2])
        print("the old set, and sets with every filter: read")
        return
    dtype, width, samples, counts = read_split(sys.argv[1], sys.argv[2])
    print(f"{len(samples)} samples in {len(counts)} shards, {dtype}, width {width}")
    for number, label, latent in samples:
        print(number, label, len(latent), latent.sum(dtype=np.float64))


if __name__ == "__main__":
    main()
