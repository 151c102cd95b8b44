#!/usr/bin/env python3
"""Tests of data/export_latents.py, and of the committed glyph set.

Needs numpy and h5py; exits with 77 (skipped) and the reason where they are missing.
"""

import glob
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import unittest
import wave

try:
    import numpy as np
    import h5py
except ImportError as err:
    print("skipped: %s" % err)
    sys.exit(77)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = os.path.join(ROOT, "data", "export_latents.py")
GLYPHS = os.path.join(ROOT, "data", "glyphs")
WIDTHS = {"image": 1280, "text": 384, "speech": 96}
sys.path.insert(0, os.path.dirname(PROGRAM))
import export_latents as export     # noqa: E402


def have_zstd():
    """Does this h5py read filter 32015?  hdf5plugin brings it."""
    try:
        import hdf5plugin           # noqa: F401
    except ImportError:
        return False
    return True


def tool(*args):
    done = subprocess.run([sys.executable, PROGRAM] + [str(a) for a in args],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    return done.returncode, done.stdout, done.stderr


def save_safetensors(path, tensors):
    header, data = {"__metadata__": {"made": "by a test"}}, b""
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

    def ragged(self, lengths, width):
        return [self.rng.randn(n, width).astype(np.float32) for n in lengths]


class Storage(Folder):
    def test_bfloat16_rounds_to_nearest_even(self):
        a = np.float32([1.0, 1 + 2 ** -8, 1 + 3 * 2 ** -8, -3.14159, 0.0])
        back = export.from_storage(export.to_storage(a, "bfloat16"), "bfloat16")
        self.assertEqual(list(back[:3]), [1.0, 1.0, 1 + 2 ** -6])
        self.assertLess(abs(back[3] + 3.14159), 2 ** -7)

    def test_mantissa_bits_bound_the_error(self):
        a = self.rng.randn(1000).astype(np.float32)
        half = a.astype(np.float16).astype(np.float32)
        for bits in (4, 6, 9):
            h = export.to_storage(a, "float16", bits)
            normal = np.abs(half) > 1e-3
            self.assertLessEqual((np.abs(h.astype(np.float32) - half) / np.abs(half))[normal].max(), 2.0 ** -(bits + 1))
            self.assertFalse((h.view(np.uint16) & ((1 << (10 - bits)) - 1)).any())

    def test_refuses_what_does_not_fit(self):
        for a, dtype in ((np.float32([1, np.nan]), "float32"), (np.float32([np.inf]), "bfloat16"),
                         (np.float32([1e5]), "float16"), (np.float32([65520.0]), "float16")):
            with self.assertRaises(export.ExportError):
                export.to_storage(a, dtype)


class Shards(Folder):
    def test_layout_of_one_shard(self):
        lat = self.ragged([3, 0, 1], 5)
        lat[1] = None
        path = export.write_shard(self.at("train", "image-00000.h5"), "image", "enc", [7, 2 ** 53, 9], lat, width=5,
                                  labels=[4, -1, 4], keys=["a", "ünï", ""], prompts=[[1, -1], [], [2]],
                                  targets=[None, [5], [6, 7]])
        with h5py.File(path, "r") as f:
            self.assertEqual({k: f.attrs[k] for k in f.attrs},
                             {"format": "antiphon-latents", "version": 1, "modality": "image", "encoder": "enc",
                              "dtype": "float16", "width": 5})
            self.assertEqual((f["id"].dtype, list(f["id"])), (np.uint64, [7, 2 ** 53, 9]))
            self.assertEqual((f["offset"].dtype, list(f["offset"])), (np.uint64, [0, 3, 3, 4]))
            self.assertEqual((f["latent"].dtype, f["latent"].shape), (np.float16, (4, 5)))
            np.testing.assert_array_equal(f["latent"][:3], lat[0].astype(np.float16))
            self.assertEqual((f["label"].dtype, list(f["label"])), (np.int32, [4, -1, 4]))
            self.assertEqual([k.decode() for k in f["key"]], ["a", "ünï", ""])
            self.assertEqual(list(f["prompt_token"]), [1, -1, 2])
            self.assertEqual(list(f["prompt_offset"]), [0, 2, 2, 3])
            self.assertEqual(list(f["target_token"]), [5, 6, 7])
            self.assertEqual(list(f["target_offset"]), [0, 0, 1, 3])
        self.assertEqual(os.listdir(self.at("train")), ["image-00000.h5"])

    def test_dtypes_and_filters_give_the_numbers_back(self):
        lat = self.ragged([600, 700], 384)
        for dtype in export.DTYPES:
            for name in export.FILTERS:
                if name.endswith("zstd") and not have_zstd():
                    continue
                path = self.at("%s-%s.h5" % (dtype, name))
                export.write_shard(path, "text", "e", [0, 1], lat, width=384, dtype=dtype, filter=name)
                with h5py.File(path, "r") as f:
                    got = export.from_storage(f["latent"][:], f.attrs["dtype"])
                    chunk = f["latent"].chunks[0] * f["latent"].chunks[1] * f["latent"].dtype.itemsize
                error = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 0}[dtype]
                self.assertLessEqual(np.abs(got - np.concatenate(lat)).max(), error)
                self.assertTrue(2 ** 18 <= chunk <= 2 ** 20)

    def test_all_empty(self):
        path = export.write_shard(self.at("a.h5"), "text", "e", [1, 2], [None, None], width=8)
        with h5py.File(path, "r") as f:
            self.assertEqual(f["latent"].shape, (0, 8))

    def test_writers_agree_on_borders(self):
        for modality, width, options in (("image", 3, {"total": 11, "shards": 3}), ("text", 2, {"total": 11, "shards": 3})):
            with export.ShardWriter(self.at("train"), modality, encoder="e", width=width, **options) as w:
                for i in range(11):
                    w.append(100 + i, self.rng.randn(1 + i % 2, width))
            self.assertEqual(len(w.paths), 3)
        for k in range(3):
            self.assertEqual(export.read_ids(self.at("train", "image-%05d.h5" % k)),
                             export.read_ids(self.at("train", "text-%05d.h5" % k)))

    def test_same_input_same_bytes(self):
        lat = self.ragged([3, 4], 6)
        for name in ("a.h5", "b.h5"):
            export.write_shard(self.at(name), "text", "e", [0, 1], lat, width=6, keys=["x", "y"])
        with open(self.at("a.h5"), "rb") as a, open(self.at("b.h5"), "rb") as b:
            self.assertEqual(a.read(), b.read())

    def test_refusals_leave_nothing(self):
        cases = (([1, 1], self.ragged([1, 1], 4)), ([1], self.ragged([1, 1], 4)), ([1, 2], self.ragged([1, 1], 3)),
                 ([1, -2], self.ragged([1, 1], 4)), ([1, 2], [np.full((1, 4), np.nan)] * 2))
        for ids, lat in cases:
            with self.assertRaises(export.ExportError):
                export.write_shard(self.at("x.h5"), "text", "e", ids, lat, width=4)
        self.assertEqual(os.listdir(self.dir), [])
        with self.assertRaises(export.ExportError):
            export.ShardWriter(self.dir, "../x", encoder="e", width=4)


class Features(Folder):
    def shard(self, split="out", modality="image", k=0):
        return h5py.File(self.at(split, "%s-%05d.h5" % (modality, k)), "r")

    def test_npy(self):
        a = self.rng.randn(10, 6).astype(np.float32)
        np.save(self.at("f.npy"), a)
        rc, out, err = tool("features", self.at("f.npy"), "--out", self.at("out"), "--modality", "image",
                            "--samples-per-shard", 4, "--dtype", "float32", "--filter", "none")
        self.assertEqual((rc, err), (0, ""))
        self.assertIn("10 samples, 10 latents of width 6, 3 shards", out)
        with self.shard(k=2) as f:
            self.assertEqual(list(f["id"]), [8, 9])
            np.testing.assert_array_equal(f["latent"][:], a[8:])

    def test_npz_packed_named_and_like(self):
        rows = self.rng.randn(7, 3).astype(np.float32)
        np.savez(self.at("p.npz"), latent=rows, offset=np.array([0, 2, 2, 7]))
        np.savez(self.at("n.npz"), **{"s%d" % i: self.rng.randn(i % 3 + 1, 4) for i in (10, 2, 1)})
        with open(self.at("ids"), "w") as f:
            f.write("5\n6\n7\n")
        with open(self.at("labels"), "w") as f:
            f.write("0\n-1\n0\n")
        self.assertEqual(tool("features", self.at("p.npz"), "--out", self.at("out"), "--modality", "image", "--ids",
                              self.at("ids"), "--labels", self.at("labels"), "--samples-per-shard", 2)[0], 0)
        self.assertEqual(tool("features", self.at("n.npz"), "--out", self.at("out"), "--modality", "text",
                              "--like", self.at("out", "image"))[0], 0)
        with self.shard() as i, self.shard(modality="text") as t, self.shard(modality="text", k=1) as t1:
            self.assertEqual(list(i["offset"]), [0, 2, 2])
            self.assertEqual(list(i["label"]), [0, -1])
            self.assertEqual(list(t["id"]), list(i["id"]))
            self.assertEqual([k.decode() for k in t["key"]], ["s1", "s2"])
            self.assertEqual(list(t1["id"]), [7])

    def test_safetensors(self):
        f32 = self.rng.randn(2, 3, 4).astype(np.float32)
        save_safetensors(self.at("a.safetensors"), {"x": ("F32", f32)})
        save_safetensors(self.at("b.safetensors"), {"x": ("BF16", export.to_storage(f32[0], "bfloat16"))})
        self.assertEqual(tool("features", self.at("a.safetensors"), self.at("b.safetensors"), "--out", self.at("out"),
                              "--modality", "image", "--dtype", "bfloat16")[0], 0)
        with self.shard() as f:
            self.assertEqual(list(f["offset"]), [0, 3, 6, 7, 8, 9])
            self.assertEqual(f["latent"].dtype, np.uint16)
            np.testing.assert_allclose(export.from_storage(f["latent"][6:], "bfloat16"), f32[0], rtol=2 ** -8)

    def test_refusals_say_what_is_wrong(self):
        np.save(self.at("nan.npy"), np.full((2, 3), np.nan))
        np.save(self.at("deep.npy"), np.zeros((2, 3, 4, 5)))
        np.savez(self.at("off.npz"), latent=np.zeros((4, 2)), offset=np.array([0, 3, 2, 4]))
        np.save(self.at("ok.npy"), np.zeros((2, 3)))
        np.save(self.at("obj.npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
        with open(self.at("cut.safetensors"), "wb") as f:
            f.write(struct.pack("<Q", 10 ** 12) + b"{}")
        with open(self.at("two"), "w") as f:
            f.write("1\n1\n")
        with open(self.at("word"), "w") as f:
            f.write("one\ntwo\n")
        end = ["--out", self.at("out"), "--modality", "image"]
        for args, word in (([self.at("nan.npy")], "NaN"), ([self.at("deep.npy")], "4 axes"),
                           ([self.at("off.npz")], "offsets"), ([self.at("none.npy")], "no such"),
                           ([self.at("cut.safetensors")], "not a safetensors"), ([self.at("obj.npy")], "obj.npy"),
                           ([self.at("ok.npy"), "--ids", self.at("two")], "twice"),
                           ([self.at("ok.npy"), "--ids", self.at("word")], "word"),
                           ([self.at("ok.npy"), "--like", self.at("x", "text")], "text"),
                           ([self.at("word")], "expected a .npy"),
                           ([self.at("ok.npy"), "--modality", "a/b"], "modality")):
            rc, out, err = tool("features", *(args[:1] + end + args[1:]))
            self.assertEqual((rc, out, err.count("\n")), (1, "", 1), err)
            self.assertIn(word, err)
        self.assertFalse(glob.glob(self.at("out", "*")))
        self.assertEqual(tool("features", self.at("ok.npy"))[0], 2)

    def test_help(self):
        for args in (["--help"], ["features", "--help"], ["encode", "--help"]):
            rc, out, _ = tool(*args)
            self.assertEqual(rc, 0)
            self.assertIn("usage:", out)


class Encode(Folder):
    def test_missing_encoder_is_told(self):
        rc, _, err = tool("encode", self.dir, "--encoder", self.at("none"), "--kind", "text", "--out", self.at("o"),
                          "--modality", "text")
        self.assertEqual((rc, err.count("\n")), (1, 1), err)

    def test_grid(self):
        a = np.arange(49, dtype=np.float32).reshape(49, 1)
        np.testing.assert_allclose(export.pool_grid(a, 1), [[24]])
        np.testing.assert_allclose(export.pool_grid(a, 7), a)
        self.assertEqual(export.pool_grid(a, 2).shape, (4, 1))
        np.testing.assert_allclose(export.pool_grid(a, 2)[0], a.reshape(7, 7)[:4, :4].mean())

    def test_wave(self):
        data = (np.sin(np.arange(800) / 8000 * 2 * np.pi * 440) * 20000).astype("<i2")
        sink = io.BytesIO()
        with wave.open(sink, "wb") as f:
            f.setnchannels(1)
            f.setsampwidth(2)
            f.setframerate(8000)
            f.writeframes(data.tobytes())
        with open(self.at("a.wav"), "wb") as f:
            f.write(sink.getvalue())
        a, rate = export.read_wave(self.at("a.wav"), 16000)
        self.assertEqual((len(a), rate), (1600, 16000))
        np.testing.assert_allclose(a[::2], data / 32768.0, atol=0.02)


@unittest.skipUnless(glob.glob(os.path.join(GLYPHS, "train", "*.h5")), "no glyph set here")
class Glyphs(unittest.TestCase):
    def split(self, name):
        """Per shard, {modality: (ids, offsets, labels, keys, latents as float32)}."""
        shards = []
        count = len(glob.glob(os.path.join(GLYPHS, name, "image-*.h5")))
        for k in range(count):
            shard = {}
            for modality, width in WIDTHS.items():
                with h5py.File(os.path.join(GLYPHS, name, "%s-%05d.h5" % (modality, k)), "r") as f:
                    self.assertEqual((f.attrs["modality"], f.attrs["width"], f.attrs["version"]), (modality, width, 1))
                    filters = [f["latent"].id.get_create_plist().get_filter(i)[0]
                               for i in range(f["latent"].id.get_create_plist().get_nfilters())]
                    latent = None if 32015 in filters and not have_zstd() else \
                        export.from_storage(f["latent"][:], f.attrs["dtype"])
                    if latent is None:
                        self.unread.add(modality)
                    shard[modality] = (f["id"][:], f["offset"][:].astype(np.int64), f["label"][:],
                                       [x.decode() for x in f["key"]], latent, f["latent"].shape)
            shards.append(shard)
        self.assertFalse(glob.glob(os.path.join(GLYPHS, name, "*-%05d.h5" % count)))
        return shards

    def test_set(self):
        self.unread = set()
        splits = {name: self.split(name) for name in ("train", "validation")}
        if self.unread:
            print("not read, for want of hdf5plugin: latents of %s" % ", ".join(sorted(self.unread)))
        ids, groups = [], {}
        for name, shards in splits.items():
            groups[name] = set()
            for shard in shards:
                first = shard["image"]
                for got in shard.values():
                    np.testing.assert_array_equal(got[0], first[0])
                    np.testing.assert_array_equal(got[2], first[2])
                    self.assertEqual(got[3], first[3])
                    self.assertEqual((got[1][0], got[1][-1]), (0, got[5][0]))
                    self.assertTrue((np.diff(got[1]) >= 0).all() and len(got[1]) == len(got[0]) + 1)
                    if got[4] is not None:
                        self.assertTrue(np.isfinite(got[4]).all())
                        self.assertGreater(got[4].std(), 0.01)
                some = sum(np.diff(got[1]) > 0 for got in shard.values())
                self.assertTrue((some >= 1).all())
                if name == "validation":
                    self.assertTrue((some == 3).all())
                ids += [int(i) for i in first[0]]
                groups[name].update(int(v) for v in first[2] if v >= 0)
        self.assertEqual(len(ids), len(set(ids)))
        self.assertFalse(groups["train"] & groups["validation"])
        labels = [int(v) for shard in splits["validation"] for v in shard["image"][2]]
        self.assertEqual((len(labels), len(set(labels))), (336, 336))
        size = sum(os.path.getsize(p) for p in glob.glob(os.path.join(GLYPHS, "*", "*.h5")))
        self.assertLess(size, 40 * 2 ** 20)


if __name__ == "__main__":
    unittest.main()
