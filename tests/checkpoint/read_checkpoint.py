#!/usr/bin/env python3
"""Reads a checkpoint by its documentation alone (checkpoint/README.md), sharing no code with the C reader.

    read_checkpoint.py PATH              verify, and print the tensors
    read_checkpoint.py --test WRITER OLD run WRITER (write_checkpoint) and compare, read OLD, a checkpoint of several
                                         ranks; exit 77 without the packages
"""
import json
import os
import struct
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import xxhash
    import zstandard
except ImportError as error:
    print(f"skipped: {error}; needs numpy, xxhash, zstandard")
    sys.exit(77)

CELL = 1 << 18
SIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int32": 4, "int64": 8, "uint64": 8, "uint8": 1}
PLANES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
SEEN = {"raw": 0, "compressed": 0, "mixed": 0}  # blocks by what their planes are
TAIL = len(',\n"hash":"0123456789abcdef"}\n')


def xxh(data):
    return xxhash.xxh64_intdigest(data)


def check(condition, message):
    if not condition:
        raise ValueError(message)


def read_manifest(path):
    with open(os.path.join(path, "manifest.json"), "rb") as file:
        text = file.read()
    manifest = json.loads(text)
    check(xxh(text[:-TAIL]) == int(manifest["hash"], 16), "manifest: hash")
    check(manifest["format"] == "antiphon-checkpoint" and manifest["version"] == 1, "manifest: format")
    return manifest


def decode(stored, sizes, dtype, count):
    planes = PLANES.get(dtype, 1)
    plane_bytes = count * SIZE[dtype] // planes
    parts, at = [], 0
    check(all(0 < size <= plane_bytes for size in sizes[:planes]) and not any(sizes[planes:]), "plane sizes")
    raw = sum(size == plane_bytes for size in sizes[:planes])
    SEEN["raw" if raw == planes else "mixed" if raw else "compressed"] += 1
    for size in sizes[:planes]:
        part = stored[at:at + size]
        if size != plane_bytes:
            part = zstandard.ZstdDecompressor().decompress(part, max_output_size=plane_bytes)
        check(len(part) == plane_bytes, "plane size")
        parts.append(np.frombuffer(part, np.uint8))
        at += size
    if planes == 1:
        return parts[0].tobytes()
    word = np.dtype(f"<u{planes}")
    value = np.ascontiguousarray(np.stack(parts, axis=1)).view(word).reshape(-1)
    bits = 8 * planes
    return ((value >> word.type(1)) | (value << word.type(bits - 1))).astype(word).tobytes()


def read_index(data, manifest, number):
    entry = manifest["files"][number]
    check(len(data) == int(entry["bytes"]), f"file {number}: size")
    magic, version, order, step, file, files, cell = struct.unpack_from("<8sIIqIII", data)
    check((magic, version, order, cell) == (b"ANTICKPT", 1, 0x01020304, CELL), f"file {number}: header")
    check((step, file, files) == (int(manifest["step"]), number, len(manifest["files"])), f"file {number}: whose")
    index, blocks, index_hash, end = struct.unpack("<qqQ8s", data[-32:])
    check(end == b"TPKCITNA" and blocks == int(entry["blocks"]), f"file {number}: trailer")
    check(xxh(data[:64] + data[index:-32] + data[-32:-16]) == index_hash, f"file {number}: index hash")
    check(index_hash == int(entry["index_hash"], 16), f"file {number}: index hash in the manifest")
    return [struct.unpack_from("<QQ8I", data, index + 48 * b) for b in range(blocks)], index


def read_file(path, manifest, number, tensors, cell_hashes):
    with open(os.path.join(path, manifest["files"][number]["name"]), "rb") as file:
        data = file.read()
    entries, index = read_index(data, manifest, number)
    block, at = 0, 64
    for tensor in manifest["tensors"]:
        for file_number, first, count in tensor["parts"]:
            if file_number != number:
                continue
            first, count, size = int(first), int(count), SIZE[tensor["dtype"]]
            for done in range(0, count, CELL):
                raw_hash, stored_hash, *sizes = entries[block]
                n = min(CELL, count - done)
                stored = data[at:at + sum(sizes)]
                check(xxh(stored) == stored_hash, f"file {number}, block {block}: stored hash")
                raw = decode(stored, sizes, tensor["dtype"], n)
                check(xxh(raw) == raw_hash, f"file {number}, block {block}: raw hash")
                begin = (first + done) * size
                tensors[tensor["name"]][begin:begin + len(raw)] = raw
                cell_hashes[tensor["name"]][(first + done) // CELL] = raw_hash
                at += len(stored)
                block += 1
    check(block == len(entries) and at == index, f"file {number}: blocks do not fill the file")


def read_checkpoint(path):
    manifest = read_manifest(path)
    tensors, cell_hashes, lines = {}, {}, []
    for tensor in manifest["tensors"]:
        count = int(np.prod([int(n) for n in tensor["shape"]], dtype=object))
        tensors[tensor["name"]] = bytearray(count * SIZE[tensor["dtype"]])
        cell_hashes[tensor["name"]] = [None] * -(-count // CELL)
    for number in range(len(manifest["files"])):
        read_file(path, manifest, number, tensors, cell_hashes)
    for tensor in manifest["tensors"]:
        hashes = cell_hashes[tensor["name"]]
        check(None not in hashes, f"{tensor['name']}: not wholly covered")
        check(xxh(struct.pack(f"<{len(hashes)}Q", *hashes)) == int(tensor["hash"], 16), f"{tensor['name']}: hash")
        shape = ", ".join(tensor["shape"])
        lines.append(f"{tensor['name']} {tensor['dtype']} [{shape}] {tensor['hash']}\n")
    check(xxh("".join(lines).encode()) == int(manifest["content_hash"], 16), "content hash")
    return manifest, tensors


def test(writer, old):
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([writer, directory], check=True)
        manifest, tensors = read_checkpoint(os.path.join(directory, "step-00000005"))
        check(json.loads(manifest["meta"]) == {"seed": 18446744073709551615}, "meta")
        with open(os.path.join(directory, "names"), encoding="utf-8") as file:
            names = file.read().split()
        check(sorted(names) == sorted(tensors), "names")
        for number, name in enumerate(names):
            with open(os.path.join(directory, f"{number}.raw"), "rb") as file:
                check(file.read() == tensors[name], f"{name}: contents")
        print(f"{len(names)} tensors equal, content {manifest['content_hash']}")
    manifest, tensors = read_checkpoint(old)
    check(len(manifest["files"]) == 3 and manifest["content_hash"] == "04d81d890c30ecaf", "the old checkpoint")
    check(tensors["cells"][5000:5003] == b"\x01\x01\x01" and not any(tensors["cells"][:5000]), "old contents")
    check(all(SEEN.values()), f"not every kind of block occurred: {SEEN}")


def main():
    if len(sys.argv) == 4 and sys.argv[1] == "--test":
        test(sys.argv[2], sys.argv[3])
        return
    manifest, tensors = read_checkpoint(sys.argv[1])
    print(f"step {manifest['step']}, content {manifest['content_hash']}, meta {manifest['meta']}")
    for tensor in manifest["tensors"]:
        print(tensor["name"], tensor["dtype"], [int(n) for n in tensor["shape"]], len(tensors[tensor["name"]]))


if __name__ == "__main__":
    main()
