"""Introduce two identities by photos, ask where the first one is, and draw the answer. Run `make demo` first.

python examples/quickstart.py [--identity Kate kate.jpg --identity Tom tom1.jpg tom2.jpg --scene party.jpg]
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

from idavlm.data import Identity, Message, Part, RecordDataset, Sample
from idavlm.evaluation import generate_texts, identity_maps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="runs/train_idformer/characters/seed-0/with-id-former")
parser.add_argument("--data", default="runs/train_idformer/data/characters/test.jsonl", help="default images")
parser.add_argument("--identity", nargs="+", action="append", help="name and photos; the question is about the first")
parser.add_argument("--scene", help="image to ask about; paths are relative to the current folder")
parser.add_argument("--out", default="runs/quickstart.png")
args = parser.parse_args()
if (args.scene is None) != (args.identity is None):
    parser.error("--identity and --scene need each other.")
model, processor = AutoModelForImageTextToText.from_pretrained(args.model), AutoProcessor.from_pretrained(args.model)
identities, scene, root = [Identity(name, photos) for name, *photos in args.identity or []], args.scene, Path.cwd()
if scene is None:  # identities and scene of a test question
    record = next(sample for sample in RecordDataset(args.data) if sample.task == "location")
    identities, scene, root = record.identities, record.message_images[0], record.image_root
question = [Part("image", image=scene), Part("text", text=f"\nWhere is {identities[0].name}?")]
sample = Sample("quickstart", "identity", identities, [Message("user", question)], image_root=root)
[(answer, size)] = generate_texts(model, processor, [sample], max_new_tokens=16)
[identity_map], grid = identity_maps(model, processor, sample)
image = Image.open(root / scene).convert("RGB").point(lambda value: value * 2 // 3)
heat = Image.fromarray((150 * identity_map[:, 0].reshape(grid)).astype("uint8")).resize(image.size)
image.paste((255, 220, 0), mask=heat)  # yellow where patches attend to the first identity
if box := processor.parse_box(answer, size, name=identities[0].name):
    ImageDraw.Draw(image).rectangle(box, outline="red", width=max(1, image.width // 100))
image.resize((512, 512 * image.height // image.width)).save(args.out)
print(f"{question[1].text.strip()}\n{answer}\n{args.out} shows the box and the identity map of {identities[0].name}.")
