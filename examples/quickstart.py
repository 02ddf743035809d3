"""Introduce two drawn characters by photos, ask where the first one is, and draw the answer of the model.

python examples/quickstart.py [--identity Kate kate.jpg --identity Tom tom1.jpg tom2.jpg --scene party.jpg]
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor
from idavlm.data import Identity, Message, Part, RecordDataset, Sample
from idavlm.datasets import build_characters
from idavlm.evaluation import generate_texts, identity_maps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="idavlm-tiny", help="checkpoint; idavlm-tiny is part of the package")
parser.add_argument("--identity", nargs="+", action="append", help="name and photos; the question is about the first")
parser.add_argument("--scene", help="image to ask about; paths are relative to the current folder")
parser.add_argument("--out", default="runs/quickstart.png")
args = parser.parse_args()
if (args.scene is None) != (args.identity is None):
    parser.error("--identity and --scene need each other.")
model = IDAVLMForConditionalGeneration.from_pretrained(args.model).eval()
processor = IDAVLMProcessor.from_pretrained(args.model)
identities, scene, root = [Identity(name, photos) for name, *photos in args.identity or []], args.scene, Path.cwd()
if scene is None:  # characters of a small data set that is drawn now
    sizes = {"num_train": 5, "num_test": 8, "num_train_scenes": 4, "num_test_scenes": 4, "num_general": 1}
    data = build_characters("runs/quickstart", **sizes, num_train_records=1, num_general_records=1, seed=7)
    record = next(sample for sample in RecordDataset(data / "test.jsonl") if sample.task == "location")
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
