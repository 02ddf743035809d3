"""Ask a running `idavlm serve` about a scene and a cast, with the openai client.

    idavlm serve &
    python examples/ask_server.py --identity Kate kate_1.jpg kate_2.jpg --scene scene.jpg --question "Where is Kate?"

With --bank NAME, the photos are sent once, to a bank of this name that is deleted in the end. The environment variable
IDAVLM_API_KEY holds the API key.
"""

import argparse
import base64
import mimetypes
import os
from pathlib import Path

import openai


def data_url(file: Path) -> str:
    """An image file as the server takes it."""
    kind = mimetypes.guess_type(file)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--identity", action="append", nargs="+", default=[], metavar=("NAME", "PHOTO"))
    parser.add_argument("--scene", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--bank", help="store the photos in a bank of this name while the program runs")
    arguments = parser.parse_args()

    client = openai.OpenAI(base_url=arguments.url, api_key=os.environ.get("IDAVLM_API_KEY", "none"))
    cast = [
        {"name": name, "images": [data_url(Path(photo)) for photo in photos]} for name, *photos in arguments.identity
    ]
    content = [
        {"type": "image_url", "image_url": {"url": data_url(arguments.scene)}},
        {"type": "text", "text": arguments.question},
    ]
    options = {"model": client.models.list().data[0].id, "max_tokens": 64, "stream": True}
    if arguments.bank is None:
        content = [*({"type": "identity", **identity} for identity in cast), *content]
    else:  # routes that OpenAI does not have
        body = {"name": arguments.bank, "identities": cast, "store": False}
        client.post("/identities", body=body, cast_to=object)
        options["extra_body"] = {"bank": arguments.bank}
    try:
        for chunk in client.chat.completions.create(messages=[{"role": "user", "content": content}], **options):
            delta = chunk.choices[0].delta
            print(delta.content or "", end="", flush=True)
            if chunk.choices[0].finish_reason:
                print(f"\nboxes: {delta.boxes}")
    finally:
        if arguments.bank is not None:
            client.delete(f"/identities/{arguments.bank}", cast_to=object)


if __name__ == "__main__":
    main()
