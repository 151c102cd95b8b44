#!/usr/bin/env python3
"""Tests of `antiphon pack` and `antiphon index`, with h5py looking on.

    test_pack.py PATH_OF_ANTIPHON

Needs numpy and h5py; exits with 77 (skipped) and the reason where they are missing.
"""

import os
import pty
import random
import re
import signal
import struct
import json
import subprocess
import sys
import tempfile
import time
import unittest

try:
    import numpy as np
    import h5py
except ImportError as err:
    print("skipped: %s" % err)
    sys.exit(77)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "data"))
import export_latents as export     # noqa: E402

ANTIPHON = None


def antiphon(*args):
    done = subprocess.run([ANTIPHON] + [str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)
    return done.returncode, done.stdout, done.stderr


def as_text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def read_split(folder, modality):
    """Everything of a modality, its shards one after another: {column: array or list}, rows as bytes per sample."""
    out = {"id": [], "label": [], "key": [], "rows": [], "prompt": [], "target": [], "shards": []}
    k = 0
    while os.path.exists(os.path.join(folder, "%s-%05d.h5" % (modality, k))):
        with h5py.File(os.path.join(folder, "%s-%05d.h5" % (modality, k)), "r") as f:
            latent, offset = f["latent"][:], f["offset"][:].astype(np.int64)
            n = len(f["id"])
            out["shards"].append(n)
            out["id"] += f["id"][:].tolist()
            out["label"] += f["label"][:].tolist() if "label" in f else [-1] * n
            out["key"] += [x.decode() if isinstance(x, bytes) else x for x in f["key"][:]] if "key" in f else [None] * n
            out["rows"] += [latent[offset[i]:offset[i + 1]].tobytes() for i in range(n)]
            for kind in ("prompt", "target"):
                if kind + "_token" in f:
                    token, at = f[kind + "_token"][:], f[kind + "_offset"][:].astype(np.int64)
                    out[kind] += [token[at[i]:at[i + 1]].tolist() for i in range(n)]
                else:
                    out[kind] += [None] * n
            out["attributes"] = {name: as_text(f.attrs[name]) for name in ("modality", "encoder", "dtype", "width")}
        k += 1
    return out


def save_safetensors(path, tensors):
    header, data = {}, b""
    for name, (kind, array) in tensors.items():
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    head = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head + data)


class Folder(unittest.TestCase):
    def setUp(self):
        self._folder = tempfile.TemporaryDirectory()
        self.dir = self._folder.name
        self.rng = np.random.RandomState(1)

    def tearDown(self):
        self._folder.cleanup()

    def at(self, *names):
        return os.path.join(self.dir, *names)

    def save(self, name, array):
        np.save(self.at(name), array)
        return self.at(name)

    def ragged(self, samples, width, dtype="f2"):
        lengths = self.rng.randint(0, 6, samples)
        offset = np.concatenate([[0], np.cumsum(lengths)])
        return (self.rng.randint(-99, 99, (offset[-1], width)) / 16).astype(dtype), offset

    def good(self, *args):
        code, out, err = antiphon(*args)
        self.assertEqual(code, 0, err)
        return out

    def bad(self, words, *args, code=1):
        got, _, err = antiphon(*args)
        self.assertEqual(got, code, err)
        for word in words:
            self.assertIn(word, err)


class Features(Folder):
    # h5py without a plugin reads no zstd; the exporter's own choice is shuffle+gzip.
    FILTERS = ("none", "gzip", "shuffle+gzip")

    def test_same_as_the_exporter(self):
        """Bit by bit what data/export_latents.py writes, for every type and filter that h5py reads."""
        latent, offset = self.ragged(230, 12, "f4")
        ids = (np.arange(230) * 7919 % 1000003).astype("u8")
        labels = self.rng.randint(-1, 4, 230).astype("i4")
        files = [self.save(n, a) for n, a in
                 (("x.npy", latent), ("o.npy", offset.astype("i8")), ("i.npy", ids), ("l.npy", labels))]
        for dtype in ("float16", "bfloat16", "float32"):
            for name in self.FILTERS:
                mine, other = self.at(dtype + name, "train"), self.at(dtype + name, "other")
                self.good("pack", "--from", files[0], "--offsets", files[1], "--ids", files[2], "--labels", files[3],
                          "--modality", "image", "--encoder", "e", "--to", mine, "--dtype", dtype, "--filter", name,
                          "--samples-per-shard", 50, "--chunk-kib", 1)
                writer = export.ShardWriter(other, "image", encoder="e", width=12, dtype=dtype, filter=name, samples_per_shard=50)
                for i in range(230):
                    writer.append(int(ids[i]), latent[offset[i]:offset[i + 1]], label=int(labels[i]))
                writer.close()
                a, b = read_split(mine, "image"), read_split(other, "image")
                for column in ("id", "label", "rows", "shards"):
                    self.assertEqual(a[column], b[column], (dtype, name, column))
                for key in a["attributes"]:
                    self.assertEqual(a["attributes"][key], b["attributes"][key])
                self.good("check", mine)

    def test_shapes_and_safetensors(self):
        flat = (self.rng.randint(-9, 9, (20, 4)) / 4).astype("f8")
        deep = (self.rng.randint(-9, 9, (20, 3, 4)) / 4).astype("f2")
        bits = (np.arange(24).reshape(6, 4) + 0x3f80).astype("u2")
        save_safetensors(self.at("t.safetensors"), {"latent": ("BF16", bits), "offset": ("I64", np.array([0, 2, 2, 6])),
                                                    "id": ("U32", np.array([5, 3, 9], "u4"))})
        self.good("pack", "--from", self.save("a.npy", flat), "--modality", "text", "--encoder", "e", "--to",
                  self.at("a"), "--filter", "none")
        self.good("pack", "--from", self.save("b.npy", deep), "--modality", "text", "--encoder", "e", "--to",
                  self.at("b"), "--filter", "gzip")
        t = self.at("t.safetensors")
        self.good("pack", "--from", t, "--latents", "latent", "--offsets", t, "--ids", t, "--modality", "text",
                  "--encoder", "e", "--to", self.at("c"), "--filter", "none")
        a, b, c = (read_split(self.at(x), "text") for x in "abc")
        self.assertEqual(a["rows"], [flat[i].astype("f4").tobytes() for i in range(20)])
        self.assertEqual(b["rows"], [deep[i].tobytes() for i in range(20)])
        self.assertEqual(c["rows"], [bits[:2].tobytes(), b"", bits[2:].tobytes()])
        self.assertEqual(c["id"], [5, 3, 9])
        self.assertEqual(c["attributes"]["dtype"], "bfloat16")

    def test_refused(self):
        x = self.save("x.npy", np.ones((10, 4), "f4"))
        common = ("--modality", "image", "--encoder", "e", "--to", self.at("out"))
        self.bad(["fortran_order"], "pack", "--from", self.save("f.npy", np.asfortranarray(np.ones((3, 4), "f4"))), *common)
        self.bad([">f4"], "pack", "--from", self.save("b.npy", np.ones((3, 4), ">f4")), *common)
        self.bad(["integers"], "pack", "--from", self.save("i.npy", np.ones((3, 4), "i4")), *common)
        self.bad(["plain numbers"], "pack", "--from", self.save("s.npy", np.ones(3, [("a", "f4")])), *common)
        self.bad(["offsets decrease"], "pack", "--from", x, "--offsets",
                 self.save("o.npy", np.array([0, 5, 3, 10])), *common)
        self.bad(["rise from 0 to the 10 rows"], "pack", "--from", x, "--offsets", self.save("o.npy", np.array([0, 5])), *common)
        self.bad(["9 ids for 10 samples"], "pack", "--from", x, "--ids", self.save("j.npy", np.arange(9)), *common)
        self.bad(["does not lie between"], "pack", "--from", x, "--labels", self.save("l.npy", np.full(10, -2)), *common)
        self.bad(["NaN"], "pack", "--from", self.save("n.npy", np.full((2, 2), np.nan, "f4")), *common)
        with open(x, "r+b") as file:
            file.truncate(140)
        self.bad(["cut short"], "pack", "--from", x, *common)
        self.bad(["usage"], "pack", "--to", "x", code=2)
        self.bad(["unknown option --form"], "pack", "--form", x, code=2)
        self.assertFalse([n for n in (os.listdir(self.at("out")) if os.path.isdir(self.at("out")) else [])])

    def test_refused_tensors(self):
        def tensor(**changes):
            entry = dict({"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}, **changes)
            return {"a": entry}

        good = tensor()["a"]
        cases = [(tensor(data_offsets=[0, 64]), "claims bytes 0 to 64"), (tensor(data_offsets=[32, 0]), "claims bytes 32"),
                 (tensor(shape=[2, 5]), "needs 10 elements"), (tensor(shape=[2 ** 52, 2 ** 52]), "at dimension 1"),
                 (tensor(shape=[-1, 4]), "at dimension 0"), ({"a": good, "b": good}, "inside the one before it"),
                 (tensor(dtype="F8_E4M3", shape=[32]), "0 tensors"), (tensor(dtype="NEW"), "0 tensors"),
                 ({"a": 1}, "is not described"), ([], "does not begin with")]
        for header, words in cases:
            head = json.dumps(header).encode()
            with open(self.at("t.safetensors"), "wb") as file:
                file.write(struct.pack("<Q", len(head)) + head + b"\0" * 32)
            self.bad([words, "t.safetensors"], "pack", "--from", self.at("t.safetensors"), "--modality", "image",
                     "--encoder", "e", "--to", self.at("out"))
        with open(self.at("t.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", 2 ** 63) + b"{}")
        self.bad(["claims"], "pack", "--from", self.at("t.safetensors"), "--modality", "image", "--encoder", "e",
                 "--to", self.at("out"))


class Sets(Folder):
    def make(self, samples=230):
        """A set of two modalities with keys, labels and tokens, by the exporter."""
        for modality, width in (("image", 9), ("text", 5)):
            latent, offset = self.ragged(samples, width, "f4")
            writer = export.ShardWriter(self.at("set", "train"), modality, encoder="enc", width=width, samples_per_shard=70)
            for i in range(samples):
                writer.append(1000 - i, latent[offset[i]:offset[i + 1]], label=i % 5 - 1, key="k\u00e9y %d" % i)
            writer.close()
        for k in range(len([n for n in os.listdir(self.at("set", "train")) if n.startswith("text")])):
            with h5py.File(self.at("set", "train", "text-%05d.h5" % k), "r+") as f:
                n = len(f["id"])
                f["prompt_token"] = np.arange(2 * n, dtype="i4") + 100 * k
                f["prompt_offset"] = np.arange(n + 1, dtype="u8") * 2
                f["target_token"] = np.arange(n, dtype="i4")
                f["target_offset"] = np.arange(n + 1, dtype="u8")

    def test_rewriting_keeps_everything(self):
        self.make()
        before = [read_split(self.at("set", "train"), m) for m in ("image", "text")]
        self.good("pack", "--from-set", self.at("set"), "--to", self.at("small"), "--samples-per-shard", 31, "--filter",
                  "none", "--chunk-kib", 1, "--threads", 3)
        self.good("pack", "--from-set", self.at("small"), "--to", self.at("large"), "--samples-per-shard", 100, "--filter",
                  "shuffle+gzip")
        for name, shards in (("small", [31] * 7 + [13]), ("large", [100, 100, 30])):
            for m, modality in enumerate(("image", "text")):
                after = read_split(self.at(name, "train"), modality)
                self.assertEqual(after["shards"], shards)
                for column in ("id", "label", "key", "rows", "prompt", "target"):
                    self.assertEqual(before[m][column], after[column], (name, modality, column))
                self.assertEqual(before[m]["attributes"], after["attributes"])
        self.good("check", self.at("large"))

    def test_other_type(self):
        self.make(40)
        self.good("pack", "--from-set", self.at("set"), "--modality", "image", "--to", self.at("wide"), "--dtype",
                  "float32", "--filter", "gzip")
        before, after = read_split(self.at("set", "train"), "image"), read_split(self.at("wide", "train"), "image")
        self.assertEqual([np.frombuffer(r, "f2").astype("f4").tobytes() for r in before["rows"]], after["rows"])
        self.assertFalse(os.path.exists(self.at("wide", "train", "text-00000.h5")))

    def test_zstd_reads_back(self):
        self.make(60)
        self.good("pack", "--from-set", self.at("set"), "--to", self.at("z"), "--filter", "shuffle+zstd")
        self.good("pack", "--from-set", self.at("z"), "--to", self.at("back"), "--filter", "gzip")
        for modality in ("image", "text"):
            self.assertEqual(read_split(self.at("set", "train"), modality)["rows"],
                             read_split(self.at("back", "train"), modality)["rows"])

    def test_finished_shards_are_kept_and_others_respected(self):
        self.make()
        args = ("pack", "--from-set", self.at("set"), "--modality", "image", "--to", self.at("out"), "--samples-per-shard",
                50, "--filter", "gzip")
        self.good(*args)
        first = os.stat(self.at("out", "train", "image-00001.h5")).st_mtime_ns
        os.remove(self.at("out", "train", "image-00003.h5"))
        self.assertIn("5 shards (4 were there)", self.good(*args))
        self.assertEqual(os.stat(self.at("out", "train", "image-00001.h5")).st_mtime_ns, first)
        self.bad(["made from something else"], *args[:-1], "none")
        self.bad(["is there, but these samples make only 3 shards"], *args[:8], 100, *args[9:])
        with open(self.at("out", "train", "image-00002.h5"), "r+b") as file:
            file.truncate(3000)
        self.bad(["image-00002.h5"], *args)     # damaged: said, not overwritten


class Interrupted(Folder):
    def command(self, out):
        return [ANTIPHON, "pack", "--from", self.at("x.npy"), "--modality", "image", "--encoder", "e", "--to", out, "--filter",
                "shuffle+gzip", "--samples-per-shard", "100", "--threads", "2"]

    def test_killed_at_random_instants(self):
        """Killed again and again, the same command ends with the very shards of an undisturbed run."""
        self.save("x.npy", (self.rng.randint(-99, 99, (4000, 4, 64)) / 16).astype("f2"))
        started = time.time()
        self.assertEqual(subprocess.run(self.command(self.at("whole")), stdout=subprocess.DEVNULL).returncode, 0)
        alone = time.time() - started
        draw, kills = random.Random(3), 0
        for attempt in range(200):
            process = subprocess.Popen(self.command(self.at("cut")), stdout=subprocess.DEVNULL)
            time.sleep(draw.uniform(0, alone * 0.6))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() != 0
            if process.returncode == 0:
                break
            for name in os.listdir(self.at("cut")) if os.path.isdir(self.at("cut")) else []:
                if name.endswith(".h5"):        # what has its name is whole
                    with h5py.File(self.at("cut", name), "r") as f:
                        self.assertEqual(len(f["id"]), 100)
        self.assertEqual(process.returncode, 0)
        self.assertGreater(kills, 1)
        a, b = read_split(self.at("whole"), "image"), read_split(self.at("cut"), "image")
        for column in ("id", "rows", "shards"):
            self.assertEqual(a[column], b[column])
        self.assertFalse([n for n in os.listdir(self.at("cut")) if n.endswith(".part")])

    def test_stopped_between_shards(self):
        self.save("x.npy", (self.rng.randint(-99, 99, (8000, 8, 64)) / 16).astype("f2"))
        process = subprocess.Popen(self.command(self.at("out")), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not os.path.isdir(self.at("out")) or not os.path.exists(self.at("out", "image-00001.h5")):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
        self.assertEqual(process.returncode, 75, err)
        self.assertIn(b"the same command goes on", err)
        self.assertFalse([n for n in os.listdir(self.at("out")) if n.endswith(".part")])
        self.assertEqual(subprocess.run(self.command(self.at("out")), stdout=subprocess.DEVNULL).returncode, 0)
        self.assertEqual(sum(read_split(self.at("out"), "image")["shards"]), 8000)


def stored(path):
    """What a shard stores: attributes, and of every column its form and its chunks as they lie there. HDF5 notes the time
    of writing beside them, which is the only other thing that differs between two files."""
    with h5py.File(path, "r") as f:
        out = {"attributes": {key: as_text(f.attrs[key]) for key in f.attrs}}
        for name, column in f.items():
            plist, chunks = column.id.get_create_plist(), []
            filters = [plist.get_filter(i)[:3] for i in range(plist.get_nfilters())]
            for i in range(column.id.get_num_chunks()):
                chunk = column.id.get_chunk_info(i)
                chunks.append((chunk.chunk_offset, chunk.byte_offset, column.id.read_direct_chunk(chunk.chunk_offset)))
            out[name] = (str(column.dtype), column.shape, column.chunks, filters, chunks)
    return out, os.path.getsize(path)


class InterruptedSet(Folder):
    """A set rewritten by --from-set, and ended in the middle."""
    SHARDS = 24

    def setUp(self):
        super().setUp()
        for modality, width in (("image", 48), ("text", 24)):
            latent, offset = self.ragged(3600, width, "f4")
            writer = export.ShardWriter(self.at("set", "train"), modality, encoder="enc", width=width, samples_per_shard=900,
                                        filter="none")
            for i in range(3600):
                writer.append(5000 + i, latent[offset[i]:offset[i + 1]], label=i % 7 - 1)
            writer.close()
        self.good(*self.command("whole")[1:])

    def command(self, out):
        return [ANTIPHON, "pack", "--from-set", self.at("set"), "--to", self.at(out), "--filter", "shuffle+gzip", "--level", "9",
                "--samples-per-shard", "150", "--threads", "2"]

    def there(self, out, modality):
        folder = self.at(out, "train")
        return [n for n in os.listdir(folder) if n.startswith(modality) and n.endswith(".h5")] if os.path.isdir(folder) else []

    def begin(self, out, modality, shards, **pipes):
        """A process that has just finished so many shards of a modality; each file operation takes it 2 ms more."""
        slow = dict(os.environ, ANTIPHON_FAULT_FILE="1:sleep=2:-0")
        process = subprocess.Popen(self.command(out), stdout=subprocess.DEVNULL, env=slow, **pipes)
        while len(self.there(out, modality)) < shards and process.poll() is None:
            time.sleep(0.0005)
        return process

    def finish(self, out, kept):
        """The same command goes on and leaves the shards of one that nobody ended, byte for byte."""
        said = self.good(*self.command(out)[1:])
        found = re.findall(r"(image|text), %d shards \((\d+) were there\)" % self.SHARDS, said)
        self.assertEqual({modality: int(count) for modality, count in found}, kept)
        names = sorted(os.listdir(self.at("whole", "train")))
        self.assertEqual(len(names), 2 * self.SHARDS)
        self.assertEqual(sorted(os.listdir(self.at(out, "train"))), names)
        for name in names:
            self.assertTrue(stored(self.at("whole", "train", name)) == stored(self.at(out, "train", name)), name)

    def test_killed(self):
        for modality, shards in (("image", 1), ("image", 11), ("text", 5)):
            out = "killed-%s-%d" % (modality, shards)
            process = self.begin(out, modality, shards)
            process.send_signal(signal.SIGKILL)
            self.assertEqual(process.wait(), -signal.SIGKILL)
            kept = {name: len(self.there(out, name)) for name in ("image", "text")}
            self.assertTrue(shards <= kept[modality] < self.SHARDS, kept)
            self.finish(out, kept)

    def test_asked_to_stop(self):
        for modality, shards, number in (("image", 2, signal.SIGTERM), ("text", 9, signal.SIGUSR1)):
            out = "stopped-%s" % modality
            process = self.begin(out, modality, shards, stderr=subprocess.PIPE)
            process.send_signal(number)
            err = process.communicate()[1].decode()
            self.assertEqual(process.returncode, 75, err)
            kept = {name: len(self.there(out, name)) for name in ("image", "text")}
            self.assertTrue(shards <= kept[modality] < self.SHARDS, kept)
            self.assertIn("stopped on request with %d of %d shards; the same command goes on" % (kept[modality], self.SHARDS), err)
            self.assertFalse([n for n in os.listdir(self.at(out, "train")) if not n.endswith(".h5")])
            self.finish(out, kept)

    def test_progress_on_a_terminal(self):
        ours, its = pty.openpty()
        process = subprocess.Popen(self.command("watched"), stdout=subprocess.PIPE, stderr=its)
        os.close(its)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:     # the other end is closed
                break
            if not piece:
                break
            shown += piece
        os.close(ours)
        said = process.communicate()[0].decode()
        self.assertEqual(process.returncode, 0, shown)
        for modality in ("image", "text"):
            counts = [int(n) for n in re.findall(r"%s: (\d+) of %d shards" % (modality, self.SHARDS), shown.decode())]
            self.assertEqual(counts, list(range(1, self.SHARDS + 1)))
        self.assertIn("text, %d shards (0 were there)" % self.SHARDS, said)


class Index(Folder):
    def test_command(self):
        latent = (self.rng.randint(-99, 99, (300, 2, 8)) / 16).astype("f2")
        self.save("x.npy", latent)
        self.good("pack", "--from", self.at("x.npy"), "--modality", "image", "--encoder", "e", "--to", self.at("set", "train"),
                  "--samples-per-shard", 100)
        self.assertIn("300 samples in 3 shards", self.good("index", self.at("set"), "--values"))
        self.assertIn("its index says what the shards say", self.good("check", self.at("set")))
        os.utime(self.at("set", "train", "image-00001.h5"))
        self.bad(["image-00001.h5", "antiphon index"], "check", self.at("set"))
        self.good("index", self.at("set"), "--split", "train")
        self.good("check", self.at("set"))
        self.bad(["no such directory"], "index", self.at("nowhere"))


if __name__ == "__main__":
    ANTIPHON = os.path.abspath(sys.argv.pop(1))
    os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    unittest.main()
