#!/usr/bin/env python3
"""Write latent shards: the HDF5 files that Antiphon trains on.

Two ways in:

  features   latents that exist already, in .npy, .npz or .safetensors files
  encode     a local Hugging Face encoder and a folder of images, texts or audio

and one way out, `ShardWriter` (many samples, one modality, shards of equal
length) on top of `write_shard` (one file).  Other programs import both.

A shard is one HDF5 file, `<modality>-<NNNNN>.h5`, in the folder of its split
(`train/`, `validation/`).  Shard k of every modality holds the same sample ids
in the same order.  Inside:

  attributes of the root
    format    string "antiphon-latents"      modality  string
    version   int32, 1                       encoder   string
    dtype     string "float16" | "bfloat16" | "float32"
    width     int32, numbers per latent
  datasets
    id        uint64 [N]      unique, below 2^63
    offset    uint64 [N+1]    sample i owns the rows offset[i] .. offset[i+1];
                              none at all means: it lacks this modality
    latent    [T, width]      float16, float32, or bfloat16 as uint16;
                              chunked by rows
    label     int32 [N]       optional; samples of equal label show the same
                              thing, -1 = no label
    key       string [N]      optional; what a person calls the sample
    prompt_token int32, prompt_offset uint64 [N+1]     optional
    target_token int32, target_offset uint64 [N+1]     optional

Strings are variable-length UTF-8, attributes and `key` alike.

numpy and h5py are enough for `features`.  The rest is imported when it is
needed: hdf5plugin for the zstd filters, torch and transformers for `encode`,
Pillow for images, safetensors for model files of that kind.
Nothing is fetched from a network.
"""

import argparse
import importlib
import json
import os
import re
import struct
import sys
import wave

FORMAT = "antiphon-latents"
VERSION = 1
DTYPES = ("float16", "bfloat16", "float32")
FILTERS = ("none", "gzip", "shuffle+gzip", "zstd", "shuffle+zstd")
CHUNK_BYTES = 512 * 1024
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
AUDIO_ENDINGS = (".wav",)
TEXT_ENDINGS = (".txt",)


class ExportError(Exception):
    """A mistake of the caller or of the input, told in one sentence."""


def need(module, purpose, package=None):
    """Import a module that only some uses need, or say what is missing and why."""
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise ExportError("%s needs the Python package %s (%s)"
                          % (purpose, package or module, err)) from err


np = None
h5py = None


def _load():
    """Bind numpy and h5py, so that --help works on a machine without them."""
    global np, h5py
    if h5py is None:
        np = need("numpy", "writing shards")
        h5py = need("h5py", "writing shards")


# --- numbers ---------------------------------------------------------------

def to_storage(array, dtype, mantissa_bits=None):
    """Round float data to nearest-even in `dtype`; bfloat16 comes back as uint16.

    `mantissa_bits` keeps only so many explicit bits of a float16 mantissa (of
    10).  The rest become zeros, which a compressor removes.  An error of at
    most 2^-(bits+1), relative, is the price.
    """
    _load()
    a = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(a).all():
        raise ExportError("latents hold NaN or infinity")
    if dtype == "float32":
        return a
    if dtype == "bfloat16":
        bits = a.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.astype(np.uint16)
    if dtype != "float16":
        raise ExportError("dtype %r is none of %s" % (dtype, ", ".join(DTYPES)))
    with np.errstate(over="ignore"):
        h = a.astype(np.float16)
    if not np.isfinite(h).all():
        raise ExportError("latents reach %g, beyond the range of float16; use bfloat16 or float32"
                          % np.abs(a).max())
    if mantissa_bits is not None and mantissa_bits < 10:
        drop = 10 - mantissa_bits
        bits = h.view(np.uint16).astype(np.uint32)
        bits = bits + (1 << (drop - 1)) - 1 + ((bits >> drop) & 1)
        h = (bits >> drop << drop).astype(np.uint16).view(np.float16)
        if not np.isfinite(h).all():
            raise ExportError("latents reach %g, beyond the range of float16" % np.abs(a).max())
    return h


def from_storage(array, dtype):
    """The inverse of to_storage: float32 numbers of a stored array."""
    _load()
    if dtype == "bfloat16":
        return (np.asarray(array).astype(np.uint32) << 16).view(np.float32)
    return np.asarray(array, dtype=np.float32)


# --- shards ----------------------------------------------------------------

def filter_options(name, level=None):
    """Arguments of h5py's create_dataset for one of FILTERS."""
    if name not in FILTERS:
        raise ExportError("filter %r is none of %s" % (name, ", ".join(FILTERS)))
    options = {"shuffle": True} if name.startswith("shuffle+") else {}
    if name.endswith("gzip"):
        options.update(compression="gzip", compression_opts=9 if level is None else level)
    elif name.endswith("zstd"):
        plugin = need("hdf5plugin", "the filter %s" % name)
        options.update(**plugin.Zstd(clevel=19 if level is None else level))
    return options


def _offsets(lengths):
    out = np.zeros(len(lengths) + 1, dtype=np.uint64)
    out[1:] = np.cumsum(np.asarray(lengths, dtype=np.uint64))
    return out


def _chunk_rows(rows, row_bytes):
    return max(1, min(rows, CHUNK_BYTES // row_bytes))


def _write_tokens(file, name, sequences):
    sequences = [np.asarray([] if s is None else s, dtype=np.int32).reshape(-1) for s in sequences]
    flat = np.concatenate(sequences) if sequences else np.zeros(0, np.int32)
    file.create_dataset(name + "_token", data=flat.astype(np.int32))
    file.create_dataset(name + "_offset", data=_offsets([len(s) for s in sequences]))


def write_shard(path, modality, encoder, ids, latents, *, width, dtype="float16",
                labels=None, keys=None, prompts=None, targets=None,
                filter="shuffle+gzip", level=None, mantissa_bits=None):
    """Write one shard; the file appears under its name only when it is whole.

    ids: N unique whole numbers.  latents: N arrays [t_i, width]; t_i = 0, or
    None in place of the array, says that the sample lacks this modality.
    """
    _load()
    ids = [int(i) for i in ids]
    if len(latents) != len(ids):
        raise ExportError("%s: %d ids but %d latents" % (path, len(ids), len(latents)))
    if len(set(ids)) != len(ids):
        raise ExportError("%s: sample ids are not unique" % path)
    if ids and not 0 <= min(ids) <= max(ids) < 2 ** 63:
        raise ExportError("%s: sample ids must lie in 0 .. 2^63 - 1" % path)
    for name, column in (("labels", labels), ("keys", keys), ("prompts", prompts), ("targets", targets)):
        if column is not None and len(column) != len(ids):
            raise ExportError("%s: %d ids but %d %s" % (path, len(ids), len(column), name))
    rows = []
    for i, a in zip(ids, latents):
        a = np.zeros((0, width), np.float32) if a is None else np.asarray(a, dtype=np.float32)
        if a.ndim == 1 and a.size:
            a = a[None]
        if a.ndim != 2 or a.shape[1] != width:
            raise ExportError("%s: sample %d has latents of shape %s, not [t, %d]"
                              % (path, i, list(a.shape), width))
        rows.append(a)
    packed = np.concatenate(rows) if rows else np.zeros((0, width), np.float32)
    try:
        stored = to_storage(packed, dtype, mantissa_bits)
    except ExportError as err:
        raise ExportError("%s: %s" % (path, err)) from None
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    part = path + ".part"
    try:
        with h5py.File(part, "w") as file:
            for name, value in (("format", FORMAT), ("modality", modality), ("encoder", encoder),
                                ("dtype", dtype)):
                file.attrs.create(name, value, dtype=h5py.string_dtype("utf-8"))
            file.attrs.create("version", VERSION, dtype="<i4")
            file.attrs.create("width", width, dtype="<i4")
            file.create_dataset("id", data=np.asarray(ids, dtype=np.uint64))
            file.create_dataset("offset", data=_offsets([len(r) for r in rows]))
            file.create_dataset("latent", data=stored, maxshape=(None, width),
                                chunks=(_chunk_rows(len(stored), width * stored.itemsize), width),
                                **filter_options(filter, level))
            if labels is not None:
                file.create_dataset("label", data=np.asarray(labels, dtype=np.int32))
            if keys is not None:
                file.create_dataset("key", data=list(keys), shape=(len(ids),),
                                    dtype=h5py.string_dtype("utf-8"))
            if prompts is not None:
                _write_tokens(file, "prompt", prompts)
            if targets is not None:
                _write_tokens(file, "target", targets)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)
    return path


class ShardWriter:
    """Collects the samples of one modality and writes shards of equal length.

    Two writers given the same samples in the same order and the same
    `samples_per_shard` (or `shards` with `total`) agree on every shard border,
    as the format asks of modalities that belong together.

        with ShardWriter("set/train", "image", encoder="dinov2", width=768) as w:
            for n, latent in enumerate(latents):
                w.append(n, latent, key=names[n])
    """

    def __init__(self, directory, modality, *, encoder, width, samples_per_shard=4096,
                 total=None, shards=None, dtype="float16", filter="shuffle+gzip", level=None,
                 mantissa_bits=None):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", modality):
            raise ExportError("modality %r: use a letter, then letters, digits and _" % modality)
        if dtype not in DTYPES:
            raise ExportError("dtype %r is none of %s" % (dtype, ", ".join(DTYPES)))
        if (total is None) != (shards is None):
            raise ExportError("give both total and shards, or neither")
        if width < 1 or samples_per_shard < 1 or (shards is not None and shards < 1):
            raise ExportError("width, samples_per_shard and shards must be at least 1")
        filter_options(filter, level)
        self.directory, self.modality, self.width = directory, modality, width
        self.paths = []
        self._borders = None
        if shards is not None:
            self._borders = [total * (k + 1) // shards - total * k // shards for k in range(shards)]
        self._per_shard = samples_per_shard
        self._options = dict(encoder=encoder, width=width, dtype=dtype, filter=filter, level=level,
                             mantissa_bits=mantissa_bits)
        self._seen = set()
        self._rows = []

    def _target(self):
        if self._borders is None:
            return self._per_shard
        if len(self.paths) >= len(self._borders):
            raise ExportError("more samples than the announced total of %d" % sum(self._borders))
        return self._borders[len(self.paths)]

    def append(self, id, latent, *, label=None, key=None, prompt=None, target=None):
        """Add one sample; latent is [t, width], [width], or None if it has none."""
        if id in self._seen:
            raise ExportError("sample id %d comes twice" % id)
        self._seen.add(id)
        self._rows.append((id, latent, label, key, prompt, target))
        if len(self._rows) >= self._target():
            self._flush()

    def _flush(self):
        columns = list(zip(*self._rows))
        ids, latents, labels, keys, prompts, targets = columns
        given = [None if all(v is None for v in c) else list(c) for c in (labels, keys, prompts, targets)]
        if given[0] is not None:
            given[0] = [-1 if v is None else v for v in given[0]]
        if given[1] is not None:
            given[1] = ["" if v is None else v for v in given[1]]
        path = os.path.join(self.directory, "%s-%05d.h5" % (self.modality, len(self.paths)))
        write_shard(path, self.modality, ids=ids, latents=latents, labels=given[0], keys=given[1],
                    prompts=given[2], targets=given[3], **self._options)
        self.paths.append(path)
        self._rows = []

    def close(self):
        if self._rows:
            self._flush()
        if self._borders is not None and len(self.paths) != len(self._borders):
            raise ExportError("fewer samples than the announced total of %d" % sum(self._borders))
        return self.paths

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is None:
            self.close()


def write_shards(directory, modality, samples, **options):
    """Write all of `samples` (dicts of ShardWriter.append's arguments); returns the paths."""
    with ShardWriter(directory, modality, **options) as writer:
        for sample in samples:
            writer.append(**sample)
    return writer.paths


def read_ids(path):
    """The ids of an existing shard, to line up another modality with it."""
    _load()
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") not in (FORMAT, FORMAT.encode()):
                raise ExportError("%s is not a latent shard" % path)
            return [int(i) for i in file["id"][:]]
    except (OSError, KeyError) as err:
        raise ExportError("%s: %s" % (path, err)) from err


# --- features that exist already ------------------------------------------

_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
                "I16": "<i2", "I8": "<i1", "U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
                "BOOL": "<u1"}


def read_safetensors(path):
    """All tensors of a .safetensors file by name, bfloat16 widened to float32."""
    _load()
    with open(path, "rb") as file:
        head = file.read(8)
        size = os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise ExportError("%s: not a safetensors file" % path)
        try:
            header = json.loads(file.read(length))
        except ValueError as err:
            raise ExportError("%s: not a safetensors file (%s)" % (path, err)) from err
        data = file.read()
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["dtype"] not in _SAFETENSORS:
            raise ExportError("%s: tensor %s has type %s, which is not read here" % (path, name, info["dtype"]))
        begin, end = info["data_offsets"]
        if end > len(data):
            raise ExportError("%s: cut short, tensor %s is not whole" % (path, name))
        a = np.frombuffer(data[begin:end], dtype=_SAFETENSORS[info["dtype"]]).reshape(info["shape"])
        tensors[name] = from_storage(a, "bfloat16") if info["dtype"] == "BF16" else a
    return tensors


def _natural(name):
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]


def _as_samples(name, array, tokens):
    """One array -> list of samples [t, width]."""
    if array.ndim == 3:
        return list(array)
    if array.ndim != 2:
        raise ExportError("%s has %d axes; expected [tokens, width], [N, width] or [N, tokens, width]"
                          % (name, array.ndim))
    return [row[None] for row in array] if tokens == "one-per-sample" else [array]


def load_features(path, tokens="auto", latent_name=None, offset_name=None):
    """Samples of one file, as (key, array [t, width]) pairs in the file's order.

    .npy            [N, width] (N samples of one token) or [N, t, width];
                    an object array of N arrays [t_i, width] is refused, since
                    reading it would run code out of the file
    .npz, .safetensors
                    packed rows with offsets (arrays `latent` and `offset`, or
                    the names given), one array [N, width] / [N, t, width], or
                    one array [t, width] per sample, in natural order of names
    """
    _load()
    stem = os.path.splitext(os.path.basename(path))[0]
    try:
        if path.endswith(".npy"):
            arrays = {stem: np.load(path, allow_pickle=False)}
        elif path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        elif path.endswith(".safetensors"):
            arrays = read_safetensors(path)
        else:
            raise ExportError("%s: expected a .npy, .npz or .safetensors file" % path)
    except (OSError, ValueError, KeyError) as err:
        raise ExportError("%s: %s" % (path, err)) from err
    if not arrays:
        raise ExportError("%s holds no arrays" % path)
    latent_name = latent_name or ("latent" if "latent" in arrays and "offset" in arrays else None)
    if latent_name is not None:
        offset_name = offset_name or "offset"
        for name in (latent_name, offset_name):
            if name not in arrays:
                raise ExportError("%s has no array %r (it has %s)" % (path, name, ", ".join(sorted(arrays))))
        rows, offset = arrays[latent_name], arrays[offset_name].astype(np.int64)
        if rows.ndim != 2 or offset.ndim != 1 or len(offset) < 1:
            raise ExportError("%s: packed rows need [T, width] and offsets [N+1]" % path)
        if offset[0] != 0 or offset[-1] != len(rows) or (np.diff(offset) < 0).any():
            raise ExportError("%s: offsets must rise from 0 to the number of rows, %d" % (path, len(rows)))
        return [("%s/%d" % (stem, i), rows[offset[i]:offset[i + 1]]) for i in range(len(offset) - 1)]
    if len(arrays) == 1:
        name, array = next(iter(arrays.items()))
        if tokens == "auto":
            tokens = "one-per-sample"
        samples = _as_samples("%s: array %s" % (path, name), array, tokens)
        keys = ["%s/%d" % (stem, i) for i in range(len(samples))] if len(samples) > 1 else [stem]
        return list(zip(keys, samples))
    out = []
    for name in sorted(arrays, key=_natural):
        array = arrays[name]
        if array.ndim == 1:
            array = array[None]
        if array.ndim != 2:
            raise ExportError("%s: array %s has %d axes; expected one [tokens, width] per sample"
                              % (path, name, array.ndim))
        out.append((name, array))
    return out


def _expand(paths, endings):
    files = []
    for path in paths:
        if os.path.isdir(path):
            inside = [os.path.join(path, name) for name in sorted(os.listdir(path), key=_natural)
                      if name.lower().endswith(endings)]
            if not inside:
                raise ExportError("%s: no file that ends in %s" % (path, " ".join(endings)))
            files += inside
        elif os.path.exists(path):
            files.append(path)
        else:
            raise ExportError("%s: no such file or folder" % path)
    return files


# --- encoders --------------------------------------------------------------

def pool_grid(tokens, grid):
    """Average a square map of tokens [s*s, width] (or [h, w, width]) down to grid x grid."""
    _load()
    a = np.asarray(tokens, dtype=np.float32)
    if a.ndim == 2:
        side = int(round(len(a) ** 0.5))
        if side * side != len(a):
            raise ExportError("%d tokens do not form a square; --grid needs one" % len(a))
        a = a.reshape(side, side, -1)
    h, w, width = a.shape
    if grid > min(h, w):
        raise ExportError("--grid %d is larger than the encoder's %d x %d map" % (grid, h, w))
    out = [a[i * h // grid:-(-(i + 1) * h // grid), j * w // grid:-(-(j + 1) * w // grid)].mean((0, 1))
           for i in range(grid) for j in range(grid)]
    return np.stack(out).reshape(grid * grid, width)


def read_wave(path, rate=None):
    """A PCM .wav as mono float32 in [-1, 1] and its rate; resampled when `rate` is given."""
    _load()
    try:
        with wave.open(path, "rb") as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as err:
        raise ExportError("%s: %s (only PCM .wav is read)" % (path, err)) from err
    if width == 1:
        a = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    elif width in (2, 4):
        a = np.frombuffer(raw, "<i%d" % width).astype(np.float32) / float(1 << (8 * width - 1))
    else:
        raise ExportError("%s: samples of %d bytes are not read here" % (path, width))
    a = a.reshape(-1, channels).mean(1)
    return (resample(a, own, rate), rate) if rate and rate != own else (a, own)


def resample(signal, old, new):
    """Change the rate by cutting (or padding) the spectrum: no aliasing, no delay."""
    _load()
    n = len(signal)
    m = max(1, int(round(n * new / old)))
    if n == 0:
        return signal
    spectrum = np.fft.rfft(np.asarray(signal, dtype=np.float64))
    kept = np.zeros(m // 2 + 1, dtype=complex)
    k = min(len(kept), len(spectrum))
    kept[:k] = spectrum[:k]
    return (np.fft.irfft(kept, m) * (m / n)).astype(np.float32)


class HuggingFaceEncoder:
    """The last hidden states of a local Hugging Face encoder, frozen."""

    def __init__(self, directory, kind, keep_special=True, max_tokens=None):
        _load()
        if not os.path.isdir(directory):
            raise ExportError("%s: no such folder; the encoder must be on this machine" % directory)
        if not os.path.exists(os.path.join(directory, "config.json")):
            raise ExportError("%s has no config.json; expected a Hugging Face model folder" % directory)
        self.torch = need("torch", "encode")
        hub = need("transformers", "encode")
        hub.logging.set_verbosity_error()
        try:
            self.model = hub.AutoModel.from_pretrained(directory, local_files_only=True)
            if kind == "text":
                self.prepare = hub.AutoTokenizer.from_pretrained(directory, local_files_only=True)
            elif kind == "image":
                need("PIL", "reading images", "Pillow")
                self.prepare = hub.AutoImageProcessor.from_pretrained(directory, local_files_only=True)
            else:
                self.prepare = hub.AutoFeatureExtractor.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as err:
            raise ExportError("%s: %s" % (directory, err)) from err
        self.model = self._tower(self.model, kind)
        self.model.eval()
        self.kind, self.keep_special, self.max_tokens = kind, keep_special, max_tokens

    @staticmethod
    def _tower(model, kind):
        """The part that encodes `kind`: a tower of a CLIP-like pair, or the encoder of a translator."""
        tower = {"image": "vision_model", "text": "text_model"}.get(kind)
        if tower and hasattr(model, tower):
            return getattr(model, tower)
        if hasattr(model, "encoder") and hasattr(model, "decoder"):
            return model.get_encoder()
        return model

    def __call__(self, items):
        """Latents [t_i, width] of a batch: strings, PIL images or (signal, rate) pairs."""
        with self.torch.no_grad():
            return getattr(self, "_" + self.kind)(items)

    def _text(self, items):
        limit = self.max_tokens or min(self.prepare.model_max_length,
                                       getattr(self.model.config, "max_position_embeddings", 512))
        if self.prepare.pad_token is None:
            self.prepare.pad_token = self.prepare.eos_token
        batch = self.prepare(items, padding=True, truncation=True, max_length=limit,
                             return_tensors="pt", return_special_tokens_mask=True)
        special = batch.pop("special_tokens_mask").bool()
        mask = batch["attention_mask"].bool()
        states = self.model(**batch).last_hidden_state
        keep = mask if self.keep_special else mask & ~special
        return [states[i][keep[i]].float().numpy() for i in range(len(items))]

    def _image(self, items):
        batch = self.prepare(images=[i.convert("RGB") for i in items], return_tensors="pt")
        states = self.model(pixel_values=batch["pixel_values"]).last_hidden_state
        if states.ndim == 4:                       # a convolutional map [B, C, h, w]
            return list(states.permute(0, 2, 3, 1).flatten(1, 2).float().numpy())
        if not self.keep_special:                  # class (and register) tokens come first
            first = 1 + (getattr(self.model.config, "num_register_tokens", 0) or 0)
            states = states[:, first:]
        return list(states.float().numpy())

    def _audio(self, items):
        rate = getattr(self.prepare, "sampling_rate", 16000)
        out = []
        for signal, own in items:                  # one at a time: padding would change the states
            signal = resample(signal, own, rate) if own != rate else signal
            batch = self.prepare(signal, sampling_rate=rate, return_tensors="pt")
            name = "input_features" if "input_features" in batch else "input_values"
            out.append(self.model(batch[name]).last_hidden_state[0].float().numpy())
        return out


def load_items(paths, kind, lines):
    """Pairs (key, item) to encode, read one by one."""
    endings = {"image": IMAGE_ENDINGS, "text": TEXT_ENDINGS, "audio": AUDIO_ENDINGS}[kind]
    for path in _expand(paths, endings):
        stem = os.path.basename(path)
        if kind == "text":
            try:
                with open(path, encoding="utf-8") as file:
                    text = file.read()
            except UnicodeDecodeError as err:
                raise ExportError("%s is not UTF-8 text (%s)" % (path, err)) from err
            if lines:
                for n, line in enumerate(text.splitlines()):
                    yield "%s:%d" % (stem, n + 1), line
            else:
                yield stem, text.strip()
        elif kind == "image":
            image = need("PIL.Image", "reading images", "Pillow")
            try:
                with image.open(path) as file:
                    yield stem, file.convert("RGB")
            except OSError as err:
                raise ExportError("%s: %s" % (path, err)) from err
        else:
            yield stem, read_wave(path)


def encode_items(encoder, items, batch, grid=None):
    """Yield (key, latents) for (key, item) pairs; an empty text yields no latents."""
    pending = []

    def run():
        full = [(k, i) for k, i in pending if not (isinstance(i, str) and not i)]
        states = iter(encoder([i for _, i in full]) if full else [])
        for k, i in pending:
            a = None if isinstance(i, str) and not i else next(states)
            yield k, pool_grid(a, grid) if grid and a is not None else a

    for pair in items:
        pending.append(pair)
        if len(pending) == batch:
            yield from run()
            pending = []
    if pending:
        yield from run()


# --- command line ----------------------------------------------------------

def _read_table(path, convert):
    """Lines of a text file, or a .npy, as a list."""
    _load()
    if path.endswith(".npy"):
        return [convert(v) for v in np.load(path, allow_pickle=False)]
    try:
        with open(path, encoding="utf-8") as file:
            return [convert(line.rstrip("\n")) for line in file]
    except (OSError, ValueError) as err:
        raise ExportError("%s: %s" % (path, err)) from err


def _table(path, convert, count, what):
    values = _read_table(path, convert) if path else None
    if values is not None and len(values) != count:
        raise ExportError("%s: %d %s for %d samples" % (path, len(values), what, count))
    return values


def _ids(args, count):
    """(ids, border of each shard or None): new, from a file, or those of another modality."""
    if args.like:
        folder = os.path.dirname(args.like) or "."
        names = sorted(n for n in (os.listdir(folder) if os.path.isdir(folder) else [])
                       if re.fullmatch(re.escape(os.path.basename(args.like)) + r"-\d{5}\.h5", n))
        if not names:
            raise ExportError("no shards %s-NNNNN.h5" % args.like)
        parts = [read_ids(os.path.join(folder, n)) for n in names]
        if sum(map(len, parts)) != count:
            raise ExportError("%s-*.h5 hold %d samples, here are %d" % (args.like, sum(map(len, parts)), count))
        return [i for p in parts for i in p], [len(p) for p in parts]
    ids = _table(args.ids, int, count, "ids") or list(range(args.first_id, args.first_id + count))
    return ids, None


def export(args, samples):
    """Write (key, latents) pairs as the command line asks; returns a summary line."""
    samples = list(samples)
    if not samples:
        raise ExportError("no samples")
    width = next((a.shape[-1] for _, a in samples if a is not None and a.size), None)
    if width is None:
        raise ExportError("every sample is empty")
    ids, borders = _ids(args, len(samples))
    labels = _table(args.labels, int, len(samples), "labels")
    keys = _table(args.keys, str, len(samples), "keys") or [k for k, _ in samples]
    writer = ShardWriter(args.out, args.modality, encoder=args.encoder_name, width=int(width),
                         samples_per_shard=args.samples_per_shard, dtype=args.dtype, filter=args.filter,
                         level=args.level, mantissa_bits=args.mantissa_bits)
    if borders is not None:
        writer._borders = borders
    with writer:
        for n, (_, latent) in enumerate(samples):
            writer.append(ids[n], latent, label=labels[n] if labels else None, key=keys[n])
    tokens = sum(0 if a is None else (1 if a.ndim == 1 else len(a)) for _, a in samples)
    size = sum(os.path.getsize(p) for p in writer.paths)
    return "%s: %d samples, %d latents of width %d, %d shards, %.1f MiB in %s" % (
        args.modality, len(samples), tokens, width, len(writer.paths), size / 2 ** 20, args.out)


def cmd_features(args):
    pairs = []
    for path in _expand(args.input, (".npy", ".npz", ".safetensors")):
        pairs += load_features(path, args.tokens, args.latent_name, args.offset_name)
    args.encoder_name = args.encoder_name or "unknown"
    return export(args, pairs)


def cmd_encode(args):
    torch = need("torch", "encode")
    if args.threads:
        torch.set_num_threads(args.threads)
    encoder = HuggingFaceEncoder(args.encoder, args.kind, not args.drop_special, args.max_tokens)
    args.encoder_name = args.encoder_name or os.path.basename(os.path.normpath(args.encoder))
    items = load_items(args.input, args.kind, args.lines)
    return export(args, encode_items(encoder, items, args.batch, args.grid))


def _number(low, high=None):
    def convert(text):
        value = int(text)
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError("must be %s" % (
                "at least %d" % low if high is None else "in %d .. %d" % (low, high)))
        return value
    convert.__name__ = "number"
    return convert


def build_parser():
    parser = argparse.ArgumentParser(
        prog="export_latents.py", description=__doc__.split("\n\n")[0],
        epilog="Exit status: 0 written, 1 refused (one line says why), 2 wrong usage.")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("input", nargs="+", help="files or folders, in this order")
    common.add_argument("--out", required=True, metavar="DIR", help="folder of the split, e.g. my-set/train")
    common.add_argument("--modality", required=True, help="name of the modality, e.g. image")
    common.add_argument("--encoder-name", metavar="TEXT", help="what the shard says made the latents")
    common.add_argument("--ids", metavar="FILE", help="one id per sample (lines of text or .npy); default 0, 1, 2, ...")
    common.add_argument("--first-id", type=_number(0), default=0, metavar="N", help="first id when --ids is absent")
    common.add_argument("--like", metavar="DIR/MODALITY",
                        help="take ids and shard borders from the shards of another modality")
    common.add_argument("--labels", metavar="FILE", help="one whole number per sample; equal = the same thing, -1 = none")
    common.add_argument("--keys", metavar="FILE", help="one readable name per sample; default: from the file names")
    common.add_argument("--dtype", choices=DTYPES, default="float16")
    common.add_argument("--mantissa-bits", type=_number(1, 10), metavar="N",
                        help="round float16 to N explicit mantissa bits (of 10): smaller files")
    common.add_argument("--filter", choices=FILTERS, default="shuffle+gzip")
    common.add_argument("--level", type=_number(0, 22), metavar="N", help="compression level (gzip 9, zstd 19)")
    common.add_argument("--samples-per-shard", type=_number(1), default=4096, metavar="N")
    f = sub.add_parser("features", parents=[common], help="latents from .npy, .npz, .safetensors",
                       description=load_features.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    f.add_argument("--tokens", choices=("auto", "one-per-sample", "one-sample"), default="auto",
                   help="what a lone array [N, width] is: N samples of one latent (auto), or one sample of N")
    f.add_argument("--latent-name", metavar="NAME", help="array of the packed rows (default latent)")
    f.add_argument("--offset-name", metavar="NAME", help="array of the offsets (default offset)")
    f.set_defaults(run=cmd_features)
    e = sub.add_parser("encode", parents=[common], help="latents by a local Hugging Face encoder",
                       description="Run a frozen encoder from a local Hugging Face folder; nothing is fetched.")
    e.add_argument("--encoder", required=True, metavar="DIR", help="folder with config.json and weights")
    e.add_argument("--kind", required=True, choices=("image", "text", "audio"))
    e.add_argument("--lines", action="store_true", help="text: each line of a file is a sample")
    e.add_argument("--drop-special", action="store_true", help="leave out class and separator tokens")
    e.add_argument("--max-tokens", type=_number(1), metavar="N", help="text: cut longer inputs")
    e.add_argument("--grid", type=_number(1), metavar="G", help="image: average the map of tokens to G x G")
    e.add_argument("--batch", type=_number(1), default=16, metavar="N")
    e.add_argument("--threads", type=_number(1), metavar="N", help="processor threads")
    e.set_defaults(run=cmd_encode)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        print(args.run(args))
    except (ExportError, OSError) as err:
        print("export_latents.py: %s" % err, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
