"""Give a teacher a view of its own, and print the prompt as each teacher reads it.

    python examples/custom_view.py [STUDENT]

STUDENT is the folder of a model, or of its processor; default: the demo's.
"""

import io
import sys
from pathlib import Path

import yaml
from PIL import Image

from mmopd import Fleet, Prompt, user_turn
from mmopd.modality import Encoder
from mmopd.teacher.view import BUILT_IN, encode_view

# The file of a fleet. A view takes its words from the row: `extra` has a caption and a hint.
FLEET = """
teachers:
  vision: {endpoints: ["http://127.0.0.1:8000"]}
  words: {endpoints: ["http://127.0.0.1:8001"], view: described}
  tutor: {endpoints: ["http://127.0.0.1:8002"], view: hinted}
views:
  described: {images: drop, instead: "[picture: {caption}]\\n"}
  hinted: {hint: "\\nHint: {hint}"}
routes:
  - {modality: image, teacher: {vision: 2, words: 1, tutor: 1}}  # half of the target is vision's
"""

student = Path(sys.argv[1] if len(sys.argv) > 1 else ".mmopd/demo/base")
picture = io.BytesIO()
Image.new("RGB", (64, 32), "white").save(picture, "PNG")
question = Prompt(
    key="example/0",
    task="digit_sum",
    modality="image",
    messages=tuple(user_turn("What is their sum?", images=1)),
    images=(picture.getvalue(),),
    answer="8",
    extra={"caption": "a three and a five", "hint": "Three and five."},
)

fleet = Fleet.model_validate(yaml.safe_load(FLEET))
views = {**BUILT_IN, **fleet.views}
encoder = Encoder(student)
encoded = encoder.encode(question)
for name, teacher in fleet.teachers.items():
    shown = encode_view(encoder, encoded, views[teacher.view])
    print(f"{name}: {len(shown.prompt.images)} images, {len(shown.expanded)} tokens")
    print("  " + repr(encoder.tokenizer.decode(shown.ids)))
