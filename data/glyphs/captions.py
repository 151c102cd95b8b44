#!/usr/bin/env python3
"""Make a set for decoders of the glyph set: latents of one modality and a prompt, to be continued by the English name.

    captions.py --out DIR

Tokens are bytes; 2 begins a sequence and 3 ends it.  Every sample has the latents of one modality at most, and shards of
all three modalities stand in every split, so that a model may use any of them:

    split       samples                             prompt (a mark is where the latents go)    response
    base        names and words, keywords and names none; "k, k\\nname:"; "n\\nkeywords:"         a name or word; keywords
    image       pictures                            [image]name:                               the name
    speech      spoken names and words              [speech]name:                              the name
    text        text latents of names               [text]name:                                the name
    mixture     those of image and of speech
    few         a tenth as many of speech as there are pictures
    uneven      those of image and of few
    mixture_all those of image, speech and text
    old         those of base and of image

and `<split>_validation` of base, image, speech, text and mixture, of held-out things: no other split answers `name:` with
theirs, though a keyword that base reads may be one.  Splits share files (hard links).  Needs numpy, h5py and zstandard
(Debian: python3-h5py, python3-zstandard) and no network.
"""

import argparse
import hashlib
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import export_latents as export                                   # noqa: E402
from export_latents import ExportError, need                      # noqa: E402

BEGIN, END = 2, 3
MODALITIES = (("image", 1280), ("speech", 96), ("text", 384))     # a mark in a prompt is -1 - the place here
VOCABULARY = "bytes, 2 begins, 3 ends"
GZIP, ZSTD = 1, 32015
SHARE = 0.1                                                       # of `uneven`: speech for each picture

# --- the glyph set -----------------------------------------------------------


def rows_of(dataset):
    """All rows of a dataset; h5py alone does not know zstd."""
    np = need("numpy", "reading shards")
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    if ZSTD not in filters:
        return dataset[...]
    if filters != [ZSTD]:
        raise ExportError("%s: filters %s; expected zstd alone" % (dataset.file.filename, filters))
    unpack = need("zstandard", "reading zstd").ZstdDecompressor()
    rows, width = dataset.chunks
    out = np.zeros(dataset.shape, dataset.dtype)
    for first in range(0, len(out), rows):
        stored = dataset.id.read_direct_chunk((first, 0))[1]
        raw = unpack.decompress(stored, max_output_size=rows * width * dataset.dtype.itemsize)
        some = np.frombuffer(raw, dataset.dtype).reshape(rows, width)
        out[first:first + rows] = some[:len(out) - first]
    return out


def name_of(key):
    """What a key says of a sample's name: (whether it is a keyword, the name; None without one)."""
    words = key.split(" | ")[0].split(" ")
    if words[0] == "keyword":
        return True, " ".join(words[1:])
    name = " ".join(w for w in words if not w.startswith("U+"))
    return False, None if name == "(unnamed)" else name


def read_split(split):
    """[(id, whether it is a keyword, name, {modality: latents, None if absent})] in the shards' order."""
    h5py = need("h5py", "reading shards")
    folder = os.path.join(HERE, split)
    samples = []
    for number in range(len([f for f in os.listdir(folder) if f.startswith("image-")])):
        columns = {}
        for modality, _ in MODALITIES:
            with h5py.File(os.path.join(folder, "%s-%05d.h5" % (modality, number)), "r") as file:
                rows, at = rows_of(file["latent"]), file["offset"][...].astype(int)
                columns[modality] = [rows[a:b] if b > a else None for a, b in zip(at, at[1:])]
                ids, keys = file["id"][...], [k.decode() for k in file["key"][...]]
        for i, (sample, key) in enumerate(zip(ids, keys)):
            word, name = name_of(key)
            samples.append((int(sample), word, name, {m: columns[m][i] for m, _ in MODALITIES}))
    return samples


def read_keywords():
    """{name: "keyword, keyword"} of every thing, held out or not (keywords.tsv, which build.py writes)."""
    with open(os.path.join(HERE, "keywords.tsv"), encoding="utf-8") as lines:
        return dict(line.rstrip("\n").split("\t") for line in lines)


# --- parts: samples of one kind, one shard each ---------------------------------


def tokens(text):
    return list(text.encode())


def sample_of(number, mark, latent, prompt, response):
    """One sample of a part: its latents belong to the modality of number `mark`, or to none (-1)."""
    ask = [BEGIN] + ([-1 - mark] if mark >= 0 else []) + tokens(prompt)
    return {"id": number, "mark": mark, "latent": latent, "prompt": ask, "target": tokens(response) + [END],
            "key": response}


def captions(samples, mark):
    """Every sample that has the modality and a name: its latents, then the name."""
    modality = MODALITIES[mark][0]
    return [sample_of(4 * i + mark, mark, latent[modality], "name:", name)
            for i, _, name, latent in samples if name and latent[modality] is not None]


def reading(samples, keywords):
    """What the base reads: each name and word once, keywords before names, names before keywords."""
    out, seen = [], set()
    for _, word, name, _ in samples:
        if not name or name in seen:
            continue
        seen.add(name)
        out.append(("name:", name))
        if not word and keywords.get(name):
            out += [(keywords[name] + "\nname:", name), (name + "\nkeywords:", keywords[name])]
    return [sample_of(4 * n + 3, -1, None, ask, said) for n, (ask, said) in enumerate(out)]


def guessing(samples, keywords):
    """Held out: names by their keywords."""
    return [sample_of(4 * n + 3, -1, None, keywords[name] + "\nname:", name)
            for n, (_, _, name, _) in enumerate(samples) if keywords.get(name)]


def some_of(samples, count):
    """`count` of the samples, whichever: a function of their ids alone."""
    return sorted(samples, key=lambda s: hashlib.sha256(b"uneven %d" % s["id"]).digest())[:count]


def write_part(folder, number, samples):
    """Shard `number` of every modality in `folder`: [paths]."""
    paths = []
    for mark, (modality, width) in enumerate(MODALITIES):
        path = os.path.join(folder, "%s-%05d.h5" % (modality, number))
        paths.append(export.write_shard(
            path, modality, "%s of the glyph set; %s" % (modality, VOCABULARY), [s["id"] for s in samples],
            [s["latent"] if s["mark"] == mark else None for s in samples], width=width, filter="gzip", level=1,
            keys=[s["key"] for s in samples], prompts=[s["prompt"] for s in samples],
            targets=[s["target"] for s in samples]))
    return paths


def make(out):
    keywords = read_keywords()
    train, held_out = read_split("train"), read_split("validation")
    pictures = captions(train, 0)
    parts = {"image": pictures, "speech": captions(train, 1), "text": captions(train, 2),
             "base": reading(train, keywords), "base_validation": guessing(held_out, keywords)}
    parts["few"] = some_of(parts["speech"], int(SHARE * len(pictures)))
    parts.update({MODALITIES[m][0] + "_validation": captions(held_out, m) for m in range(3)})
    splits = {name: [name] for name in parts}
    splits.update(mixture=["image", "speech"], uneven=["image", "few"], mixture_all=["image", "speech", "text"],
                  old=["base", "image"], mixture_validation=["image_validation", "speech_validation"])
    files = {name: write_part(os.path.join(out, ".parts", name), 0, samples) for name, samples in parts.items()}
    for split, names in sorted(splits.items()):
        os.makedirs(os.path.join(out, split), exist_ok=True)
        for number, name in enumerate(names):
            for (modality, _), path in zip(MODALITIES, files[name]):
                link = os.path.join(out, split, "%s-%05d.h5" % (modality, number))
                if os.path.exists(link):
                    os.unlink(link)
                os.link(path, link)
        count = sum(len(parts[n]) for n in names)
        said = sum(len(s["target"]) for n in names for s in parts[n])
        print("%s: %d samples, %d response tokens" % (split, count, said))


def main():
    parser = argparse.ArgumentParser(prog="captions.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="folder that gets the splits")
    arguments = parser.parse_args()
    try:
        make(arguments.out)
    except (ExportError, OSError) as err:
        print("captions.py: %s" % err, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
