"""Settings and limits of the server."""

from dataclasses import dataclass, fields
from pathlib import Path

from idavlm.data.images import MAX_ASPECT_RATIO
from idavlm.utils import check_positive


@dataclass(frozen=True)
class ServerSettings:
    """What the server allows.

    Attributes:
        model_name: name of the model in requests.
        api_keys: a request needs one of them in ``Authorization: Bearer``; none: every request is accepted.
        image_root: folder of image files that requests may name; None: images are data URLs only.
        allow_banks: whether banks can be created. Without, no photo and no feature outlives its request.
        max_requests: largest number of requests at a time; further ones get status 429.
        max_body_bytes: largest body of a request.
        max_bytes_in_flight: largest sum of the bodies of all requests that are being read or prepared.
        max_images: largest number of images of a request, references included.
        max_pixels: largest number of pixels of all images of a request together.
        max_aspect_ratio: largest long side of an image, relative to the short side.
        max_identities: largest number of identities of a request or a bank.
        max_prompt_tokens: largest number of tokens of a prompt, image tokens included.
        max_new_tokens: largest number of tokens of an answer.
        default_new_tokens: the number where a request does not say.
        body_timeout: seconds in which headers and body of a request must arrive.
        deadline: seconds after which a request fails.
        stall_timeout: seconds after which a client that does not read its response is disconnected.
        stop_timeout: seconds in which running requests may end after SIGTERM.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    image_root: Path | None = None
    allow_banks: bool = True
    max_requests: int = 256
    max_body_bytes: int = 32 * 2**20
    max_bytes_in_flight: int = 256 * 2**20
    max_images: int = 32
    max_pixels: int = 64_000_000
    max_aspect_ratio: int = MAX_ASPECT_RATIO
    max_identities: int = 16
    max_prompt_tokens: int = 8192
    max_new_tokens: int = 1024
    default_new_tokens: int = 256
    body_timeout: float = 30.0
    deadline: float = 120.0
    stall_timeout: float = 30.0
    stop_timeout: float = 60.0

    def __post_init__(self) -> None:
        check_positive(**{field.name: getattr(self, field.name) for field in fields(self) if field.type is int})
        for name in ("body_timeout", "deadline", "stall_timeout", "stop_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be a positive number of seconds.")
        if self.image_root is not None and not self.image_root.is_dir():
            raise ValueError(f"image_root={str(self.image_root)!r} is not a folder; create it, or leave it out.")
        if self.max_body_bytes > self.max_bytes_in_flight:
            raise ValueError(
                f"max_body_bytes={self.max_body_bytes} is larger than max_bytes_in_flight={self.max_bytes_in_flight}, "
                "so that such a request could never be read; raise the latter."
            )
