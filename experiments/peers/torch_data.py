#!/usr/bin/env python3
"""The samples of a latent set, delivered by h5py alone and by a PyTorch DataLoader over h5py.

    torch_data.py DIRECTORY [--split train] [--batch N] [--workers N] [--seconds S] [--cache-mib N]

Each variant delivers batches of one modality: packed rows [T, width] as a tensor, offsets and ids. Twice each, in file order and
in an order shuffled as ours (shards, then buffers of 1024 samples):

  h5py-plain      one process, a slice per sample, HDF5's defaults
  loader-plain    a Dataset of samples, HDF5's defaults, DataLoader with --workers processes that collate: as it is usually written
  h5py            one process, tuned
  loader          DataLoader with --workers processes, tuned

Tuned: HDF5's chunk cache holds --cache-mib per file and process (its default of 1 MiB decompresses a chunk for every sample of a
shuffled order), neighbours in a file are read with one slice, a worker reads whole batches, workers and files stay. The cache is
forgotten after each pass, as it is with a set that does not fit in memory.

Prints a JSON line a variant: samples/s, the best of passes that last at least --seconds together.
"""

import argparse
import glob
import json
import os
import time

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class Shards:
    """The files of one modality; opened by the process that reads them."""

    def __init__(self, folder, modality, cache):
        self.paths = sorted(glob.glob(os.path.join(folder, modality + "-*.h5")))
        self.cache, self.open_files, self.ids, self.offsets = cache, {}, [], []
        for path in self.paths:
            with h5py.File(path, "r") as f:
                self.ids.append(f["id"][:])
                self.offsets.append(f["offset"][:].astype(np.int64))
        counts = [len(i) for i in self.ids]
        self.base = np.concatenate([[0], np.cumsum(counts)])

    def latent(self, k):
        if k not in self.open_files:
            tuned = {"rdcc_nbytes": self.cache << 20, "rdcc_nslots": 100003} if self.cache else {}
            self.open_files[k] = h5py.File(self.paths[k], "r", **tuned)["latent"]
        return self.open_files[k]

    def read(self, samples):
        """Rows of samples (indices in file order), neighbours of one file with one slice."""
        rows, lengths, ids, i = [], [], [], 0
        while i < len(samples):
            k = int(np.searchsorted(self.base, samples[i], side="right") - 1)
            end = i + 1
            while self.cache and end < len(samples) and samples[end] == samples[end - 1] + 1 and samples[end] < self.base[k + 1]:
                end += 1
            a, b = samples[i] - self.base[k], samples[i] - self.base[k] + end - i
            offset = self.offsets[k]
            rows.append(self.latent(k)[offset[a]:offset[b]])
            lengths.append(np.diff(offset[a:b + 1]))
            ids.append(self.ids[k][a:b])
            i = end
        return (torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(lengths)),
                torch.from_numpy(np.concatenate(ids).astype(np.int64)))


def order(shards, shuffled, seed=1, buffer=1024):
    if not shuffled:
        return np.arange(shards.base[-1])
    rng = np.random.RandomState(seed)
    parts = [np.arange(shards.base[k], shards.base[k + 1]) for k in rng.permutation(len(shards.paths))]
    out = np.concatenate(parts)
    for at in range(0, len(out), buffer):
        rng.shuffle(out[at:at + buffer])
    return out


class Batches(Dataset):
    """An item is a whole batch, so that a worker reads it without a collate step."""

    def __init__(self, shards, samples, batch):
        self.shards, self.samples, self.batch, self.last = shards, samples, batch, -1

    def __len__(self):
        return (len(self.samples) + self.batch - 1) // self.batch

    def __getitem__(self, i):
        if i < self.last:               # a new pass
            self.shards.open_files.clear()
        self.last = i
        return self.shards.read(self.samples[i * self.batch:(i + 1) * self.batch])


class Samples(Dataset):
    """An item is a sample."""

    def __init__(self, shards, samples):
        self.shards, self.samples = shards, samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.shards.read(self.samples[i:i + 1])


def collate(items):
    return tuple(torch.cat(column) for column in zip(*items))


def passes(run, seconds):
    """Samples/s of the best pass; the first one warms up, unless it alone took that long."""
    started, best = time.perf_counter(), 0.0
    count, first = run(), time.perf_counter() - started
    if first > seconds:
        return count / first
    while best == 0 or time.perf_counter() - started < seconds:
        since = time.perf_counter()
        best = max(best, run() / (time.perf_counter() - since))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--split", default="train")
    parser.add_argument("--modality", default="image")
    parser.add_argument("--batch", type=int, default=170)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--cache-mib", type=int, default=64)
    args = parser.parse_args()
    folder = os.path.join(args.directory, args.split)
    for shuffled in (False, True):
        for name in ("loader-plain", "h5py-plain", "loader", "h5py"):
            shards = Shards(folder, args.modality, 0 if "plain" in name else args.cache_mib)
            samples = order(shards, shuffled)
            source = Batches(shards, samples, args.batch)
            workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
            if name == "loader-plain":
                source = DataLoader(Samples(shards, samples), batch_size=args.batch, collate_fn=collate, **workers)
            elif name == "loader":      # forked while this process has nothing in HDF5's cache
                source = DataLoader(source, batch_size=None, **workers)

            def run(source=source):
                return sum(len(batch[1]) for batch in (source[i] for i in range(len(source)))
                           ) if isinstance(source, Batches) else sum(len(batch[1]) for batch in source)
            rate = passes(run, args.seconds)
            print(json.dumps({"bench": "data", "peer": name, "path": folder, "order": "shuffled" if shuffled else "file",
                              "workers": args.workers if "loader" in name else 1, "samples": len(samples),
                              "samples_s": round(rate, 1), "h5py": h5py.__version__, "torch": torch.__version__}),
                  flush=True)
            shards.open_files.clear()


if __name__ == "__main__":
    main()
