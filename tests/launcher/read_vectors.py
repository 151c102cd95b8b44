"""What the page of trainer/serve says about reading vectors with h5py: read_vectors.py KEYS QUERIES."""
import sys

try:
    import h5py
    import numpy as np
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)


def load(path):
    with h5py.File(path, "r") as f:
        text = {k: f.attrs[k].decode() for k in ("format", "kind", "modality", "direction", "checkpoint", "dtype")}
        assert text["format"] == "antiphon-vectors" and f.attrs["version"] == 1, text
        vectors, ids = f["vectors"][:], f["id"][:]
        keys = [k.decode() for k in f["key"][:]]
        assert vectors.shape == (len(ids), f.attrs["width"]) and vectors.dtype == text["dtype"], vectors.dtype
        assert f["block_row"][-1] == len(ids) and len(f["block_hash"]) + 1 == len(f["block_row"])
    assert keys == [f"sample-{i}" for i in ids], keys
    assert np.abs(np.linalg.norm(vectors.astype("f4"), axis=1) - 1).max() < 1e-3
    return text, vectors, ids


keys, vectors, ids = load(sys.argv[1])
queries, asked, asked_ids = load(sys.argv[2])
assert keys["checkpoint"] == queries["checkpoint"] and len(keys["checkpoint"]) == 16
assert (keys["kind"], keys["modality"], keys["direction"]) == ("key", "text", ""), keys
assert (queries["kind"], queries["modality"], queries["direction"]) == ("query", "image", "image:text"), queries
assert vectors.dtype == "f4" and asked.dtype == "f2" and set(asked_ids) != set(ids)
scores = asked.astype("f4") @ vectors.T
print(f"{len(ids)} keys of {keys['modality']}, {len(asked_ids)} queries of {queries['direction']}")
for i, row in zip(asked_ids, scores):
    print(i, ids[row.argmax()])
